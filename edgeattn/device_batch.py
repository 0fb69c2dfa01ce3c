"""One forward call's arrays for a GPU: written in pinned memory and sent by one copy; page lists only where they have changed."""
import numpy as np

from edgeattn.batch import COUNTS, HELD, Batch
from edgeattn.kernels_cuda import device
from edgeattn.kernels_cuda.prefill_call import BLOCK_PLACE, CHUNK_FIELDS, PAGE_PLACE, QUERIES, WHOLE, list_ints, most_blocks
from edgeattn.page_formats import PAGE

ALIGNED = 64
TO_DEVICE = 1  # cudaMemcpyHostToDevice


class Pinned:
    """Pinned memory of the host, handed out from the beginning, and as much on the device, where arrays lie at the same offsets."""

    def __init__(self, size: int, on_device: bool = True):
        xp = device.cupy()
        self._memory = xp.cuda.alloc_pinned_memory(size)
        self.host = np.frombuffer(self._memory, np.uint8, size)
        self.host[:] = 0
        self.device = xp.zeros(size, np.uint8) if on_device else None
        self.used = 0

    def array(self, shape, dtype) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        found = self.host[self.used:self.used + size].view(dtype).reshape(shape)
        self.used += -(-size // ALIGNED) * ALIGNED
        return found

    def holds(self, array: np.ndarray) -> bool:
        return 0 <= array.ctypes.data - self.host.ctypes.data < self.host.size

    def address(self, array: np.ndarray) -> int:
        return self.device.data.ptr + array.ctypes.data - self.host.ctypes.data


class DeviceBatch(Batch):
    """Batch, whose arrays lie in Pinned memory: addresses are the device's. Slot counts and sealed pages of each sequence travel with them.

    slots    cached tokens of the longest sequence, new ones included
    sparse   whether some sequence reads what is selected
    listed   blocks of queries of prompts that read what lists say
    chunks   [sequences, CHUNK_FIELDS] int64, of those: where blocks and pages are numbered from, and how many last blocks read everything
    """

    def __init__(self, max_tokens: int, max_rows: int, max_sequences: int, cells: int, columns: int, stream, compensated: bool = False):
        """cells: (layer, KV head) pairs; columns: pages of a page list; compensated: whether caches keep means of what heads drop."""
        xp = device.cupy()
        fixed = 8 * (2 * max_tokens + max_rows + (len(HELD) + 2) * max_sequences + len(COUNTS)) + 4 * (max_sequences + 1)
        fixed += 8 * CHUNK_FIELDS * max_sequences
        with stream:
            self._memory = Pinned(fixed + 17 * ALIGNED + 2 * ALIGNED + 8 * max_sequences * cells)
        self._lists = Pinned(4 * cells * columns + ALIGNED, on_device=False)
        self._stream, self._sent = stream, xp.cuda.Event(disable_timing=True)
        self._prompts, self._cells, self._columns, self._compensated = None, cells, columns, compensated
        self._mirrors, self.slots, self.sparse, self.listed, self._listed_pages = [], 0, False, 0, 0
        super().__init__(max_tokens, max_rows, max_sequences)
        self.chunks = self._memory.array((max_sequences, CHUNK_FIELDS), np.int64)
        self._each = self._memory.array((max_sequences, 2, cells), np.int32)  # last: what no sequence uses is not sent

    def _array(self, length, dtype):
        return self._memory.array(length, dtype)

    def address(self, array: np.ndarray) -> int:
        return self._memory.address(array)

    def holds(self, array: np.ndarray) -> bool:
        return self._memory.holds(array)

    def arguments(self) -> dict[str, int]:
        """What CUDA kernels do not read is 0, which some of them look at."""
        none = (*(() if self._compensated else ("compensation",)), *(() if self.holds_lists else ("prefill_lists",)))
        return super().arguments() | {f"batch.{name}": 0 for name in none} | {"batch.chunks": self.address(self.chunks)}

    @property
    def holds_lists(self) -> bool:
        return self._prompts is not None

    @property
    def list_bytes(self) -> int:
        return self._prompts.nbytes if self.holds_lists else 0

    def hold_lists(self, kv_heads: int, columns: int = 0) -> None:
        """Make room for what prompts read (list_prompt): pages, and so many single keys of a KV head. ValueError: too much."""
        self._each_list = list_ints(kv_heads, self._columns, columns)
        if (size := most_blocks(tokens := len(self.token_ids)) * self._each_list) >= 1 << 31:  # places in lists are int32
            raise ValueError(f"--ubatch-size {tokens} is too large for lists of what prompts read among {self._columns * PAGE:,} tokens: "
                             "choose less, a smaller --ctx-size, or another --sparse-prefill")
        with self._stream:
            self._prompts = device.cupy().zeros(size, np.int32)

    def list_prompt(self, place: int, slots: int, tokens: int, whole: int) -> bool:
        """Have the newest `tokens` of the sequence at `place`, which holds `slots`, read what is chosen; the last `whole` blocks of them
        everything. False where there is no room for its pages: kernels' scratch is for as many as one sequence may have."""
        pages = -(-slots // PAGE)
        if self._listed_pages + pages > self._columns:
            return False
        about = self.chunks[place]
        about[BLOCK_PLACE], about[PAGE_PLACE], about[WHOLE] = self.listed, self._listed_pages, whole
        self.prefill_lists[place] = self._prompts.data.ptr + 4 * self._each_list * self.listed
        self.listed += -(-tokens // QUERIES)
        self._listed_pages += pages
        return True

    def clear(self) -> None:
        """The memory may be written once the last call's copies are done."""
        self._sent.synchronize()
        super().clear()
        self._mirrors, self.slots, self.sparse, self.listed, self._listed_pages, self._lists.used = [], 0, False, 0, 0, 0

    def add(self, sequence, token_ids, logit_rows, probes: int = 0, sparse: bool = False) -> None:
        super().add(sequence, token_ids, logit_rows, probes, sparse)
        self._mirrors.append(sequence.mirror)
        self.slots, self.sparse = max(self.slots, int(sequence.counts.max())), self.sparse or sparse

    def _place(self, sequence, name, n):
        if name not in ("counts", "sealed"):
            return sequence.mirror.address(name)
        place = self._each[n, int(name == "sealed")]
        place[:] = getattr(sequence, name).ravel()
        return self.address(place)

    def upload(self) -> None:
        """Enqueue the copies of all that this call brings."""
        runtime, used = device.cupy().cuda.runtime, int(self.state[COUNTS.index("sequences")])
        size = self._each[:used].nbytes + self._each.ctypes.data - self._memory.host.ctypes.data
        runtime.memcpyAsync(self._memory.device.data.ptr, self._memory.host.ctypes.data, size, TO_DEVICE, self._stream.ptr)
        for mirror in self._mirrors:
            mirror.upload(self._send, bool(self.state[COUNTS.index("probes")]))
        self._sent.record(self._stream)

    def _send(self, rows, first, last, address):
        width = last - first
        if self._lists.used + 4 * width * len(rows) + ALIGNED > self._lists.host.size:  # several sequences with long lists: in turns
            self._stream.synchronize()
            self._lists.used = 0
        part = self._lists.array((len(rows), width), np.int32)
        part[:] = rows[:, first:last]
        device.cupy().cuda.runtime.memcpy2DAsync(address + 4 * first, 4 * rows.shape[1], part.ctypes.data, 4 * width, 4 * width, len(rows),
                                                 TO_DEVICE, self._stream.ptr)
