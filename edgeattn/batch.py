"""One forward call as arrays in fixed memory: which token, where it stands, whose it is, and where that one's pages are."""
import numpy as np

from edgeattn.cache.sequence import Sequence

# arrays of a Sequence, by the names in ARGS
HELD = {"page_tables": "tables", "slot_counts": "counts", "sealed": "sealed", "attention_mass": "mass", "compensation": "compensation",
        "confidence": "confidence", "index": "index", "indexed": "indexed", "value_sums": "value_sums"}
COUNTS = ("tokens", "rows", "sequences", "probes")  # run-time counts, by their index in `state`


class Batch:
    """
    token_ids    [tokens]                  int64
    positions    [tokens]                  int64, row of the rotary tables
    row_starts   [sequences + 1]           int32, rows of sequence s are row_starts[s] .. row_starts[s + 1]
    page_tables, slot_counts, sealed, attention_mass, compensation, confidence, index, indexed, value_sums
                 [sequences] int64: addresses of the arrays of cache/sequence.py, 0 where there is none; the counts include the new tokens
    selections   [sequences] int64, the same; 0: the sequence reads everything
    prefill_lists  [sequences] int64, the same for what a chunk of a prompt reads, which each layer writes anew (prefill_scheduler.py)
    logit_rows   [rows]                    int64, rows of the hidden state that need logits
    state        [4]                       int64, the counts; probes: how many last rows of each sequence are probed for attention
    list_bytes   memory that lists of prompts have beside it: a GPU's
    Addresses never change, so that kernels (and CUDA graphs) hold them.
    """
    list_bytes = 0

    def __init__(self, max_tokens: int, max_rows: int, max_sequences: int):
        new = self._array
        self.token_ids, self.positions = new(max_tokens, np.int64), new(max_tokens, np.int64)
        self.row_starts = new(max_sequences + 1, np.int32)
        self.held = {name: new(max_sequences, np.int64) for name in HELD}
        self.selections, self.prefill_lists = new(max_sequences, np.int64), new(max_sequences, np.int64)
        self.logit_rows = new(max_rows, np.int64)
        self.state = new(len(COUNTS), np.int64)

    def _array(self, length, dtype):
        return np.zeros(length, dtype)

    def address(self, array: np.ndarray) -> int:
        """Where kernels find an array of this batch."""
        return array.ctypes.data

    def arguments(self) -> dict[str, int]:
        """Addresses under the names used in ARGS."""
        arrays = {"positions": self.positions, "row_starts": self.row_starts, "selections": self.selections,
                  "prefill_lists": self.prefill_lists} | self.held
        counts = {f"batch.{count}": COUNTS.index(count) for count in ("sequences", "probes")}
        return {f"batch.{name}": self.address(array) for name, array in arrays.items()} | counts

    def _place(self, sequence, name, n) -> int:
        """Where kernels find an array of the n-th sequence; 0: it has none."""
        array = getattr(sequence, name)
        return 0 if array is None else array.ctypes.data

    def clear(self) -> None:
        self.state[:] = 0

    def add(self, sequence: Sequence, token_ids: np.ndarray, logit_rows: np.ndarray, probes: int = 0, sparse: bool = False) -> None:
        """Add the newest tokens of a sequence (already appended to the cache); `logit_rows` index into token_ids. sparse: attention
        reads what is selected."""
        tokens, rows, n, probed = (int(x) for x in self.state)
        count, end = len(token_ids), tokens + len(token_ids)
        self.token_ids[tokens:end] = token_ids
        self.positions[tokens:end] = np.arange(sequence.length - count, sequence.length)
        self.row_starts[n], self.row_starts[n + 1] = tokens, end
        for name, place in self.held.items():
            place[n] = self._place(sequence, HELD[name], n)
        self.prefill_lists[n] = 0
        self.selections[n] = self._place(sequence, "selection", n) if sparse else 0
        self.logit_rows[rows:rows + len(logit_rows)] = logit_rows + tokens
        self.state[:] = end, rows + len(logit_rows), n + 1, max(probed, probes)
