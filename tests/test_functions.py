"""Every operator's function body, in stock onnxruntime, against its NumPy reference."""
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from edgeattn.exporters.functions import BODIES, OPSET, function_body
from edgeattn.ops import DOMAIN, OPS, load_kernel
from edgeattn.reference.matmul_nbits import pack_panels, quantise_activations


def session(name, arrays, attributes, constants, bits):
    """A model of one node; inputs named in `constants` are initializers."""
    inputs = [key if value is not None else "" for key, value in arrays.items()]
    outputs = list(OPS[name].outputs)
    values = [helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
              for key, value in arrays.items() if value is not None and key not in constants]
    results = [helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, [None] * (3 if key.startswith("present") else 2))
               for key in outputs]
    graph = helper.make_graph([helper.make_node(name, inputs, outputs, domain=DOMAIN, **attributes)], "one", values, results,
                              [numpy_helper.from_array(arrays[key], key) for key in constants if arrays[key] is not None])
    model = helper.make_model(graph, functions=[function_body(name, bits)], ir_version=11, opset_imports=[
        helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("com.microsoft", 1)])
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def agree(name, arrays, attributes=None, constants=(), bits=8, tolerance=1e-5):
    attributes = attributes or {}
    feeds = {key: value for key, value in arrays.items() if value is not None and key not in constants}
    got = session(name, arrays, attributes, constants, bits).run(None, feeds)
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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size, k, n", [(16, 64, 32), (32, 70, 37), (64, 130, 50), (128, 256, 5), (256, 300, 17)])
def test_quantised_weights(normal, bits, block_size, k, n):
    rng = np.random.default_rng(6)
    codes, scales, _ = pack_panels(rng.integers(0, 1 << bits, (n, k), np.uint8), rng.random((n, -(-k // block_size))),
                                   bits=bits, block_size=block_size)
    attributes = dict(bits=bits, block_size=block_size, K=k, N=n)
    agree("embedding_nbits", dict(ids=np.array([0, n - 1, 1]), codes=codes, scales=scales), attributes, ["codes", "scales"], bits)
    x = quantise_activations(normal(5, k), block_size)  # what MatMulNBits does to them at accuracy level 4
    for bias in (None, normal(n)):
        arrays = dict(x=x, codes=codes, scales=scales, zero_points=None, bias=bias)
        agree("matmul_nbits", arrays, attributes, ["codes", "scales", "bias"], tolerance=1e-4)


def test_gated_activation(normal):
    agree("gated_activation", dict(x=normal(3, 20) * 20), dict(activation="silu"))


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


@pytest.mark.parametrize("name", BODIES)
def test_signature_is_the_operator_tables(name):
    function, op = function_body(name), OPS[name]
    assert list(function.input) == [key.rstrip("?") for key in op.inputs]
    assert (tuple(function.output), tuple(function.attribute)) == (op.outputs, op.attributes)
