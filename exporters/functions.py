"""What each of our operators means in standard operators: the model-local functions that let stock onnxruntime run an export.

Weights are un-permuted by operators on constants, which onnxruntime folds once, when it opens the file. Nothing that depends
on a run-time input may be as large as a weight: `embedding_nbits` gathers whole panels first and decodes bytes afterwards.
"""
import onnx
from onnx import parser

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

# Panels [panels, blocks, steps, 16, 4] become MatMulNBits' B [N, blocks, bytes of a block] by a transpose of bytes.
# accuracy_level is always 4: without it onnxruntime's 8-bit path on the CPU is a hundred times slower.
# Exports are symmetric, so zero_points is never connected and has no use here.
MATMUL_NBITS = """
matmul_nbits <bits, block_size, K, N> (x, codes, scales, zero_points, bias) => (out) {
  start = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  four = Constant <value_ints = [4]> ()
  n = Constant <value_int : int = @N> ()
  end = Reshape (n, any)
  blocks = Shape <start = 1, end = 2> (codes)
  steps = Shape <start = 2, end = 3> (codes)
  block_bytes = Mul (steps, four)
  code_shape = Concat <axis = 0> (any, blocks, block_bytes)
  codes_by_output = Transpose <perm = [0, 3, 1, 2, 4]> (codes)
  all_codes = Reshape (codes_by_output, code_shape)
  b = Slice (all_codes, start, end, start)
  wide_scales = Cast <to = 1> (scales)
  scales_by_output = Transpose <perm = [0, 2, 1]> (wide_scales)
  scale_shape = Concat <axis = 0> (any, blocks)
  all_scales = Reshape (scales_by_output, scale_shape)
  s = Slice (all_scales, start, end, start)
  out = com.microsoft.MatMulNBits <K : int = @K, N : int = @N, bits : int = @bits, block_size : int = @block_size,
                                   accuracy_level = 4> (x, b, s, , , bias)
}"""

UNPACK = {
    4: """
  low_mask = Constant <value = uint8 {15}> ()
  four = Constant <value = uint8 {4}> ()
  low = BitwiseAnd (bytes, low_mask)
  high = BitShift <direction = "RIGHT"> (bytes, four)
  low_last = Unsqueeze (low, last)
  high_last = Unsqueeze (high, last)
  code = Concat <axis = -1> (low_last, high_last)
  zero = Constant <value_float = 8.0> ()""",
    8: """
  code = Identity (bytes)
  zero = Constant <value_float = 128.0> ()""",
}

EMBEDDING_NBITS = """
embedding_nbits <bits, block_size, K, N> (ids, codes, scales, zero_points) => (out) {
  lanes = Constant <value_int = 16> ()
  start = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [-1]> ()
  k = Constant <value_int : int = @K> ()
  end = Reshape (k, last)
  panel = Div (ids, lanes)
  lane = Mod (ids, lanes)
  index = Unsqueeze (lane, last)
  panels = Gather (codes, panel)
  by_lane = Transpose <perm = [0, 3, 1, 2, 4]> (panels)
  bytes = GatherND <batch_dims = 1> (by_lane, index)
  UNPACK
  block_shape = Constant <value_ints = [0, 0, -1]> ()
  blocks = Reshape (code, block_shape)
  wide = Cast <to = 1> (blocks)
  centred = Sub (wide, zero)
  panel_scales = Gather (scales, panel)
  scales_by_lane = Transpose <perm = [0, 2, 1]> (panel_scales)
  scale = GatherND <batch_dims = 1> (scales_by_lane, index)
  wide_scale = Cast <to = 1> (scale)
  block_scale = Unsqueeze (wide_scale, last)
  scaled = Mul (centred, block_scale)
  row_shape = Constant <value_ints = [0, -1]> ()
  rows = Reshape (scaled, row_shape)
  out = Slice (rows, start, end, last)
}"""

GATED_ACTIVATION = """
gated_activation <activation> (x) => (out) {
  gate, up = Split <axis = -1, num_outputs = 2> (x)
  sigmoid = Sigmoid (gate)
  silu = Mul (gate, sigmoid)
  out = Mul (silu, up)
}"""

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

BODIES = {"embedding": EMBEDDING, "linear": LINEAR, "matmul_nbits": MATMUL_NBITS, "embedding_nbits": EMBEDDING_NBITS,
          "gated_activation": GATED_ACTIVATION, "cached_attention": CACHED_ATTENTION}


def function_body(name: str, embedding_bits: int = 8) -> onnx.FunctionProto:
    """The function of operator `name`; `embedding_bits` (4 or 8) is how embedding_nbits decodes its bytes."""
    text = BODIES[name].replace("UNPACK", UNPACK[embedding_bits].strip())
    return parser.parse_function(f'<domain: "edgeattn", opset_import: ["" : {OPSET}, "com.microsoft" : 1]>{text}')
