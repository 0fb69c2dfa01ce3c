"""Function bodies of ternary weights; see functions.py for what bodies must heed.

onnxruntime's 2-bit product reads the same bytes. It rounds activations to int8 once more, per block of 128: those of a token are integers
already, so this adds at most as much error as the model's own rounding; nothing that runs at the speed of 2 bits avoids it.
"""
MATMUL = """
matmul_ternary <bits, activation_bits, K, N> (x, codes, scales, bias) => (out) {
  start = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  n = Constant <value_int : int = @N> ()
  end = Reshape (n, any)
  codes_by_output = Transpose <perm = [0, 2, 1, 3]> (codes)
  block_bytes = Constant <value_ints = [32]> ()
  steps = Shape <start = 1, end = 2> (codes)
  block_steps = Constant <value_ints = [8]> ()
  blocks = Div (steps, block_steps)
  code_shape = Concat <axis = 0> (any, blocks, block_bytes)
  all_codes = Reshape (codes_by_output, code_shape)
  b = Slice (all_codes, start, end, start)
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


def matmul(bits: int, activation_bits: int, bias: bool) -> str:
    text = MATMUL.replace("FACTOR", FACTORS[activation_bits])
    for name, value in (("LOWEST", -(1 << (activation_bits - 1))), ("HIGHEST", (1 << (activation_bits - 1)) - 1)):
        text = text.replace(name, f"{float(value)}")
    return text.replace("OUT", "out = Add (unscaled, bias)" if bias else "out = Identity (unscaled)")
