"""Memory for pages of one format, and what compiled code needs to reach them: one row of the table of pools.

A page table's entry names a page: its number in its pool times POOLS, plus the pool's number; RELEASED marks one that is gone.
"""
from importlib import import_module

import numpy as np
from numba import int64, njit

from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import aligned
from edgeattn.page_formats import BITS, PageFormat

POOLS, RELEASED = 4, -1
BY_ROW, BY_TOKEN = 1, 2  # what K's parameters belong to; 0: there are none
(K, K_BYTES, K_PARAMS, K_PARAM_BYTES, V, V_BYTES, V_PARAMS, V_PARAM_BYTES, K_ADD, K_EXPAND, K_PACK, V_ADD, V_EXPAND, V_PACK,
 K_GAP, K_ROW, V_GAP, V_BLOCK, K_AXIS, V_QUANTISED, GROUPS, SEPARATED, SYMMETRIC, K_LEVELS, V_LEVELS, K_TWO_PLANES, K_THRESHOLD, K_REFRESH,
 FIELDS) = range(29)


class Pages:
    """`count` pages of one format. Memory is touched only as pages are used.

    k, v                [count, bytes] uint8     codes, or floats
    k_params, v_params  [count, halves] uint16   their own arrays, so that a selection reads them without the codes
    """

    def __init__(self, page_format: PageFormat, count: int):
        f = self.format = page_format
        self.k, self.v = aligned((count, f.k_bytes), np.uint8), aligned((count, f.v_bytes), np.uint8)
        self.k_params, self.v_params = aligned((count, f.k_params), np.uint16), aligned((count, f.v_params), np.uint16)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        return {"k": self.k, "k_params": self.k_params, "v": self.v, "v_params": self.v_params}

    def table_row(self) -> np.ndarray:
        """[FIELDS] int64: addresses and sizes. Compiles the types' workers where that has not happened yet."""
        f, row = self.format, np.zeros(FIELDS, np.int64)
        for first, array in zip((K, K_PARAMS, V, V_PARAMS), self.arrays().values()):
            row[first], row[first + 1] = array.ctypes.data, array.strides[0]
        for first, kind in ((K_ADD, f.k_type), (V_ADD, f.v_type)):
            module = import_module(f"edgeattn.kernels_cpu.page_{kind}")
            row[first:first + 3] = [getattr(module, name).compiled.address if hasattr(module, name) else 0
                                    for name in ("add", "expand", "pack")]
        k_bits, v_bits = BITS[f.k_type], BITS[f.v_type]
        first_plane = {3: 8, 8: 16}  # bytes a row, where there is a second one
        row[K_ROW] = first_plane.get(k_bits, 4 * k_bits)
        row[K_GAP] = f.delta_block if f.k_type == "delta" else 32 if k_bits >= 16 else row[K_ROW] * f.head_dim
        row[K_THRESHOLD], row[K_REFRESH] = np.array([f.threshold, f.refresh], np.float32).view(np.int32)
        row[V_GAP] = f.width if v_bits >= 16 else first_plane.get(v_bits, 4 * v_bits) * 32
        row[V_BLOCK] = 32 * v_bits // 8 if v_bits >= 16 else 32 * 4 * v_bits
        row[K_AXIS] = 0 if k_bits >= 16 else BY_ROW if f.k_axis == "channel" else BY_TOKEN
        row[V_QUANTISED], row[GROUPS], row[SEPARATED], row[SYMMETRIC] = v_bits < 16, f.groups, f.separated, f.one_group
        row[K_LEVELS], row[V_LEVELS] = 2 ** k_bits - 1 if k_bits < 16 else 0, 2 ** v_bits - 1 if v_bits < 16 else 0
        row[K_TWO_PLANES] = k_bits == 8
        return row


@njit(nogil=True, error_model="numpy")
def pool_of(pools, entry):
    """The row of an entry's pool, from the address of the table."""
    return at(int64, pools + 8 * FIELDS * (entry & POOLS - 1))


@njit(nogil=True, error_model="numpy")
def field_at(pool, field, entry):
    """Address of a page's codes or parameters."""
    return pool[field] + (entry >> 2) * pool[field + 1]
