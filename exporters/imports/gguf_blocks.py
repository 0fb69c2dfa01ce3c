"""The block types of GGUF files (ggml's layouts) as codes, scales and zero points: w = (code - zero) * scale.

Every one of them is affine in groups of 16, 32 or 256, so none needs quantising again. q4_0, q8_0, q5_0 and the ternary tq1_0 and
tq2_0 carry over exactly. The others multiply a float16 scale by a whole number (q2_K ... q6_K) or have a minimum (q4_1, q5_1,
q2_K, q4_K, q5_K), which becomes a zero point that is no whole number: rounding those to float16 changes weights by 0.02 to 0.05 %,
root mean square. 5 and 6 bits are held in 8.
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edgeattn.exporters.imports.gguf_file import Block

LARGEST_ZERO = 65504.0  # of float16


@dataclass(frozen=True)
class Codes(Block):
    """A block of codes. decode(bytes [n, bytes]) -> codes [n, elements] uint8, scales [n, elements / group] float32, zero points
    alike, or None for 2**(bits - 1)."""
    bits: int
    group: int
    decode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def _half(raw):
    """Pairs of bytes as float32."""
    return np.ascontiguousarray(raw).view(np.float16).astype(np.float32)


def _fields(raw, bits, run):
    """Codes of `bits` in runs of `run` bytes: all the lowest fields of a run, then all the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (raw.reshape(len(raw), -1, 1, run) >> shifts & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _affine(codes, scales, minima):
    """Codes under w = code * scale - minimum. Where the codes say next to nothing, the minimum alone is kept."""
    flat = np.abs(minima) >= LARGEST_ZERO * np.abs(scales)
    zeros = np.divide(minima, scales, out=np.ones_like(scales), where=~flat)
    codes = np.where(np.repeat(flat, codes.shape[1] // flat.shape[1], axis=1), np.uint8(0), codes)
    return codes, np.where(flat, minima, scales), zeros


def _q4_0(raw):
    return _fields(raw[:, 2:], 4, 16), _half(raw[:, :2]), None


def _q4_1(raw):
    return _affine(_fields(raw[:, 4:], 4, 16), _half(raw[:, :2]), -_half(raw[:, 2:4]))


def _fifth(raw):
    """The fifth bits of 32 codes, in place: one bit each, in 4 bytes."""
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _q5_0(raw):
    return (_fields(raw[:, 6:], 4, 16) | _fifth(raw[:, 2:6])) + np.uint8(128 - 16), _half(raw[:, :2]), None


def _q5_1(raw):
    return _affine(_fields(raw[:, 8:], 4, 16) | _fifth(raw[:, 4:8]), _half(raw[:, :2]), -_half(raw[:, 2:4]))


def _q8_0(raw):
    return raw[:, 2:] ^ np.uint8(128), _half(raw[:, :2]), None


def _q2_k(raw):
    scales, minima = (raw[:, :16] & np.uint8(15)) * _half(raw[:, 80:82]), (raw[:, :16] >> np.uint8(4)) * _half(raw[:, 82:84])
    return _affine(_fields(raw[:, 16:80], 2, 32), scales, minima)


def _q3_k(raw):
    high, packed = _fields(raw[:, :32], 1, 32) << np.uint8(2), raw[:, 96:108]
    scales = (_fields(packed[:, :8], 4, 8) | _fields(packed[:, 8:], 2, 4) << np.uint8(4)).astype(np.int8) - np.int8(32)
    return _fields(raw[:, 32:96], 2, 32) | high, scales * _half(raw[:, 108:110]), None


def _scales_and_minima(raw):
    """q4_K's and q5_K's first 16 bytes: two factors, and 8 scales and 8 minima of 6 bits. The first four of each are whole; the
    others have their low halves together in the last four bytes and their high bits above the first ones."""
    scales, minima, low = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
    six, high = np.uint8(63), np.uint8(48)
    scales, minima = (np.concatenate([first & six, last | first >> np.uint8(2) & high], axis=1)
                      for first, last in ((scales, low & np.uint8(15)), (minima, low >> np.uint8(4))))
    return scales * _half(raw[:, :2]), minima * _half(raw[:, 2:4])


def _q4_k(raw):
    return _affine(_fields(raw[:, 16:], 4, 32), *_scales_and_minima(raw))


def _q5_k(raw):
    return _affine(_fields(raw[:, 48:], 4, 32) | _fields(raw[:, 16:48], 1, 32) << np.uint8(4), *_scales_and_minima(raw))


def _q6_k(raw):
    codes = _fields(raw[:, :128], 4, 64) | _fields(raw[:, 128:192], 2, 32) << np.uint8(4)
    return codes + np.uint8(128 - 32), raw[:, 192:208].view(np.int8) * _half(raw[:, 208:210]), None


def _tq1_0(raw):
    """Five trits a byte as a fraction of 256: each trit is what times three carries over; the last four bytes hold four."""
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [(raw[:, None, first:last] * powers[:trits]).reshape(len(raw), -1)
             for first, last, trits in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    trits = np.concatenate(parts, axis=1).astype(np.uint16) * np.uint16(3) >> np.uint16(8)
    return trits.astype(np.uint8) + np.uint8(1), _half(raw[:, 52:54]), None


def _tq2_0(raw):
    trits = _fields(raw[:, :64], 2, 32)
    if (trits == 3).any():
        raise ValueError("a tq2_0 tensor holds codes that are no trits; the file is damaged")
    return trits + np.uint8(1), _half(raw[:, 64:66]), None


FLOATS = {0: Block("F32", 1, 4), 1: Block("F16", 1, 2), 30: Block("BF16", 1, 2)}
TYPES = FLOATS | {
    2: Codes("q4_0", 32, 18, 4, 32, _q4_0), 3: Codes("q4_1", 32, 20, 4, 32, _q4_1), 6: Codes("q5_0", 32, 22, 8, 32, _q5_0),
    7: Codes("q5_1", 32, 24, 8, 32, _q5_1), 8: Codes("q8_0", 32, 34, 8, 32, _q8_0), 10: Codes("q2_K", 256, 84, 2, 16, _q2_k),
    11: Codes("q3_K", 256, 110, 3, 16, _q3_k), 12: Codes("q4_K", 256, 144, 4, 32, _q4_k), 13: Codes("q5_K", 256, 176, 8, 32, _q5_k),
    14: Codes("q6_K", 256, 210, 8, 16, _q6_k), 34: Codes("tq1_0", 256, 54, 2, 256, _tq1_0), 35: Codes("tq2_0", 256, 66, 2, 256, _tq2_0)}
OTHERS = {16: "iq2_xxs", 17: "iq2_xs", 18: "iq3_xxs", 19: "iq1_s", 20: "iq4_nl", 21: "iq3_s", 22: "iq2_s", 23: "iq4_xs", 29: "iq1_m",
          39: "mxfp4", 40: "nvfp4"}  # known by name, but not affine
