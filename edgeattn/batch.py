"""One forward call as arrays in fixed memory: which token, where it stands, whose it is, where its K and V go."""
import numpy as np

from edgeattn.cache.kv_cache import Sequence

COUNTS = ("tokens", "rows", "sequences")  # run-time counts, by their index in `state`


class Batch:
    """
    token_ids    [tokens]                  int64
    positions    [tokens]                  int64, row of the rotary tables
    slots        [tokens]                  int32, physical page * page_size + offset
    row_starts   [sequences + 1]           int32, rows of sequence s are row_starts[s] .. row_starts[s + 1]
    kv_lengths   [sequences]               int32, cached tokens, the new ones included
    page_tables  [sequences, max_pages]    int32, physical page of each logical page
    logit_rows   [rows]                    int64, rows of the hidden state that need logits
    state        [3]                       int64, the counts
    Addresses never change, so that kernels (and CUDA graphs) hold them.
    """

    def __init__(self, max_tokens: int, max_rows: int, max_sequences: int, max_pages: int):
        self.token_ids, self.positions = np.zeros(max_tokens, np.int64), np.zeros(max_tokens, np.int64)
        self.slots = np.zeros(max_tokens, np.int32)
        self.row_starts, self.kv_lengths = np.zeros(max_sequences + 1, np.int32), np.zeros(max_sequences, np.int32)
        self.page_tables = np.zeros((max_sequences, max_pages), np.int32)
        self.logit_rows = np.zeros(max_rows, np.int64)
        self.state = np.zeros(len(COUNTS), np.int64)

    def arguments(self) -> dict[str, int]:
        """Addresses under the names used in ARGS."""
        arrays = {f"batch.{name}": getattr(self, name).ctypes.data
                  for name in ("positions", "slots", "row_starts", "kv_lengths", "page_tables")}
        return arrays | {"batch.page_tables.stride": self.page_tables.shape[1], "batch.sequences": COUNTS.index("sequences")}

    def clear(self) -> None:
        self.state[:] = 0

    def add(self, sequence: Sequence, token_ids: np.ndarray, slots: np.ndarray, logit_rows: np.ndarray) -> None:
        """Add the newest tokens of a sequence (already appended to the cache); `logit_rows` index into token_ids."""
        tokens, rows, n = (int(x) for x in self.state)
        count, end = len(token_ids), tokens + len(token_ids)
        self.token_ids[tokens:end] = token_ids
        self.positions[tokens:end] = np.arange(sequence.length - count, sequence.length)
        self.slots[tokens:end] = slots
        self.row_starts[n], self.row_starts[n + 1] = tokens, end
        self.kv_lengths[n] = sequence.length
        self.page_tables[n, :len(sequence.pages)] = sequence.pages
        self.logit_rows[rows:rows + len(logit_rows)] = logit_rows + tokens
        self.state[:] = end, rows + len(logit_rows), n + 1
