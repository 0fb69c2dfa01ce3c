"""What the formats of quantised checkpoints share: codes in words of 32 bits, groups that become blocks of ours."""
from collections.abc import Callable

import numpy as np

from edgeattn.exporters.checkpoint import Quantised, Weight

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256  # of K: what our operators take, in powers of two


def unpack_words(words: np.ndarray, bits: int) -> np.ndarray:
    """
    words  [n, width]              int32: a stream of codes down every column, low bits first; a code may lie across two words
    ->     [n * 32 / bits, width]  uint8
    """
    stream = words.view(np.uint32).astype(np.uint64)
    stream[:-1] |= stream[1:] << np.uint64(32)
    at = np.arange(len(words) * 32 // bits, dtype=np.uint64) * np.uint64(bits)
    codes = stream[(at // np.uint64(32)).astype(np.intp)] >> (at % np.uint64(32))[:, None]
    return (codes & np.uint64((1 << bits) - 1)).astype(np.uint8)


def grouped(shape: tuple[int, int], bits: int, group: int, read: Callable, kind: str, order: np.ndarray | None = None) -> Weight:
    """A weight of codes in groups along K, which `read` gives as Quantised.read does. They stay codes where blocks of ours can
    hold them: in groups that a power of two from 16 to 256 divides, whose scales are then repeated, or one group for all of K."""
    k, widest = shape[1], group >= shape[1]
    block = min(group & -group, LARGEST_BLOCK)  # the largest power of two in it
    if block < SMALLEST_BLOCK and widest:
        block = LARGEST_BLOCK
    stored_as = f"{kind} {bits} bits, groups of {min(group, k)}"
    if block < SMALLEST_BLOCK:
        return Weight(shape, Quantised(bits, group, read, order).rows, None, stored_as)
    times, blocks = -(-group // block), -(-k // block)

    def blocked(start, stop):
        codes, scales, zeros = read(start, stop)
        return (codes, *(x if x is None else np.repeat(x, times, axis=1)[:, :blocks] for x in (scales, zeros)))
    quantised = Quantised(max(bits, 2), block, blocked if times > 1 else read, order)
    if bits == 3 and block == SMALLEST_BLOCK:  # for which matmul_nbits has no panels
        quantised = quantised.widen(4, block)
    return Weight(shape, quantised.rows, quantised, stored_as)
