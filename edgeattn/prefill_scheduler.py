"""What a prompt reads: for each chunk and layer a policy's plan, made between the operators of that layer, as lists that attention reads.

A chunk has hundreds of tokens, so unlike decode's policies (scheduler.py) these are NumPy: what they take is counted and shown beside what
attention takes. On a GPU they name operators, as decode's do, which write the lists there. A chunk stays dense below `min_len` tokens, and
where it has few tokens, which see everything.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from time import perf_counter
from typing import ClassVar

import numpy as np

from edgeattn.kernels_cpu import read_pages
from edgeattn.page_formats import PAGE
from edgeattn.policies import MethodOptions
from edgeattn.prefill_lists import CORRECTIONS, write_lists
from edgeattn.prefill_plan import QUERIES, LayerKeys, causal

FEWEST = 32  # tokens of a chunk that make a plan worth while
LAST = 2     # query blocks at the end of a prompt that read everything


@dataclass(frozen=True)
class PrefillOptions(MethodOptions):
    """What prompts read. min_len None: the policy's own.

    correction  what makes good what is not read, a function of prefill_corrections.py; None: the policy's own
    """
    correction: str | None = None

    kind: ClassVar[str] = "prefill"
    what: ClassVar[str] = "sparse prefill"

    def __post_init__(self):
        super().__post_init__()
        if self.correction not in (None, *CORRECTIONS):
            raise ValueError(f"a correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")


def refusal(policy, cache_options, window: int) -> str:
    """Why a policy's plan does not go with a cache or with a model of sliding windows; "" where it does."""
    if window:
        return "this model's layers see a window of recent tokens only"
    if cache_options.releases:
        return f"--kv-eviction {cache_options.method} drops and rebuilds pages that a plan may name"
    if policy and policy.unrotates and cache_options.quantised and cache_options.storage_policy().rotated:
        return f"--kv-storage {cache_options.storage} rotates keys once more, which it would have to undo"
    return ""


class Keys(LayerKeys):
    """Those of the cache, then a chunk's own."""

    def __init__(self, cache, sequence, layer: int, new: np.ndarray):
        self._cache, self._sequence, self._layer, self._new = cache, sequence, layer, new

        self.tokens = int(sequence.counts[layer, 0])
        self.alike = len(set(sequence.counts[layer].tolist())) == 1  # whether all heads hold as many

    def __len__(self):
        return self._new.shape[1]

    def __getitem__(self, head: int) -> np.ndarray:
        if not 0 <= head < len(self):
            raise IndexError(head)
        past, _ = self._cache.read(self._sequence, self._layer, head)
        return np.concatenate([past[:len(past) - len(self._new)], self._new[:, head]])

    def stored(self):
        """Pages where they lie. Heads must hold as many (`alike`)."""
        from edgeattn.kernels_cpu.stored_keys import StoredKeys  # compiled only where a policy asks for it
        past, head_dim = self.tokens - len(self._new), self._cache.head_dim
        whole, left = past // PAGE, past % PAGE
        tables, rest = self._sequence.tables[self._layer], self._new.swapaxes(0, 1)
        if left:
            part, _ = read_pages.run(self._cache.table, head_dim, tables[:, whole])
            rest = np.concatenate([part.transpose(0, 2, 1)[:, :left], rest], 1)
        return StoredKeys(self._cache.table, np.ascontiguousarray(tables[:, :whole]), np.ascontiguousarray(rest, np.float32))

    @cached_property
    def means(self) -> np.ndarray:
        from edgeattn.kernels_cpu import key_means
        return key_means.run(self.stored())

    def page_means(self, values: np.ndarray) -> np.ndarray:
        """[kv_heads, max_pages, head_dim + width] float32: mean key and mean value of each full page, the chunk's own among them. values:
        the chunk's [tokens, kv_heads, head_dim], which like its keys are not in the cache yet."""
        found, head_dim = self._cache.page_means(self._sequence, self._layer), self._cache.head_dim
        for head, count in enumerate(self._sequence.counts[self._layer].tolist()):
            past = count - len(self._new)
            first, open_tokens = divmod(past, PAGE)
            k, v = read_pages.run(self._cache.table, head_dim, self._sequence.tables[self._layer, head, first:first + 1])
            pair = (np.concatenate([old[:open_tokens], new[:, head]]) for old, new in ((k[0].T, self._new), (v[0], values)))
            for x, part in zip(pair, (slice(head_dim), slice(head_dim, 2 * head_dim))):
                found[head, first:count // PAGE, part] = x[:len(x) // PAGE * PAGE].reshape(-1, PAGE, head_dim).mean(1)
        return found


def asset_arguments(policy, assets, address) -> dict[str, int]:
    """What operators ask for of what a policy's `load` gave: where each array is on a device, and how long its rows are."""
    found = {f"prefill.{name}": x for name, x in policy.device_assets(assets).items()}
    return {name: address(x) for name, x in found.items()} | {f"{name}.width": x.shape[-1] for name, x in found.items()}


class PrefillScheduler:
    """
    policy    what chooses; min_len: tokens in the context from which chunks are sparse
    times     what the crossover was taken from, where it was measured (prefill_crossover.py)
    chunks    how many were [dense, sparse]
    figures() what sparse chunks read, and how long choosing took
    """

    def __init__(self, options: PrefillOptions, layers: int, kv_heads: int = 1):
        self.options, self.policy, self.kv_heads = options, options.policy(), kv_heads
        self.min_len = self.policy.min_len if options.min_len is None else options.min_len
        self.correction = options.correction or self.policy.correction
        self.assets, self.times, self.chunks = None, None, [0, 0]
        # Pairs of query and key by layer: [of query heads' plans, of what KV heads read], each [in sparse chunks, all that are seen there]
        self.pairs, self.seconds = np.zeros((layers, 2, 2)), np.zeros(layers)
        self._lists, self._means = [], []  # what kernels read until the next layer
        self._backend = None

    def load(self, folder, config: dict) -> None:
        """What the policy needs of the model's calibration. ValueError: it is not there, or another model's."""
        self.assets = self.policy.load(folder, config)

    def prepare(self, backend, batch, max_pages: int, group: int) -> None:
        """On a GPU (backend_cuda.py): memory for lists and counters there. group: query heads of a KV head."""
        self._backend, self._max_pages = backend, max_pages
        self._columns = min(self.policy.single_keys(self.assets, group), max_pages * PAGE)
        self._counters = backend.counters((len(self.pairs), 2))
        batch.hold_lists(self.kv_heads, self._columns)

    def operators(self, layer: int) -> list[tuple[str, dict]]:
        """What runs before a layer's attention; nothing on the CPU."""
        own = {"pages": self._max_pages, "columns": self._columns} if self._backend else {}
        return [(name, about | own) for name, about in self.policy.operators()] if self._backend else []

    def arguments(self) -> dict[str, int]:
        """What those need, under the names used in ARGS."""
        if not self._backend:
            return {}
        found = {"prefill.stats": self._backend.address(self._counters), "prefill.correction": CORRECTIONS[self.correction]}
        return found | asset_arguments(self.policy, self.assets, self._backend.address)

    def between(self, batch, sparse: list, choose):
        """What Plan.run is to call before each layer's attention, None for nothing. sparse: as in choose(); choose(sparse, layer) is called
        on the CPU."""
        if not self._backend:
            return partial(choose, sparse) if sparse else None
        for place, sequence, _, count, last in sparse:
            if not batch.list_prompt(place, int(sequence.counts.max()), count, LAST * last):
                self.chunks = [self.chunks[0] + 1, self.chunks[1] - 1]  # no room for its list: wants() has counted it as sparse
        return None

    def reads_all(self, tokens: int) -> bool:
        """Whether the policy says that so many tokens are read whole."""
        return (self.policy.tokens(tokens) or 0) >= tokens

    def wants(self, sequence, tokens: int, last: bool) -> bool:
        """Whether a chunk of the newest `tokens` of a sequence is to be sparse; counts it. last: the prompt ends with it."""
        sparse = tokens >= (LAST * QUERIES + 1 if last else FEWEST) and sequence.length >= self.min_len and sequence.length > tokens
        self.chunks[sparse] += 1
        return sparse

    def choose(self, layer: int, kv_cache, batch, sparse: list, tensors: dict, attributes: dict) -> None:
        """Write the lists of one layer. sparse: (place in the batch, sequence, first row, tokens, whether the prompt ends with them) of
        each sequence that is to have some; a prompt's end, where the question is, reads everything. tensors: the layer's q, k, v, cos and
        sin as attention gets them."""
        from edgeattn.kernels_cpu import rotate_heads  # compiled only where a prompt is sparse
        began, self._lists, self._means = perf_counter(), [], []
        for place, sequence, first, count, last in sparse:
            rows, head_dim = slice(first, first + count), attributes["head_dim"]
            about = head_dim, attributes.get("interleaved", 0), kv_cache.arguments(layer)["cache.keys_rotated"]
            q, k = (rotate_heads.run(tensors[name][rows].reshape(count, -1), tensors["cos"], tensors["sin"], batch.positions[rows], *about)
                    for name in "qk")
            keys = Keys(kv_cache, sequence, layer, k.swapaxes(0, 1))
            plans = self._plans(layer, q, keys, attributes["scale"])
            for plan in plans if last else ():
                plan.blocks[:, -LAST:] = causal(plan.queries, plan.keys)[-LAST:]
            joined = [plan.union(len(k) // len(plans)) for plan in plans]
            self.pairs[layer] += [np.sum([plan.pairs() for plan in some], 0) for some in (plans, joined)]
            if self.correction == "tail":
                self._means.append(keys.page_means(tensors["v"][rows].reshape(count, len(k), head_dim)))
            self._lists.append(write_lists(joined, self.correction, self._means[-1] if self._means else None, self.policy.skip))
            batch.prefill_lists[place] = self._lists[-1].ctypes.data
        self.seconds[layer] += perf_counter() - began

    def _plans(self, layer, q, keys, scale):
        """One for all KV heads, or one for each where they hold different tokens."""
        if keys.alike:
            return [self.policy.select(q, keys, scale, layer, self.assets)]
        group = len(q) // len(keys)
        return [self.policy.select(q[head * group:(head + 1) * group], [keys[head]], scale, layer,
                                   self.policy.of_head(self.assets, head, group))
                for head in range(len(keys))]

    def _collect(self):
        """What a GPU has counted: pairs read and all pairs of KV heads, for which it chooses as one."""
        if self._backend:
            self.pairs += self._backend.take_counters(self._counters)[:, None]

    def shares(self) -> np.ndarray:
        """[layers, 2]: of all pairs in sparse chunks so far, those in query heads' plans and those that KV heads read; 0 before there are
        any. A chunk at the end of a long prompt has more pairs, and counts for more, than one at its beginning."""
        self._collect()
        return self.pairs[..., 0] / np.maximum(self.pairs[..., 1], 1)

    def figures(self) -> dict[str, float]:
        """Since the last call, over sparse chunks and layers: density of the plans and of what is read (pairs, of all that a causal mask
        leaves), and seconds that choosing took."""
        found = self.shares().mean(0)
        result = {"density": float(found[0]), "read": float(found[1]), "seconds": float(self.seconds.sum())}
        self.pairs[:], self.seconds[:], self.chunks = 0, 0, [0, 0]
        return result

    def explain(self) -> Iterator[str]:
        """What was decided, line by line; counters go on."""
        fields = ", ".join(f"{name} {value}" for name, value in vars(self.policy).items())
        yield f"sparse prefill {self.options.method} ({fields})" + ("" if self.assets is None else ", fitted to this model")
        if self.times:
            yield "one layer's attention of a chunk on this machine, in microseconds: " + "; ".join(
                f"{tokens:,} tokens: dense {1e6 * self.times['dense'][i]:.0f}, choosing {1e6 * self.times['choose'][i]:.0f}, what is "
                f"chosen {1e6 * self.times['attend'][i]:.0f}" for i, tokens in enumerate(self.times["depths"]))
        yield (f"chunks with {self.min_len:,} tokens in the context and more are sparse; so far: {self.chunks[0]} dense, "
               f"{self.chunks[1]} sparse")
        for layer, (kept, read) in enumerate(self.shares()):
            if self.chunks[1]:
                yield f"layer {layer}: plans hold {100 * kept:.1f} % of the pairs, heads of a group together {100 * read:.1f} %"
