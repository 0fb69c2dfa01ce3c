"""Function bodies of block-quantised weights; see functions.py for what bodies must heed.

Panels become MatMulNBits' B [N, blocks, bytes of a block] by a transpose of bytes; 3-bit codes become nibbles.
accuracy_level is always 4: without it onnxruntime's 2- and 8-bit paths on the CPU are a hundred times slower. So are its paths for
zero points that are floats. As sum_k x_k (q_k - z) s = sum_k x_k (q_k - middle) s + (middle - z) s sum_k x_k for each block, zero points of
either kind are a small product of block sums instead, added to MatMulNBits without zero points.
"""
MATMUL = """
matmul_nbits <bits, block_size, K, N> (x, codes, scales, zero_points, bias) => (out) {
  start = Constant <value_ints = [0]> ()
  any = Constant <value_ints = [-1]> ()
  four = Constant <value_ints = [4]> ()
  n = Constant <value_int : int = @N> ()
  end = Reshape (n, any)
  blocks = Shape <start = 1, end = 2> (codes)
  PANELS
  scales_by_output = Transpose <perm = [0, 2, 1]> (scales)
  scale_shape = Concat <axis = 0> (any, blocks)
  all_scales = Reshape (scales_by_output, scale_shape)
  CUT
  s = Cast <to = 1> (own_scales)
  PRODUCT
}"""

# Every step on the way to a constant is kept until the file is open, so there is none that can be left out: panels are mostly whole.
CUTS = {True: """
  b = Identity (all_codes)
  own_scales = Identity (all_scales)""", False: """
  b = Slice (all_codes, start, end, start)
  own_scales = Slice (all_scales, start, end, start)"""}

PANELS = """
  steps = Shape <start = 2, end = 3> (codes)
  block_bytes = Mul (steps, four)
  code_shape = Concat <axis = 0> (any, blocks, block_bytes)
  codes_by_output = Transpose <perm = [0, 3, 1, 2, 4]> (codes)
  all_codes = Reshape (codes_by_output, code_shape)"""

# Of every byte of low bits two bytes of nibbles: bits 10 and 32 of the codes' low halves go to 0 ... 1 and 4 ... 5, third bits to 2 and 6.
PANELS_3 = """
  by_output = Transpose <perm = [0, 3, 1, 2, 4]> (codes)
  first_half, second_half, thirds = Split <axis = 3, num_outputs = 3> (by_output)
  low = Concat <axis = 3> (first_half, second_half)
  THIRDS
  m3 = Constant <value = uint8 {3}> ()
  m4 = Constant <value = uint8 {4}> ()
  m48 = Constant <value = uint8 {48}> ()
  m64 = Constant <value = uint8 {64}> ()
  s2 = Constant <value = uint8 {2}> ()
  s3 = Constant <value = uint8 {3}> ()
  s4 = Constant <value = uint8 {4}> ()
  s5 = Constant <value = uint8 {5}> ()
  code0 = BitwiseAnd (low, m3)
  low_left = BitShift <direction = "LEFT"> (low, s2)
  code1 = BitwiseAnd (low_left, m48)
  low_down = BitShift <direction = "RIGHT"> (low, s4)
  code2 = BitwiseAnd (low_down, m3)
  low_right = BitShift <direction = "RIGHT"> (low, s2)
  code3 = BitwiseAnd (low_right, m48)
  third0_left = BitShift <direction = "LEFT"> (third, s2)
  third0 = BitwiseAnd (third0_left, m4)
  third1_left = BitShift <direction = "LEFT"> (third, s5)
  third1 = BitwiseAnd (third1_left, m64)
  third2 = BitwiseAnd (third, m4)
  third3_left = BitShift <direction = "LEFT"> (third, s3)
  third3 = BitwiseAnd (third3_left, m64)
  codes01 = BitwiseOr (code0, code1)
  thirds01 = BitwiseOr (third0, third1)
  byte0 = BitwiseOr (codes01, thirds01)
  codes23 = BitwiseOr (code2, code3)
  thirds23 = BitwiseOr (third2, third3)
  byte1 = BitwiseOr (codes23, thirds23)
  byte0_last = Unsqueeze (byte0, any)
  byte1_last = Unsqueeze (byte1, any)
  nibbles = Concat <axis = -1> (byte0_last, byte1_last)
  one = Constant <value_ints = [1]> ()
  two = Constant <value_ints = [2]> ()
  size_n = Constant <value_int : int = @block_size> ()
  size = Reshape (size_n, any)
  block_bytes = Div (size, two)
  code_shape = Concat <axis = 0> (any, blocks, block_bytes)
  all_codes = Reshape (nibbles, code_shape)
  more_blocks = Add (blocks, one)
  zero_bytes = Div (more_blocks, two)
  zero_shape = Concat <axis = 0> (end, zero_bytes)
  z = ConstantOfShape <value = uint8[1] {68}> (zero_shape)"""

# The third bits of a step, in the low four bits of its bytes: bit c is that of k mod 4 = c.
THIRDS = """
  low_nibble = Constant <value = uint8 {15}> ()
  nibble = Constant <value = uint8 {4}> ()
  before_last = Constant <value_ints = [-2]> ()
  even_steps = BitwiseAnd (thirds, low_nibble)
  odd_steps = BitShift <direction = "RIGHT"> (thirds, nibble)
  even_pairs = Unsqueeze (even_steps, before_last)
  odd_pairs = Unsqueeze (odd_steps, before_last)
  pairs = Concat <axis = -2> (even_pairs, odd_pairs)
  low_shape = Shape (low)
  third = Reshape (pairs, low_shape)"""

MATMUL_NBITS = "com.microsoft.MatMulNBits <K : int = @K, N : int = @N, BITS, block_size : int = @block_size, accuracy_level = 4>"
PRODUCT = f"out = {MATMUL_NBITS} (x, b, s, ZERO, , bias)"
PRODUCT_ZEROS = f"""
  product = {MATMUL_NBITS} (x, b, s, ZERO, , bias)
  wide_zeros = Cast <to = 1> (zero_points)
  zeros_by_output = Transpose <perm = [0, 2, 1]> (wide_zeros)
  all_zeros = Reshape (zeros_by_output, scale_shape)
  zeros = Slice (all_zeros, start, end, start)
  bits_n = Constant <value_int : int = @bits> ()
  bits_f = Cast <to = 1> (bits_n)
  half = Constant <value_float = 0.5> ()
  base = Constant <value_float = 2.0> ()
  codes_n = Pow (base, bits_f)
  middle = Mul (codes_n, half)
  shift = Sub (middle, zeros)
  shift_scaled = Mul (shift, s)
  k_n = Constant <value_int : int = @K> ()
  bs_n = Constant <value_int : int = @block_size> ()
  bs = Reshape (bs_n, any)
  k_1 = Reshape (k_n, any)
  whole = Mul (blocks, bs)
  missing = Sub (whole, k_1)
  pads = Concat <axis = 0> (start, start, start, missing)
  padded = Pad (x, pads)
  block_shape = Concat <axis = 0> (any, blocks, bs)
  by_block = Reshape (padded, block_shape)
  block_sums = ReduceSum <keepdims = 0> (by_block, any)
  corrections = Gemm <transB = 1> (block_sums, shift_scaled)
  out = Add (product, corrections)"""

EMBEDDING = """
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
  ZERO
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

EMBEDDING_ZEROS = """
  panel_zeros = Gather (zero_points, panel)
  zeros_by_lane = Transpose <perm = [0, 2, 1]> (panel_zeros)
  lane_zeros = GatherND <batch_dims = 1> (zeros_by_lane, index)
  wide_zeros = Cast <to = 1> (lane_zeros)
  zero = Unsqueeze (wide_zeros, last)"""


def matmul(bits: int, zeros: bool, whole: bool) -> str:
    """whole: N fills its panels."""
    text = MATMUL.replace("PANELS", PANELS_3.replace("THIRDS", THIRDS) if bits == 3 else PANELS)
    text = text.replace("PRODUCT", PRODUCT_ZEROS if zeros else PRODUCT).replace("CUT", CUTS[whole])
    return text.replace("BITS", "bits = 4" if bits == 3 else "bits : int = @bits").replace("ZERO", "z" if bits == 3 else "")


def embedding(bits: int, zeros: bool) -> str:
    middle = f"zero = Constant <value_float = {float(1 << (bits - 1))}> ()"
    return EMBEDDING.replace("UNPACK", _codes(bits)).replace("ZERO", EMBEDDING_ZEROS if zeros else middle)


def _codes(bits):
    """`code` from `bytes` [ids, blocks, steps, 4]: the codes of each byte, one after another."""
    if bits == 8:
        return "code = Identity (bytes)"
    if bits != 3:
        return fields("bytes", bits) + "\n  code = Identity (bytes_fields)"
    return "\n".join([
        "first_half, second_half, thirds = Split <axis = 2, num_outputs = 3> (bytes)",
        "low = Concat <axis = 2> (first_half, second_half)", THIRDS, fields("low", 2), fields("third", 1, of=4),
        "two = Constant <value = uint8 {2}> ()", 'high_fields = BitShift <direction = "LEFT"> (third_fields, two)',
        "code = BitwiseOr (low_fields, high_fields)"])


def fields(name: str, bits: int, of: int = 8) -> str:
    """`name`_fields: the fields of `bits` in the low `of` bits of each byte, lowest first, along a new axis, the one named `last`."""
    lines, made = [f"{name}_mask = Constant <value = uint8 {{{(1 << bits) - 1}}}> ()"], []
    for shift in range(0, of, bits):
        made.append(f"{name}_last{shift}")
        lines += [f"{name}_by{shift} = Constant <value = uint8 {{{shift}}}> ()",
                  f'{name}_moved{shift} = BitShift <direction = "RIGHT"> ({name}, {name}_by{shift})',
                  f"{name}_field{shift} = BitwiseAnd ({name}_moved{shift}, {name}_mask)",
                  f"{made[-1]} = Unsqueeze ({name}_field{shift}, last)"]
    return "\n  ".join([*lines, f"{name}_fields = Concat <axis = -1> ({', '.join(made)})"])
