"""An exported graph run node by node with the NumPy references: exact arithmetic on the stored weights, slowly.

Weights are read a slab of rows at a time, so that a model of any size is checked in the memory that its export took.
"""
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeattn.folder import inside
from edgeattn.graph import attributes
from edgeattn.ops import DOMAIN, PANEL, load_kernel
from edgeattn.reference.matmul_ternary import TILE

SLAB_BYTES = 4 << 20  # of float64 weights in work at a time


def interpret(folder: str | Path, feeds: dict[str, np.ndarray], outputs: list[str],
              observe: Callable[[str, np.ndarray], np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Run model.onnx on `feeds` {input: array}; returns the wanted outputs by name.

    observe(node name, its first output) may return another array to go on with.
    ValueError names a node that is none of ours.
    """
    path = Path(folder) / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    stored = {tensor.name: _Initializer(tensor, path.parent) for tensor in graph.initializer}
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    values = dict(feeds)
    for i, node in enumerate(graph.node):
        results = _evaluate(node, [values.get(name, stored.get(name)) for name in node.input])
        if observe:
            results[0] = observe(node.name, results[0])
        values.update(zip(node.output, results))
        for name in {*node.input, *node.output} - set(outputs):
            if last_use.get(name, i) <= i:
                values.pop(name, None)
    return {name: values[name] for name in outputs}


class _Initializer:
    """A tensor in the model's files; `rows` reads part of it."""

    def __init__(self, tensor, folder):
        self.shape, self.dtype = tuple(tensor.dims), helper.tensor_dtype_to_np_dtype(tensor.data_type)
        self._external = tensor.data_location == TensorProto.EXTERNAL
        if self._external:
            where = {entry.key: entry.value for entry in tensor.external_data}
            self._path, self._offset = inside(folder, where["location"]), int(where.get("offset", 0))
        else:
            self._array = numpy_helper.to_array(tensor)

    def rows(self, start=0, stop=None):
        """[stop - start, ...], the whole tensor by default."""
        if not self._external:
            return self._array[start:stop]
        stop = self.shape[0] if stop is None else stop
        row = int(np.prod(self.shape[1:], dtype=np.int64))
        flat = np.fromfile(self._path, self.dtype, (stop - start) * row, offset=self._offset + start * row * self.dtype.itemsize)
        return flat.reshape(-1, *self.shape[1:])


def _evaluate(node, inputs):
    """The outputs of a node, as a list."""
    options = attributes(node)
    if node.domain == DOMAIN and node.op_type in WEIGHTED:
        return [WEIGHTED[node.op_type](*inputs, **options)]
    arrays = [x.rows() if isinstance(x, _Initializer) else x for x in inputs]
    if node.domain == DOMAIN:
        results = load_kernel(node.op_type, "reference")(*arrays, **options)
    elif node.op_type in STANDARD:
        results = STANDARD[node.op_type](*arrays, options)
    else:
        raise ValueError(f"node {node.name!r}: {node.domain or 'onnx'} operator {node.op_type} is not one that exports have")
    return list(results) if isinstance(results, (tuple, list)) else [results]


STANDARD = {
    "RMSNormalization": lambda x, weight, a: load_kernel("rms_normalization", "reference")(x, weight, epsilon=a["epsilon"]),
    "Add": lambda x, y, a: x + y,
    "Gather": lambda x, indices, a: x.take(indices, axis=a["axis"]),
    "Abs": lambda x, a: np.abs(x),
    "TopK": lambda x, count, a: [-np.sort(-x, axis=-1)[..., :int(count[0])], np.argsort(-x, axis=-1, kind="stable")[..., :int(count[0])]],
    "ReduceMin": lambda x, axes, a: x.min(axis=tuple(axes), keepdims=True),
    "GreaterOrEqual": lambda x, y, a: x >= y,
    "Where": lambda condition, x, y, a: np.where(condition, x, y),
    "Reshape": lambda x, shape, a: x.reshape(shape),
    "Split": lambda x, sizes, a: np.split(x, np.cumsum(sizes)[:-1], axis=a["axis"]),
}


def _embedding(ids, weight):
    return np.concatenate([weight.rows(i, i + 1) for i in ids]).astype(np.float32)


def _embedding_nbits(ids, codes, scales, zero_points=None, *, bits, block_size, K, N):
    def row(token):
        part = token // PANEL, token // PANEL + 1
        return load_kernel("embedding_nbits", "reference")(np.array([token % PANEL]), codes.rows(*part), scales.rows(*part),
                                                           zero_points and zero_points.rows(*part), bits=bits,
                                                           block_size=block_size, K=K, N=PANEL)
    return np.concatenate([row(token) for token in ids])


def _linear(x, weight, bias=None):
    step = max(SLAB_BYTES // (8 * weight.shape[1]), 1)
    parts = [load_kernel("linear", "reference")(x, weight.rows(start, min(start + step, weight.shape[0])))
             for start in range(0, weight.shape[0], step)]
    return _plus(np.concatenate(parts, axis=1), bias)


def _matmul_nbits(x, codes, scales, zero_points=None, bias=None, *, bits, block_size, K, N):
    step = max(SLAB_BYTES // (8 * K * PANEL), 1)

    def slab(start):
        part = start, min(start + step, codes.shape[0])
        return load_kernel("matmul_nbits", "reference")(x, codes.rows(*part), scales.rows(*part),
                                                        zero_points and zero_points.rows(*part), bits=bits,
                                                        block_size=block_size, K=K, N=(part[1] - start) * PANEL)
    return _plus(np.concatenate([slab(start) for start in range(0, codes.shape[0], step)], axis=1)[:, :N], bias)


def _matmul_ternary(x, codes, scales, bias=None, *, K, N, **options):
    together = TILE if options.get("input_major") else PANEL  # outputs in one of the codes' first dimension
    step = max(SLAB_BYTES // (4 * K * together), 1)

    def slab(start):
        n = min(step * together, N - start * together)
        return load_kernel("matmul_ternary", "reference")(x, codes.rows(start, min(start + step, codes.shape[0])),
                                                          scales.rows(start * together, start * together + n), K=K, N=n, **options)
    return _plus(np.concatenate([slab(start) for start in range(0, codes.shape[0], step)], axis=1), bias)


def _plus(x, bias):
    return x if bias is None else x + bias.rows()


WEIGHTED = {"embedding": _embedding, "embedding_nbits": _embedding_nbits, "linear": _linear, "matmul_nbits": _matmul_nbits,
            "matmul_ternary": _matmul_ternary}
