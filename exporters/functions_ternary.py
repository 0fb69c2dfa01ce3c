"""Function bodies of ternary weights; see functions.py for what bodies must heed.

onnxruntime's 2-bit product reads the same bytes as ours. It rounds activations to int8 once more, per block of 128: those of a token are
integers already, so this adds at most as much error as the model's own rounding; nothing that runs at the speed of 2 bits avoids it.
The dense form, and that stored input by input, are turned into these bytes at every call: were they folded when a file is opened, as other
weights are, the steps on the way would all be held at once, twenty times the file.
"""
from edgeattn.exporters.functions_nbits import fields

MATMUL = """
matmul_ternary <bits, activation_bits, K, N, input_major> (x, codes, scales, bias) => (out) {
  start = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  n = Constant <value_int : int = @N> ()
  end = Reshape (n, any)
  CODES
  CUT
  column = Unsqueeze (scales, any)
  scale_shape = Concat <axis = 0> (end, blocks)
  s = Expand (column, scale_shape)

  size = Abs (x)
  FACTOR
  scaled = Mul (x, factor)
  rounded = Round (scaled)
  lowest = Constant <value_float = LOWEST> ()
  highest = Constant <value_float = HIGHEST> ()
  q = Clip (rounded, lowest, highest)
  product = com.microsoft.MatMulNBits <K : int = @K, N : int = @N, bits = 2, block_size = 128, accuracy_level = 4> (q, b, s)
  unscaled = Div (product, factor)
  OUT
}"""

FACTORS = {
    8: """top = ReduceMax (size, any)
  least = Constant <value_float = 1e-5> ()
  divisor = Max (top, least)
  whole = Constant <value_float = 127.0> ()
  factor = Div (whole, divisor)""",
    4: """mean = ReduceMean (size, any)
  least = Constant <value_float = 1e-5> ()
  divisor = Max (mean, least)
  whole = Constant <value_float = 2.6457513> ()
  factor = Div (whole, divisor)""",
}


PANELS = """
  codes_by_output = Transpose <perm = [0, 2, 1, 3]> (codes)
  block_bytes = Constant <value_ints = [32]> ()
  steps = Shape <start = 1, end = 2> (codes)
  block_steps = Constant <value_ints = [8]> ()
  blocks = Div (steps, block_steps)
  code_shape = Concat <axis = 0> (any, blocks, block_bytes)
  all_codes = Reshape (codes_by_output, code_shape)"""

# The codes, depending on x as far as onnxruntime can tell.
UNFOLDED = """
  tokens = Shape <start = 0, end = 1> (x)
  nothing = Mul (tokens, start)
  nothing_bits = Cast <to = 2> (nothing)
  live_codes = BitwiseOr (codes, nothing_bits)"""

DIGITS = UNFOLDED + """
  table = Constant <value = uint8[256, 5] {TABLE}> ()
  indices = Cast <to = 6> (live_codes)
  digits = Gather (table, indices)
  in_order = Transpose <perm = [0, 2, 1, 4, 3]> (digits)
  step_k = Constant <value_ints = [20]> ()
  steps = Shape <start = 1, end = 2> (codes)
  stored_k = Mul (steps, step_k)"""

INPUTS = UNFOLDED + f"""
  last = Constant <value_ints = [-1]> ()
  {fields("live_codes", 2)}
  fours = Constant <value_ints = [0, 0, 4, 4, 4, 4]> ()
  parts = Reshape (live_codes_fields, fours)
  in_order = Transpose <perm = [0, 3, 5, 2, 4, 1]> (parts)
  stored_k = Shape <start = 1, end = 2> (codes)"""

# Codes, a byte each, by output and in the order of K, to four in a byte.
PACK = """
  row_shape = Concat <axis = 0> (any, stored_k)
  stored = Reshape (in_order, row_shape)
  k_n = Constant <value_int : int = @K> ()
  width = Reshape (k_n, any)
  one = Constant <value_ints = [1]> ()
  by_output = Slice (stored, start, width, one)
  block = Constant <value_ints = [128]> ()
  round_up = Constant <value_ints = [127]> ()
  more = Add (width, round_up)
  blocks = Div (more, block)
  full_width = Mul (blocks, block)
  missing = Sub (full_width, width)
  rows = Shape <start = 0, end = 1> (by_output)
  pad_shape = Concat <axis = 0> (rows, missing)
  pad = ConstantOfShape <value = uint8[1] {2}> (pad_shape)
  padded = Concat <axis = 1> (by_output, pad)
  byte_shape = Constant <value_ints = [0, -1, 32, 4]> ()
  fours_of_k = Reshape (padded, byte_shape)
  k0, k1, k2, k3 = Split <axis = 3, num_outputs = 4> (fours_of_k)
  by2 = Constant <value = uint8 {2}> ()
  by4 = Constant <value = uint8 {4}> ()
  by6 = Constant <value = uint8 {6}> ()
  up1 = BitShift <direction = "LEFT"> (k1, by2)
  up2 = BitShift <direction = "LEFT"> (k2, by4)
  up3 = BitShift <direction = "LEFT"> (k3, by6)
  low = BitwiseOr (k0, up1)
  high = BitwiseOr (up2, up3)
  bytes = BitwiseOr (low, high)
  all_codes = Squeeze (bytes, any)"""


def matmul(bits: int, activation_bits: int, input_major: bool, bias: bool, whole: bool) -> str:
    """whole: N fills its panels, or tiles of them."""
    codes = INPUTS + PACK if input_major else PANELS if bits == 2 else DIGITS.replace("TABLE", _digit_table()) + PACK
    cut = "b = Identity (all_codes)" if whole else "b = Slice (all_codes, start, end, start)"
    text = MATMUL.replace("CODES", codes).replace("CUT", cut).replace("FACTOR", FACTORS[activation_bits])
    for name, value in (("LOWEST", -(1 << (activation_bits - 1))), ("HIGHEST", (1 << (activation_bits - 1)) - 1)):
        text = text.replace(name, f"{float(value)}")
    return text.replace("OUT", "out = Add (unscaled, bias)" if bias else "out = Identity (unscaled)")


def _digit_table():
    """The 2-bit codes of every byte's five digits."""
    return ", ".join(str((byte * 3 ** n % 256 * 3 >> 8) + 1) for byte in range(256) for n in range(5))
