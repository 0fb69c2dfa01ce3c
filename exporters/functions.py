"""What each of our operators means in standard operators: the model-local functions that let stock onnxruntime run an export.

Weights are un-permuted by operators on constants, which onnxruntime folds once, when it opens the file. Nothing that depends
on a run-time input may be as large as a weight: `embedding_nbits` gathers whole panels first and decodes bytes afterwards.
"""
import onnx
from onnx import parser

from edgeattn.exporters import functions_nbits, functions_ternary
from edgeattn.graph import attributes
from edgeattn.ops import DOMAIN, OPS, PANEL
from edgeattn.reference.matmul_ternary import TILE

OPSET = 23  # the first with RMSNormalization, RotaryEmbedding and Attention

EMBEDDING = """
embedding (ids, weight) => (out) {
  rows = Gather (weight, ids)
  out = Cast <to = 1> (rows)
}"""

LINEAR = """
linear (x, weight, bias) => (out) {
  wide = Cast <to = 1> (weight)
  out = Gemm <transB = 1> (x, wide, bias)
}"""

GATED_ACTIVATION = """
gated_activation <activation> (x) => (out) {
  gate, up = Split <axis = -1, num_outputs = 2> (x)
  BODY
  out = Mul (activated, up)
}"""

ACTIVATIONS = {
    "silu": """sigmoid = Sigmoid (gate)
  activated = Mul (gate, sigmoid)""",
    "gelu_tanh": """activated = Gelu <approximate = "tanh"> (gate)""",
    "relu2": """positive = Relu (gate)
  activated = Mul (positive, positive)""",
}

# Attention's own is_causal and past are not used: a sliding window needs a mask of its own in any case.
CACHED_ATTENTION = """
cached_attention <num_heads, kv_heads, head_dim, rotary_dim, interleaved, scale, window, layer>
    (q, k, v, cos, sin, past_key, past_value, positions) => (out, present_key, present_value) {
  first = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  second = Constant <value_ints = [1]> ()
  heads_n = Constant <value_int : int = @num_heads> ()
  kv_heads_n = Constant <value_int : int = @kv_heads> ()
  head_dim_n = Constant <value_int : int = @head_dim> ()
  heads_1 = Reshape (heads_n, any)
  kv_heads_1 = Reshape (kv_heads_n, any)
  head_dim_1 = Reshape (head_dim_n, any)
  q_shape = Concat <axis = 0> (any, heads_1, head_dim_1)
  kv_shape = Concat <axis = 0> (any, kv_heads_1, head_dim_1)

  batch_positions = Unsqueeze (positions, first)
  batch_q = Unsqueeze (q, first)
  batch_k = Unsqueeze (k, first)
  rotated_q = RotaryEmbedding <num_heads : int = @num_heads, rotary_embedding_dim : int = @rotary_dim,
                               interleaved : int = @interleaved> (batch_q, cos, sin, batch_positions)
  rotated_k = RotaryEmbedding <num_heads : int = @kv_heads, rotary_embedding_dim : int = @rotary_dim,
                               interleaved : int = @interleaved> (batch_k, cos, sin, batch_positions)
  split_q = Reshape (rotated_q, q_shape)
  split_k = Reshape (rotated_k, kv_shape)
  split_v = Reshape (v, kv_shape)
  new_q = Transpose <perm = [1, 0, 2]> (split_q)
  new_key = Transpose <perm = [1, 0, 2]> (split_k)
  new_value = Transpose <perm = [1, 0, 2]> (split_v)
  present_key = Concat <axis = 1> (past_key, new_key)
  present_value = Concat <axis = 1> (past_value, new_value)

  past_1 = Shape <start = 1, end = 2> (past_key)
  total_1 = Shape <start = 1, end = 2> (present_key)
  past = Squeeze (past_1)
  total = Squeeze (total_1)
  keys = Range (zero, total, one)
  query_row = Range (past, total, one)
  queries = Unsqueeze (query_row, second)
  distance = Sub (queries, keys)
  causal = GreaterOrEqual (distance, zero)
  window_n = Constant <value_int : int = @window> ()
  unlimited = Equal (window_n, zero)
  near = Less (distance, window_n)
  inside = Or (near, unlimited)
  visible = And (causal, inside)

  batch_new_q = Unsqueeze (new_q, first)
  batch_key = Unsqueeze (present_key, first)
  batch_value = Unsqueeze (present_value, first)
  attended = Attention <scale : float = @scale> (batch_new_q, batch_key, batch_value, visible)
  by_head = Squeeze (attended, first)
  by_token = Transpose <perm = [1, 0, 2]> (by_head)
  row_shape = Constant <value_ints = [0, -1]> ()
  out = Reshape (by_token, row_shape)
}"""

PLAIN = {"embedding": EMBEDDING, "linear": LINEAR, "cached_attention": CACHED_ATTENTION}
OPERATORS = (*PLAIN, "matmul_nbits", "embedding_nbits", "matmul_ternary", "gated_activation")


def functions(nodes: list[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """The function of every operator of ours that `nodes` use. An operator whose body depends on attributes or on which inputs are
    connected has several, told apart by ONNX's `overload`, which this sets in the nodes too."""
    found = {}
    for node in nodes:
        if node.domain == DOMAIN:
            connected = {name.rstrip("?") for name, source in zip(OPS[node.op_type].inputs, node.input) if source}
            text, node.overload = _body(node.op_type, attributes(node), connected)
            found[node.op_type, node.overload] = text
    return [_parse(text, overload) for (_, overload), text in sorted(found.items())]


def _body(name, options, connected):
    """(text of the function, its overload) for these attributes and with these inputs connected."""
    zeros = "zero_points" in connected
    if name == "gated_activation":
        return GATED_ACTIVATION.replace("BODY", ACTIVATIONS[options["activation"]]), options["activation"]
    if name == "matmul_nbits":
        whole = options["N"] % PANEL == 0
        marks = "3" * (options["bits"] == 3) + "zeros" * zeros + "cut" * (not whole)
        return functions_nbits.matmul(options["bits"], zeros, whole), marks
    if name == "embedding_nbits":
        return functions_nbits.embedding(options["bits"], zeros), str(options["bits"]) + ("zeros" if zeros else "")
    if name == "matmul_ternary":
        sparse = bool(options.get("input_major"))
        whole = options["N"] % (TILE if sparse else PANEL) == 0
        variant = options["bits"], options["activation_bits"], sparse, "bias" in connected, whole
        return functions_ternary.matmul(*variant), "x".join(str(int(x)) for x in variant)
    return PLAIN[name], ""


def _parse(text, overload):
    function = parser.parse_function(f'<domain: "edgeattn", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>{text}')
    function.overload = overload
    return function
