"""Load an exported folder and run it: prefill and decode of any number of sequences through one forward call."""
from pathlib import Path

import numba
import numpy as np
import psutil

from edgeattn.cache.budget import choose_types
from edgeattn.cache.kv_cache import KVCache
from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull
from edgeattn.cache.sequence import Sequence
from edgeattn.calibration import head_classes
from edgeattn.devices import make_backend
from edgeattn.exported import check_graph, check_logits, read_config
from edgeattn.graph import read_graph
from edgeattn.plan import Plan
from edgeattn.prefill_scheduler import PrefillOptions, PrefillScheduler, refusal as prefill_refusal
from edgeattn.rebuild import recall
from edgeattn.scheduler import Scheduler, SparseOptions, refusal

MAX_SEQUENCES = 64
LOGITS_BYTES = 64 << 20  # rows of logits are limited to this much at a time


class Model:
    """An exported model, ready to run. Not thread-safe: one forward call at a time.

    ctx_size is how many tokens the cache holds, over all sequences; ubatch how many are computed at once in prefill.
    """

    def __init__(self, folder, cache: CacheOptions | None = None, ctx_size: int | None = None, ubatch: int | None = None,
                 threads: int | None = None, sparse: SparseOptions | None = None, prefill: PrefillOptions | None = None, progress=None,
                 device: str = "cpu"):
        """cache: how keys and values are kept; the export's KV type by default, with room for ctx_size tokens.
        sparse: what decode steps read; prefill: what prompts read. By default "auto" chooses.
        progress(operator, done, total) is called while kernels are compiled or read from the kernel cache.
        device: "cpu", "cuda", or "auto": cuda where a GPU can be used.

        ValueError: the folder is not a complete export, an option is out of range, or the device cannot do what is asked.
        """
        for name, value in (("ctx_size", ctx_size), ("ubatch", ubatch)):
            if value is not None and (not isinstance(value, (int, np.integer)) or value < 0):
                raise ValueError(f"{name} must be a whole number of tokens, got {value!r}")
        self.folder = Path(folder)
        self.config = read_config(self.folder)
        about, defaults = self.config["model"], self.config["defaults"]
        graph = read_graph(self.folder)
        check_graph(graph, about)  # before anything is allocated for what the model says of itself
        self.vocab_size = about["vocab_size"]
        self.ctx_size = min(ctx_size or about["ctx_size"], about["ctx_size"])
        self.backend = make_backend(device)
        tuned = self.backend.tuned(self.config, bool(cache and cache.budget))
        self.ubatch = min(ubatch or tuned.get("ubatch") or defaults["ubatch"], self.ctx_size)
        most = numba.config.NUMBA_NUM_THREADS
        self.threads = threads or min(tuned.get("threads") or defaults["threads"] or psutil.cpu_count(logical=False) or most, most)
        if not 1 <= self.threads <= most:
            raise ValueError(f"threads must be 1 to {most} (this machine's cores), got {self.threads}")
        numba.set_num_threads(self.threads)  # kernels' scratch is sized for this many
        shape = about["num_layers"], about["kv_heads"], about["head_dim"], self.ctx_size
        sparse, prefill = sparse or SparseOptions(), prefill or PrefillOptions()
        self.device = self.backend.device
        self.backend.check(options := cache or CacheOptions(), about, graph.proto.graph.node)
        classes = None if options.heads == "none" else head_classes(self.folder, self.config, options.retrieval)
        selection, self.scheduler = None, None if sparse.method == "off" else Scheduler(sparse, *shape[:2])
        if self.scheduler:
            self.scheduler.load(self.folder, self.config)
            selection = self.scheduler.selection_plan(self.ctx_size)
        options = choose_types(options, defaults["kv_type"], *shape, self.ubatch, classes, selection)
        dense_because, whole_because = self.backend.gives_way(options, sparse, prefill, about, *shape, self.ubatch, classes)
        why = self.scheduler and (dense_because or refusal(self.scheduler.policy, options, about["window"]))
        if why and sparse.method != "auto":
            raise ValueError(f"--sparse-attention {sparse.method}: {why}: use --sparse-attention off")
        if not why and self.scheduler and self._never_sparse():
            why = f"it would read all of the {self.ctx_size:,} tokens that the context holds"
        self.dense_because = why
        if why:
            self.scheduler = selection = None
        if options.moves_slots and about["window"]:
            raise ValueError("this model has sliding windows, whose positions eviction, head classes and sorted pages would lose: use "
                             "--kv-eviction none, --kv-heads none and --kv-storage kivi")
        policy = self.scheduler and self.scheduler.policy
        if options.moves_slots and policy and (policy.shared or policy.combine != "head"):
            several = "layers and heads" if policy.shared else "heads"
            raise ValueError(f"{sparse.method} selects pages for several {several} at once, which eviction, head classes and sorted pages "
                             "would tell apart: use --kv-eviction none, --kv-heads none and --kv-storage kivi")
        self.prefill = self._prefill(prefill, whole_because or prefill_refusal(prefill.policy(), options, about["window"]), about)
        self.cache = KVCache(*shape, options, self.ubatch, classes, selection, self.backend)
        self.ubatch, self.ctx_size = self.cache.plan.chunk, self.cache.capacity
        if self.prefill and prefill.min_len is None and self.device != "cpu":
            self.prefill.min_len = self.backend.lists_from(self.prefill.policy, 4 * self.ubatch * about["num_heads"] * about["head_dim"])
        elif self.prefill and prefill.min_len is None and not self.prefill.reads_all(self.ctx_size):
            from edgeattn.prefill_crossover import settle as begin_prefill  # loads the kernels of lists
            begin_prefill(self.prefill, options, about["num_heads"], about["kv_heads"], about["head_dim"], self.threads)
        if self.prefill and prefill.method == "auto" and (self.ctx_size <= self.prefill.min_len or self.prefill.reads_all(self.ctx_size)):
            self.whole_because = f"no prompt in a context of {self.ctx_size:,} tokens is long enough for it"
            self.prefill = None  # a kernel more would be compiled for nothing
        self._max_rows = max(1, min(self.ubatch, LOGITS_BYTES // (4 * self.vocab_size)))
        self._batch, self._sampler = self.backend.batch(self.ubatch, self._max_rows, MAX_SEQUENCES, self.cache), None
        if self.scheduler:
            self.scheduler.prepare(MAX_SEQUENCES, self.cache.plan.max_pages, None if self.device == "cpu" else self.backend)
            if sparse.min_len is None and self.device != "cpu":
                token_bytes = self.cache.read_bytes(self.ctx_size) / self.ctx_size / about["num_layers"]
                self.scheduler.min_len = self.backend.sparse_from(self.scheduler.policy, token_bytes, self.cache.plan.formats)
            elif sparse.min_len is None:
                from edgeattn.crossover import settle  # loads the kernels of selections
                settle(self.scheduler, options, about["num_heads"], about["head_dim"], self.threads)
        if self.prefill and self.device != "cpu":
            self.prefill.prepare(self.backend, self._batch, self.cache.plan.max_pages, about["num_heads"] // about["kv_heads"])
        self.plan = self._plan(graph, progress)

    def _prefill(self, prefill, refused, about):
        """The scheduler of prompts, or None; `whole_because` says why auto gave way."""
        self.whole_because = "" if prefill.method == "off" else refused
        if prefill.method == "off" or self.whole_because and prefill.method == "auto":
            return None
        if self.whole_because:
            raise ValueError(f"--sparse-prefill {prefill.method}: {self.whole_because}: use --sparse-prefill off")
        made = PrefillScheduler(prefill, about["num_layers"], about["kv_heads"])
        made.load(self.folder, self.config)
        return made

    def _never_sparse(self):
        """Whether auto would select all that the context can hold, and so costs memory for nothing."""
        return self.scheduler.options.method == "auto" and self.scheduler.policy.tokens(self.ctx_size) >= self.ctx_size

    @classmethod
    def load(cls, folder, **options) -> "Model":
        return cls(folder, **options)

    def _plan(self, graph, progress):
        batch = self._batch
        inputs = {"token_ids": batch.token_ids, "positions": batch.positions, "logit_rows": batch.logit_rows}
        counts = {"tokens": self.ubatch, "rows": self._max_rows, "sequences": MAX_SEQUENCES, "probes": 0}
        before = [found.operators for found in (self.scheduler, self.prefill) if found]
        plan = Plan(graph, lambda layer: [one for operators in before for one in operators(layer)], batch.arguments(),
                    self._layer_arguments, inputs, counts, self.threads, progress, self.backend)
        check_logits(graph, plan.values, self.config["model"])
        return plan

    def _layer_arguments(self, layer):
        own = self.backend.cache_arguments(self.cache.plan.formats) | {"prefill.sparse": int(self.prefill is not None)}
        return (self.cache.arguments(layer) | own | (self.prefill.arguments() if self.prefill else {})
                | (self.scheduler.arguments(layer) if self.scheduler else {"selection.group": -1}))

    # ---- sequences ----------------------------------------------------------------------------------------------
    def new_sequence(self) -> Sequence:
        return self.cache.new_sequence()

    def fork(self, sequence: Sequence) -> Sequence:
        """A second sequence with the same tokens so far; pages are shared until written."""
        return self.cache.fork(sequence)

    def truncate(self, sequence: Sequence, length: int) -> int:
        """Forget the tokens from `length` on -> the length that is left: fewer where a quantised page goes as a whole, none where
        tokens before were evicted meanwhile. The caller computes the difference again."""
        return self.cache.truncate(sequence, length)

    def free(self, sequence: Sequence) -> None:
        self.cache.truncate(sequence, 0)

    # ---- running ------------------------------------------------------------------------------------------------
    def forward(self, work: list[tuple[Sequence, np.ndarray]], logit_rows: str = "last", fetch: bool = True) -> np.ndarray:
        """Append tokens to sequences and compute them, in chunks of at most `ubatch` tokens.

        work        (sequence, token ids) pairs; a sequence at most once
        logit_rows  "last" (one row a sequence), "all" (every token) or "none"
        fetch       False, for one sequence: logits stay on the device that made them, and nothing waits for them
        ->          [rows, vocab] float32, in the order of `work`; a fresh array. Not fetched, a list of device_sampling.py's LogitsRow
        ValueError for nothing to compute or an unknown token id; CacheFull when the cache is full: then sequences are truncated to
        their former lengths (see `truncate`).
        """
        numba.set_num_threads(self.threads)  # Numba keeps the number per thread, and another model may have set its own
        work = [(sequence, np.asarray(ids).ravel()) for sequence, ids in work]
        self._check(work, logit_rows)
        work = [(sequence, ids.astype(np.int64, copy=False)) for sequence, ids in work]
        lengths = [sequence.length for sequence, _ in work]
        try:
            if self.cache.options.releases:
                self._note_tokens(work)
            return self._run_chunks(work, logit_rows, fetch or self.device == "cpu")
        except BaseException:  # also Ctrl-C: a half-computed chunk must not stay in the cache
            for (sequence, _), length in zip(work, lengths):
                self.cache.truncate(sequence, length)
            raise

    def _run_chunks(self, work, logit_rows, fetch):
        found = []
        for chunk in self._chunks(work, logit_rows):
            self._batch.clear()
            listed = []
            for place, (i, start, end, rows) in enumerate(chunk):
                sequence, ids = work[i]
                self.cache.append(sequence, end - start)
                sparse = self.scheduler is not None and len(ids) == 1 and self.scheduler.wants(sequence.length)
                if self.prefill and len(ids) > 1 and self.prefill.wants(sequence, end - start, end == len(ids)):
                    listed.append((place, sequence, int(self._batch.state[0]), end - start, end == len(ids)))
                self._batch.add(sequence, ids[start:end], rows, self.cache.probes_for(sequence, end - start), sparse)
            self.plan.run(self._batch.state, self.prefill.between(self._batch, listed, self._choose) if listed else None)
            for i, start, end, _ in chunk:
                self.cache.settle(work[i][0], end - start)
            if fetch:
                found.append(self.plan.read("logits", self._batch.state))
        if not fetch:
            return self._logits_in_place()
        return found[0] if len(found) == 1 else np.concatenate(found)  # chunks follow the order of `work`

    def _logits_in_place(self):
        """The last chunk's rows of logits, on the device."""
        from edgeattn.device_sampling import DeviceSampler, LogitsRow
        logits = self.plan.tensor("logits")
        if self._sampler is None:
            self._sampler = DeviceSampler(self.vocab_size, self.config["model"]["ctx_size"] + 1, self.backend.stream)
        return [LogitsRow(self._sampler, logits.address + 4 * logits.stride * row) for row in range(int(self._batch.state[1]))]

    def wait(self) -> None:
        """Until everything that was asked for is computed; a forward call that fetches its logits has waited."""
        self.backend.wait()

    def _choose(self, listed, layer):
        self.prefill.choose(layer, self.cache, self._batch, listed, *self.attention_inputs(layer))

    def _note_tokens(self, work):
        """Keep the ids, from which released pages are rebuilt, and rebuild what a new prompt is about."""
        for sequence, ids in work:
            if len(ids) > 1 and sequence.answered:
                recall(self, sequence, ids)
            sequence.token_ids[sequence.length:sequence.length + len(ids)] = ids
            sequence.answered = len(ids) == 1

    def compute(self, sequence: Sequence, ids: np.ndarray, before_attention=None) -> None:
        """Append tokens and compute their keys and values, nothing else: the cache does not settle, so that truncate() undoes it.
        before_attention: as in Plan.run."""
        for start in range(0, len(ids), self.ubatch):
            piece = ids[start:start + self.ubatch]
            self.cache.append(sequence, len(piece))
            self._batch.clear()
            self._batch.add(sequence, np.asarray(piece), np.arange(0))
            self.plan.run(self._batch.state, before_attention)

    def attention_inputs(self, layer: int) -> tuple[dict[str, np.ndarray], dict]:
        """Plan.attention_inputs of the call that is running."""
        return self.plan.attention_inputs(layer, self._batch.state)

    def _chunks(self, work, logit_rows):
        """Lists of (index into work, start, end, rows that need logits) that fit one batch."""
        chunk, tokens, rows = [], 0, 0
        for i, (_, ids) in enumerate(work):
            start = 0
            while start < len(ids):
                room = self.ubatch - tokens
                if logit_rows == "all":
                    room = min(room, self._max_rows - rows)
                if room <= 0 or len(chunk) == MAX_SEQUENCES or (rows == self._max_rows and logit_rows != "none"):
                    yield chunk
                    chunk, tokens, rows = [], 0, 0
                    continue
                end = min(len(ids), start + room)
                wanted = {"all": np.arange(end - start), "none": np.arange(0),
                          "last": np.arange(end - start)[-1:] if end == len(ids) else np.arange(0)}[logit_rows]
                chunk.append((i, start, end, wanted))
                tokens, rows, start = tokens + end - start, rows + len(wanted), end
        if chunk:
            yield chunk

    def _check(self, work, logit_rows):
        if logit_rows not in ("last", "all", "none"):
            raise ValueError(f"logit_rows must be last, all or none, got {logit_rows!r}")
        if not work:
            raise ValueError("no sequences to compute: give at least one (sequence, token ids) pair")
        if len({id(sequence) for sequence, _ in work}) != len(work):
            raise ValueError("a sequence may stand only once in a forward call; join its tokens")
        for sequence, ids in work:
            if sequence.length + len(ids) > self.ctx_size:
                raise CacheFull(f"context is full: {sequence.length} tokens and {len(ids)} more exceed the context size of "
                                f"{self.ctx_size}; raise --ctx-size (up to the export's) or shorten the text")
            if not len(ids):
                raise ValueError("no tokens to compute: give each sequence at least one token id")
            if ids.dtype.kind not in "iu":  # among them numbers that no int64 holds
                raise ValueError(f"token ids must be whole numbers from 0 to {self.vocab_size - 1}, got {ids.dtype}")
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                raise ValueError(f"token ids must be 0 to {self.vocab_size - 1}, got {ids.min()} to {ids.max()}")

    # ---- figures ------------------------------------------------------------------------------------------------
    def kv_bytes(self) -> int:
        """Bytes of the pages in use, of page lists and of what the cache keeps for each token."""
        return self.cache.used_bytes

    def memory(self) -> dict[str, int]:
        """Bytes by what they are for. `runtime` is the process's other private memory: Python, libraries, compiled code. On a GPU all but
        that is the device's memory, `device` being all that this process has of it; where both share one memory, `rss` counts it too."""
        rss = psutil.Process().memory_full_info()
        kv, workspace = self.kv_bytes(), self.plan.arena.nbytes + self.plan.workspace.nbytes + self._batch.list_bytes
        if self.device != "cpu":
            taken, shared = self.backend.device_bytes()
            return {"weights": self.backend.weight_bytes, "kv": kv, "workspace": workspace, "device": taken, "runtime": rss.uss,
                    "rss": rss.rss + taken * shared}
        return {"weights_mapped": self.plan.graph.mapped_bytes, "kv": kv, "workspace": workspace,
                "runtime": max(0, rss.uss - self.plan.graph.mapped_bytes - kv - workspace), "rss": rss.rss}
