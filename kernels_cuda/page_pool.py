"""Memory for pages of one format on the device, and one row of the table of pools: the counterpart of kernels_cpu/page_pool.py, where the
addresses of workers give way to the kinds of codes. Entries of page tables are the same."""
import numpy as np

from edgeattn.kernels_cuda import device
from edgeattn.page_formats import BITS, PageFormat

POOLS, RELEASED = 4, -1
BY_ROW, BY_TOKEN = 1, 2  # what K's parameters belong to; 0: there are none
(K, K_BYTES, K_PARAMS, K_PARAM_BYTES, V, V_BYTES, V_PARAMS, V_PARAM_BYTES, K_KIND, _, _, V_KIND, _, _, K_GAP, K_ROW, V_GAP, V_BLOCK, K_AXIS,
 V_QUANTISED, GROUPS, SEPARATED, SYMMETRIC, K_LEVELS, V_LEVELS, K_TWO_PLANES, K_THRESHOLD, K_REFRESH, FIELDS) = range(29)
KINDS = BITS | {"delta": 17}
ANY, HALVES, INT4, MIXED = range(4)  # caches, by the decode kernel that reads them (cached_attention.py)


class Pages:
    """`count` pages of one format, zeros.

    k, v                [count, bytes] uint8     codes, or floats
    k_params, v_params  [count, halves] uint16
    """

    def __init__(self, page_format: PageFormat, count: int):
        f, xp = page_format, device.cupy()
        self.format = f
        self.k, self.v = xp.zeros((count, f.k_bytes), np.uint8), xp.zeros((count, f.v_bytes), np.uint8)
        self.k_params, self.v_params = xp.zeros((count, f.k_params), np.uint16), xp.zeros((count, f.v_params), np.uint16)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.arrays().values())

    def arrays(self) -> dict:
        return {"k": self.k, "k_params": self.k_params, "v": self.v, "v_params": self.v_params}

    def table_row(self) -> np.ndarray:
        """[FIELDS] int64: addresses on the device, and sizes."""
        f, row = self.format, np.zeros(FIELDS, np.int64)
        for first, array in zip((K, K_PARAMS, V, V_PARAMS), self.arrays().values()):
            row[first], row[first + 1] = array.data.ptr if array.size else 0, array.strides[0] if array.size else 0
        row[K_KIND], row[V_KIND] = KINDS[f.k_type], KINDS[f.v_type]
        k_bits, v_bits = BITS[f.k_type], BITS[f.v_type]
        row[K_GAP] = f.delta_block if f.k_type == "delta" else 0
        row[K_THRESHOLD], row[K_REFRESH] = np.array([f.threshold, f.refresh], np.float32).view(np.int32)
        row[V_BLOCK] = 32 * v_bits // 8 if v_bits >= 16 else 32 * 4 * v_bits
        row[K_AXIS] = 0 if k_bits >= 16 else BY_ROW if f.k_axis == "channel" else BY_TOKEN
        row[V_QUANTISED], row[GROUPS], row[SEPARATED], row[SYMMETRIC] = v_bits < 16, f.groups, f.separated, f.one_group
        row[K_LEVELS], row[V_LEVELS] = 2 ** k_bits - 1 if k_bits < 16 else 0, 2 ** v_bits - 1 if v_bits < 16 else 0
        row[K_TWO_PLANES] = k_bits == 8
        return row


def make_table(pools: list[Pages]):
    """[POOLS, FIELDS] int64 on the device."""
    table = np.zeros((POOLS, FIELDS), np.int64)
    for i, pool in enumerate(pools):
        table[i] = pool.table_row()
    return device.cupy().asarray(table)


def kinds_of(formats: list[PageFormat]) -> int:
    """ANY, or which pages a cache can have at most: halves alone; these and int4; these and codes of any type, keys by channel."""
    def plain(f):
        codes = BITS[f.k_type] < 16 and BITS[f.v_type] < 16
        return codes and f.k_axis == "channel" and not f.one_group and not f.separated
    if formats[0].k_type != "f16" or formats[0].v_type != "f16" or not all(plain(f) for f in formats[1:]):
        return ANY
    types = {(f.k_type, f.v_type) for f in formats[1:]}
    return HALVES if not types else INT4 if types == {("int4", "int4")} else MIXED
