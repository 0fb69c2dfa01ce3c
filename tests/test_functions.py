"""Every operator's function body, in stock onnxruntime, against its NumPy reference."""
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgeattn.exporters.functions import OPERATORS, OPSET, functions
from edgeattn.ops import DOMAIN, OPS, load_kernel
from edgeattn.reference.matmul_nbits import pack_panels, quantise_activations
from edgeattn.reference.matmul_ternary import pack_ternary


def session(name, arrays, attributes, constants):
    """A model of one node; inputs named in `constants` are initializers."""
    inputs = [key if value is not None else "" for key, value in arrays.items()]
    outputs = list(OPS[name].outputs)
    values = [helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
              for key, value in arrays.items() if value is not None and key not in constants]
    results = [helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, [None] * (3 if key.startswith("present") else 2))
               for key in outputs]
    node = helper.make_node(name, inputs, outputs, domain=DOMAIN, **attributes)
    bodies = functions([node])
    graph = helper.make_graph([node], "one", values, results,
                              [numpy_helper.from_array(arrays[key], key) for key in constants if arrays[key] is not None])
    return onnxruntime.InferenceSession(model_of(graph, bodies), providers=["CPUExecutionProvider"])


def model_of(graph, bodies):
    model = helper.make_model(graph, functions=bodies, ir_version=11, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)])
    onnx.checker.check_model(model)
    return model.SerializeToString()


def agree(name, arrays, attributes=None, constants=(), tolerance=1e-5):
    attributes = attributes or {}
    feeds = {key: value for key, value in arrays.items() if value is not None and key not in constants}
    got = session(name, arrays, attributes, constants).run(None, feeds)
    expected = load_kernel(name, "reference")(*arrays.values(), **attributes)
    for a, b in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.fixture
def normal():
    rng = np.random.default_rng(5)
    return lambda *shape: rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_weights(normal, dtype):
    weight = normal(40, 70).astype(dtype)
    agree("embedding", dict(ids=np.array([3, 0, 39]), weight=weight), constants=["weight"])
    for bias in (None, normal(40)):
        agree("linear", dict(x=normal(5, 70), weight=weight, bias=bias), constants=["weight", "bias"])


BLOCKS = [(16, 64, 32), (32, 70, 37), (64, 130, 48), (128, 256, 5), (256, 300, 17)]  # block size, K, N


@pytest.mark.parametrize("bits, block_size, k, n", [(bits, *shape) for bits in (2, 3, 4, 8) for shape in BLOCKS[bits == 3:]])
@pytest.mark.parametrize("zeros", [None, "whole", "half"])
def test_quantised_weights(normal, bits, zeros, block_size, k, n):
    rng = np.random.default_rng(6)
    blocks = -(-k // block_size)
    points = {None: None, "whole": rng.integers(0, 1 << bits, (n, blocks), np.uint8), "half": rng.random((n, blocks)) * (1 << bits)}[zeros]
    weights = dict(zip(("codes", "scales", "zero_points"), pack_panels(
        rng.integers(0, 1 << bits, (n, k), np.uint8), rng.random((n, blocks)), points, bits=bits, block_size=block_size)))
    attributes = dict(bits=bits, block_size=block_size, K=k, N=n)
    agree("embedding_nbits", dict(ids=np.array([0, n - 1, 1]), **weights), attributes, list(weights))
    x = quantise_activations(normal(5, k), block_size)  # what MatMulNBits does to them at accuracy level 4
    for bias in (None, normal(n)):
        agree("matmul_nbits", dict(x=x, **weights, bias=bias), attributes, [*weights, "bias"], tolerance=1e-4)


@pytest.mark.parametrize("activation_bits", [4, 8])
@pytest.mark.parametrize("k, n", [(64, 256), (256, 50), (300, 5)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", [dict(bits=2), dict(bits=1), dict(bits=2, input_major=1)], ids=str)
def test_ternary_weights(normal, activation_bits, k, n, bias, form):
    """Of 8 bits each block of each token holds the largest integer, which leaves onnxruntime's second rounding nothing to round."""
    rng = np.random.default_rng(7)
    codes, scales = pack_ternary(rng.integers(-1, 2, (n, k), np.int8), **form), rng.random(n).astype(np.float32) + 1
    arrays = dict(x=normal(5, k), codes=codes, scales=scales)
    arrays["x"][:, ::128] = 5
    attributes = dict(activation_bits=activation_bits, K=k, N=n, **form)
    agree("matmul_ternary", arrays | dict(bias=normal(n) if bias else None), attributes, ["codes", "scales", "bias"],
          tolerance=1e-5 if activation_bits == 8 else 2e-2)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("past", [0, 7])
@pytest.mark.parametrize("head_dim, rotary_dim, interleaved", [(64, 64, 0), (80, 80, 0), (16, 8, 0), (16, 16, 1)])
def test_cached_attention(normal, window, past, head_dim, rotary_dim, interleaved):
    heads, kv_heads, tokens = 6, 2, 5
    attributes = dict(num_heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved,
                      scale=0.3, window=window, layer=1)
    agree("cached_attention", dict(
        q=normal(tokens, heads * head_dim), k=normal(tokens, kv_heads * head_dim), v=normal(tokens, kv_heads * head_dim),
        cos=normal(50, rotary_dim // 2), sin=normal(50, rotary_dim // 2), past_key=normal(kv_heads, past, head_dim),
        past_value=normal(kv_heads, past, head_dim), positions=np.arange(past, past + tokens)), attributes)


@pytest.mark.parametrize("name", OPERATORS)
def test_signature_is_the_operator_tables(name):
    op = OPS[name]
    options = dict(bits=2, activation_bits=8, activation="silu", N=64)
    node = helper.make_node(name, [], [], domain=DOMAIN, **{key: value for key, value in options.items() if key in op.attributes})
    function, = functions([node])
    assert list(function.input) == [key.rstrip("?") for key in op.inputs]
    assert (tuple(function.output), tuple(function.attribute)) == (op.outputs, op.attributes)


def test_bodies_of_one_model_differ():
    """Nodes of one operator with other bits, with and without zero points, each get their own function."""
    rng, kinds = np.random.default_rng(8), [(2, True), (3, False), (3, True), (8, False)]

    def codes(bits, k):
        return rng.integers(0, 1 << bits, (32, k), np.uint8)
    stored = [[array for array in pack_panels(codes(bits, 64), rng.random((32, 2)) / 9, codes(bits, 2) if zeros else None, bits=bits,
                                              block_size=32) if array is not None] for bits, zeros in kinds]
    names = [[f"{i}.{j}" for j in range(len(arrays))] for i, arrays in enumerate(stored)]
    nodes = [helper.make_node("matmul_nbits", ["x", *each], [f"y{i}"], domain=DOMAIN, bits=bits, block_size=32, K=64, N=32)
             for i, (each, (bits, _)) in enumerate(zip(names, kinds))]
    bodies = functions(nodes)
    assert len(bodies) == 4
    outputs = [helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, [None] * 2) for i in range(4)]
    graph = helper.make_graph(nodes, "four", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, 64])], outputs,
                              [numpy_helper.from_array(a, n) for arrays, each in zip(stored, names) for a, n in zip(arrays, each)])
    x = quantise_activations(rng.standard_normal((5, 64), np.float32), 32)
    got = onnxruntime.InferenceSession(model_of(graph, bodies), providers=["CPUExecutionProvider"]).run(None, dict(x=x))
    for arrays, (bits, _), result in zip(stored, kinds, got):
        expected = load_kernel("matmul_nbits", "reference")(x, *arrays, bits=bits, block_size=32, K=64, N=32)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
