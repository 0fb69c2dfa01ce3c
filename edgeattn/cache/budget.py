"""How many pages of which format a cache gets: for the whole context, or for as much as a budget of bytes holds.

Every array of the cache is made once, at its full size, so that the sum of their sizes is a hard limit.
"""
from dataclasses import dataclass, replace

import numpy as np

from edgeattn.cache.layer_budget import MOST
from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.page_index import index_width
from edgeattn.kernels_cpu.selections import HEADER
from edgeattn.page_formats import PAGE, PageFormat
from edgeattn.policies import load_policy

SMALLEST_CHUNK = 32
MASS = {"": 0, "sum": 1, "last": 2}  # attention statistics: bits, as attention_mass.py wants them
SEQUENCES = 64     # that may be open at once where memory is not limited (it is touched only when used)


@dataclass(frozen=True)
class SelectionPlan:
    """What sparse decode keeps with a sequence (kernels_cpu/selections.py, page_index.py).

    groups    lists for each KV head; layers share them
    capacity  pages of a list
    index     what page scores read: "" (the keys), "bounds" or another kind of page_index.py
    size      pages of a block, components or tables, by the kind
    value_sums  whether the mean of a head's values is kept
    """
    groups: int
    capacity: int
    index: str = ""
    size: int = 0
    value_sums: bool = False

    def width(self, formats: tuple[PageFormat, ...]) -> int:
        """Halves of a page in the index: no bounds where quantised pages know those of their keys."""
        known = len(formats) > 1 and all(f.k_params and f.k_axis == "channel" for f in formats[1:])
        return index_width(self.index, formats[0].head_dim, self.size, known)


@dataclass(frozen=True)
class CachePlan:
    """
    formats    of the pools: floats first, then those of sealed pages, the widest first
    pages      how many of each
    limits     [layers, kv_heads] int64: tokens that a head holds at most, between forward calls, unless layers share (layer_budget.py)
    most       tokens that a head may get when they do
    max_pages  length of a page list
    chunk      tokens of a forward call at most
    evicts     whether some head is to drop tokens when it reaches its limit
    """
    formats: tuple[PageFormat, ...]
    pages: tuple[int, ...]
    limits: np.ndarray
    most: int
    max_pages: int
    chunk: int
    evicts: bool
    tracked: bool   # positions are kept: slots are no longer positions
    mass_mode: int  # which attention statistics are kept: bits of MASS
    classes: np.ndarray | None
    position_type: np.dtype
    head_bytes: int  # of a sequence's arrays for each KV head, however many tokens there are
    releases: bool   # pages are released and rebuilt
    selection: SelectionPlan | None = None

    def state_bytes(self) -> int:
        """Bytes of one sequence's tables and per-token arrays."""
        heads, chosen = self.limits.size, self.selection
        token = self.tracked * self.position_type.itemsize + 4 * self.mass_planes
        page = 4 + PAGE * token + self.releases * (2 * self.formats[0].head_dim + 4)  # a mean key; the page list of the part rebuilt from
        found = heads * (self.head_bytes + self.max_pages * page) + self.releases * self.max_pages * (4 * PAGE + 1)
        if chosen:
            width = chosen.width(self.formats)
            found += 4 * chosen.groups * self.limits.shape[1] * (HEADER + chosen.capacity)
            found += (2 * width * self.max_pages + 4) * heads * (width > 0)
            found += 4 * (2 + self.formats[0].head_dim) * heads * chosen.value_sums
        return found

    @property
    def mass_planes(self) -> int:
        """Floats that are kept for each slot: two for the sum (mass, probes that could see it), one for the last."""
        return 2 * bool(self.mass_mode & MASS["sum"]) + bool(self.mass_mode & MASS["last"])

    def chunk_bytes(self) -> int:
        """Bytes of one forward call's K and V before they are in pages: k, v and rotated k of one layer, float32."""
        return self.chunk * self.limits.shape[1] * self.formats[0].head_dim * 12

    def total_bytes(self) -> int:
        """All that the cache takes, with one sequence."""
        return sum(n * f.page_bytes for n, f in zip(self.pages, self.formats)) + self.state_bytes() + self.chunk_bytes()


def plan_cache(options: CacheOptions, layers: int, kv_heads: int, head_dim: int, ctx_size: int, ubatch: int,
               classes: np.ndarray | None = None, selection: SelectionPlan | None = None) -> CachePlan:
    """classes: [layers, kv_heads] bool, True for heads that keep everything; None: all of them. ValueError: the budget is too small for
    anything."""
    storage, eviction = options.storage_policy(), options.eviction_policy()
    floats = PageFormat(head_dim, options.float_type, options.float_type)
    formats = (floats, *storage.formats(head_dim, options.k_type, options.v_type)) if options.quantised else (floats,)
    order = storage.pages() if options.quantised else [0]
    mass_mode = 0
    for user in options.probing():
        mass_mode |= MASS[user.mass]
    tracked = (eviction is not None or classes is not None or mass_mode > 0) and not options.releases
    position_type = np.dtype(np.uint16 if ctx_size <= 1 << 16 else np.int32)
    shape, evicts = (layers, kv_heads), eviction is not None or classes is not None
    streaming = load_policy("heads", "duo" if options.heads == "none" else options.heads)
    head_bytes = 8 + (4 * (1 + 2 * head_dim) if options.compensated else 0) + 4 * options.shares_layers + 4 * (options.progressive > 0)
    # counts, sealed; the compensation token; limits

    def build(tokens, chunk):
        """The plan for heads that hold `tokens` each (streaming heads fewer)."""
        spare = chunk + PAGE if evicts else 0  # a forward call comes on top before anything goes
        limits = np.full(shape, tokens, np.int64)
        if classes is not None:
            recent = max(streaming.recent(tokens), options.window)
            limits[~classes] = min(tokens, PAGE + recent + PAGE - 1)  # over it, whole pages go: the recent tokens stay
        # Several sequences share the context, and each has recent tokens of its own; unlimited memory is touched only when it is used.
        held = limits if options.budget is not None else np.full(shape, tokens)
        if options.quantised:
            sealed = np.maximum(0, (held - options.window) // PAGE - 1)
            open_pages = (options.window // PAGE + 3 + (storage.group - 1)) * (SEQUENCES if options.budget is None else 1)
            kept_floats = (open_pages + -(-chunk // PAGE)) * limits.size
            groups = -(-sealed // storage.group).sum()
            pages = (kept_floats, *(int(groups * order.count(i)) for i in range(len(formats) - 1)))
        else:
            pages = (int((-(-(held + spare) // PAGE)).sum()),)
        most = min(MOST * tokens, -(-ctx_size // PAGE) * PAGE) if options.shares_layers else tokens
        max_pages = -(-((ctx_size if options.releases else most) + spare) // PAGE)
        return CachePlan(formats, pages, limits, most, max_pages, chunk, evicts, tracked, mass_mode, classes, position_type, head_bytes,
                         options.releases, selection)

    if options.budget is None:
        return build(ctx_size, min(ubatch, ctx_size))
    chunk = min(ubatch, ctx_size)
    while chunk > SMALLEST_CHUNK and build(0, chunk).total_bytes() - build(0, 0).total_bytes() > options.budget // 10:
        chunk //= 2
    chunk = max(SMALLEST_CHUNK, chunk // PAGE * PAGE)
    low, high = 0, -(-ctx_size // PAGE)  # in pages: the most that fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if build(middle * PAGE, chunk).total_bytes() <= options.budget else (low, middle - 1)
    least = PAGE + options.window + PAGE
    if low * PAGE < min(least, ctx_size):
        raise ValueError(f"a KV budget of {options.budget} bytes is too small: this model needs at least "
                         f"{build(least, SMALLEST_CHUNK).total_bytes()} bytes with these types, for {least} tokens")
    return build(low * PAGE, chunk)


def choose_types(options: CacheOptions, default: str, layers: int, kv_heads: int, head_dim: int, ctx_size: int,
                 ubatch: int, classes: np.ndarray | None = None, selection: SelectionPlan | None = None) -> CacheOptions:
    """`options` with "auto" settled: without a budget the type is `default`, else the widest in which the context fits without
    eviction; if it fits in none, tokens are evicted."""
    kinds = [default] if options.budget is None else ["f16", "int8", "int4"]
    if options.storage != "kivi":  # all others are ways to quantise
        kinds = ["int4"]
    own = options.storage_policy().keys
    if own:
        kinds = ["f16"] if options.budget is None else ["f16", "int8", "int4"]
    for kind in kinds:
        chosen = replace(options, k_type=own or kind if options.k_type == "auto" else options.k_type,
                         v_type=kind if options.v_type == "auto" else options.v_type)
        if options.budget is None:
            return chosen
        limits = plan_cache(replace(chosen, eviction="none"), layers, kv_heads, head_dim, ctx_size, ubatch, classes,
                            selection).limits
        if limits[... if classes is None else classes].min(initial=ctx_size) >= ctx_size:
            return replace(chosen, eviction="none") if options.eviction == "auto" else chosen
    return chosen
