"""A cached sequence as a file: the pages it holds, its page lists and what belongs to each token, bit by bit.

Metadata, besides what session_file.py writes:
    model       sha256 over what edgeattn.json says of the model, the hashes of its files among it; model_name for people
    settings    JSON: what the cache must have in common (`settings`)
    tokens, exact_from, date, meta   numbers of the sequence, UTC, JSON of the caller's `meta`
Tensors; "pages" are all pages of the sequence, layer by layer, head by head, as the page lists order them:
    counts, sealed and the other arrays of cache/sequence.py, as they are there, where the cache keeps them
    positions, mass   [slots] int32, [planes, slots] float32   of the slots in use, in the order of pages
    kinds             [pages] uint8                 the pool of each page; the n-th page of a kind is row n of that pool's arrays
    token_ids         [tokens or more] int32        what the tokens are; any more are the text's, and not in the cache yet
    pages.I.k, .k_params, .v, .v_params             [pages of pool I, ...] codes or floats, and parameters (page_formats.py)
"""
import hashlib
import json
import re
from dataclasses import asdict
from datetime import datetime, timezone

import numpy as np
from safetensors import SafetensorError, safe_open

from edgeattn.cache.pages import CacheFull
from edgeattn.cache.session_file import CHUNK_BYTES, NAMES, SessionError, check, replace, write
from edgeattn.kernels_cpu.page_pool import POOLS, RELEASED
from edgeattn.page_formats import PAGE

HELD = {"tables", "counts", "sealed", "positions", "mass", "compensation", "confidence", "limits"}  # of Sequence.arrays
REMADE = {"selection", "index", "indexed", "value_sums"}  # from the pages, when they are needed


# ---- what must agree -----------------------------------------------------------------------------------------------
def fingerprint(config: dict) -> str:
    """sha256 over the content of edgeattn.json, less what may change while the model stays the same."""
    content = {name: value for name, value in config.items() if name not in ("verify", "defaults")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def settings(cache) -> dict[str, str]:
    """What a cache must have in common with the one that a session was made in: shape, types, and what changes which tokens are kept."""
    options, plan = cache.options, cache.plan
    unused = {"budget", *(() if options.quantised else ("storage",)), *(() if options.quantised or plan.evicts else ("window",)),
              *(() if plan.evicts or cache.storage.anchors else ("sink_tokens",)), *(() if options.heads != "none" else ("retrieval",)),
              *(() if options.storage == "delta" else ("delta_threshold", "delta_gate", "delta_refresh"))}
    found = {"shape": f"{cache.shape[0]} layers of {cache.shape[1]} KV heads of {cache.head_dim}"}
    found |= {name: str(value) for name, value in asdict(options).items() if name not in unused} | {"eviction": options.method}
    if plan.evicts:
        classes = b"" if plan.classes is None else np.asarray(plan.classes, bool).tobytes()
        found["limits"] = f"{plan.limits.min()} to {plan.limits.max()} tokens a head, " \
                          f"{hashlib.sha256(plan.limits.tobytes() + classes).hexdigest()[:8]}"
    return found | {"pages": ", ".join(map(repr, plan.formats))}


# ---- saving --------------------------------------------------------------------------------------------------------
def save(path, cache, sequence, token_ids: list[int], config: dict, meta: dict) -> None:
    """Write a session, or replace the one at `path`, which stays whole until the new one is. A process that is killed loses at most
    this save; what it leaves beside the file the next save removes.

    token_ids  of the sequence's tokens; more may follow that are not in the cache yet
    config     the model's edgeattn.json
    meta       whatever JSON can hold
    OSError: no room, no permission, or the cache keeps more than a session holds. ValueError: too few token ids.
    """
    if sequence.arrays.keys() - HELD - REMADE:
        raise OSError(f"a session cannot hold what this cache keeps: {', '.join(sorted(sequence.arrays.keys() - HELD - REMADE))}")
    if len(token_ids) < sequence.length:
        raise ValueError(f"the sequence has {sequence.length} tokens, but only {len(token_ids)} token ids were given")
    sequence.fetch()
    source = config.get("source", {})
    name = f"{source.get('name') or source.get('folder') or 'unknown'} {config.get('precision', '')}".strip()
    metadata = {"model": fingerprint(config), "model_name": name.encode("utf-8", "replace").decode(),
                "settings": json.dumps(settings(cache)), "tokens": str(sequence.length), "exact_from": str(sequence.exact_from),
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "meta": json.dumps(meta)}
    replace(path, lambda file: write(file, metadata, _tensors(cache, sequence, token_ids)))


def _tensors(cache, sequence, token_ids):
    """As session_file.write takes them."""
    pages = -(-sequence.counts // PAGE)
    entries = sequence.tables[_first(pages, sequence.tables.shape[-1])]
    if cache.options.releases or (entries == RELEASED).any():
        raise ValueError("a sequence whose pages may be released cannot be saved")
    kinds = (entries % POOLS).astype(np.uint8)
    found = {"token_ids": (np.asarray(token_ids, np.int32), None), "kinds": (kinds, None)}
    found |= {name: (array[where].astype(dtype, copy=False), None)
              for name, (array, where, dtype, _) in _parts(sequence, sequence.counts).items()}
    for i, pool in enumerate(cache.pools):
        numbers = entries[kinds == i] // POOLS
        found |= {f"pages.{i}.{name}": (array, numbers) for name, array in pool.pages.stored().items() if len(numbers) and array.shape[1]}
    return found


def _parts(sequence, counts):
    """{name: (array, what of it is in use, the file's type and shape of that)} of a sequence whose heads hold `counts`, its page lists
    apart. Positions are int32 in every file, so that a larger context can go on with it."""
    used, slots = _first(counts, sequence.tables.shape[-1] * PAGE), int(counts.sum())
    return {name: (array, (..., used), np.dtype(np.int32) if name == "positions" else array.dtype, (*array.shape[:-3], slots))
            if name in ("positions", "mass") else (array, ..., array.dtype, array.shape)
            for name, array in sequence.arrays.items() if name not in REMADE | {"tables"}}


def _first(counts, length):
    """[..., length] bool, true for the first counts[...] of each row."""
    return np.arange(length) < counts[..., None]


# ---- loading -----------------------------------------------------------------------------------------------------
def load(path, cache, config: dict):
    """-> (sequence, token_ids list[int], meta): a new sequence of `cache`, in pages of its own, that continues where the saved one was.

    Everything is checked before the cache is touched, so that no file can make a kernel leave its pools.
    FileNotFoundError and other OSErrors; SessionError: not a session, damaged, of another model or other settings; CacheFull: it does
    not fit. Then nothing has changed.
    """
    metadata = check(path)
    if metadata.get("model") != fingerprint(config):
        raise SessionError(f"made with another model ({metadata.get('model_name', 'unknown')})")
    meta, made = _parse(metadata, "meta"), _parse(metadata, "settings")
    here = settings(cache)
    if made != here:
        other = [name for name in {**made, **here} if made.get(name) != here.get(name)]
        first = [name for name in other if name in made and name in here and name != "pages"] or other  # the rest follows from these
        raise SessionError("made with another KV cache: " + ", ".join(
            f"{name} {made.get(name, 'unset')} (here {here.get(name, 'unset')})" for name in first))
    try:
        with safe_open(path, "numpy") as file:
            if file.metadata() != metadata:
                raise SessionError("changed while it was read; try again")
            return _restore(file, cache, metadata, config.get("model", {}).get("vocab_size", 1 << 31)) + (meta,)
    except SafetensorError as error:
        raise SessionError(f"damaged: {error}") from None


def _parse(metadata, name):
    try:
        found = json.loads(metadata[name])
    except (ValueError, LookupError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise SessionError(f"damaged: no valid {name}")
    return found


def _restore(file, cache, metadata, vocab_size):
    sequence = cache.new_sequence()
    need, max_pages = _Tensors(file), sequence.tables.shape[-1]
    numbers = _numbers(metadata, cache.capacity)
    counts, kinds = _page_lists(need, cache, numbers["length"], max_pages)
    token_ids = need("token_ids", np.int32)
    _require(token_ids.ndim == 1 and len(token_ids) >= numbers["length"] and ((token_ids >= 0) & (token_ids < vocab_size)).all(),
             "impossible tokens")
    parts = _parts(sequence, counts)
    values = {name: need(name, dtype, shape) for name, (_, _, dtype, shape) in parts.items()}
    if "positions" in values:
        _require(((values["positions"] >= 0) & (values["positions"] < numbers["length"])).all(), "impossible positions")
    if "limits" in values:
        _require(((values["limits"] >= 0) & (values["limits"] <= max_pages * PAGE)).all(), "impossible limits")
    arrays = [{name: array for name, array in pool.pages.stored().items() if array.shape[1]} for pool in cache.pools]
    rows = np.bincount(kinds, minlength=len(cache.pools))
    for i, pool in enumerate(cache.pools):
        for name, array in arrays[i].items():
            _require(not rows[i] or need.matches(f"pages.{i}.{name}", array.dtype, (rows[i], array.shape[1])), "impossible pages")
        if rows[i] > pool.free:
            raise CacheFull(f"it needs {rows[i]} pages and {pool.free} are free: raise -c or --kv-budget")
    # Nothing can be wrong with it from here on; should reading fail all the same, the sequence gives its pages back when it is dropped.
    entries = np.empty(len(kinds), np.int32)
    for i, pool in enumerate(cache.pools):
        entries[kinds == i] = pool.allocate(rows[i]) * POOLS + i
    sequence.tables[_first(-(-counts // PAGE), max_pages)] = entries
    sequence.relisted()
    sequence.moved()
    for name, (array, where, *_) in parts.items():
        array[where] = values[name]
    for name, number in numbers.items():
        setattr(sequence, name, number)
    sequence.room = int((-counts % PAGE).min())
    for i in np.flatnonzero(rows):
        for name, array in arrays[i].items():
            _fill(array, entries[kinds == i] // POOLS, file.get_slice(f"pages.{i}.{name}"))
    return sequence, token_ids.tolist()


def _numbers(metadata, capacity):
    length, exact_from = (int(metadata[name]) if re.fullmatch("[0-9]{1,9}", metadata.get(name, "")) else -1
                          for name in ("tokens", "exact_from"))
    _require(0 <= exact_from <= length, "impossible lengths")
    if length > capacity:
        raise CacheFull(f"it has {length} tokens and the context here {capacity}: raise -c (if the model allows it)")
    return {"length": length, "exact_from": exact_from}


def _page_lists(need, cache, length, max_pages):
    """counts, kinds. Only pages of floats are ever written, so that no other may stand where the next tokens go."""
    counts, sealed = (need(name, np.int32, cache.shape) for name in ("counts", "sealed"))
    _require((counts >= 0).all() and (counts <= length).all() and (cache.plan.evicts or (counts == length).all()), "impossible counts")
    pages = -(-counts // PAGE)
    if pages.max() > max_pages:
        raise CacheFull(f"it has {pages.max()} pages a head and this cache {max_pages}: raise -c or --kv-budget")
    _require((sealed >= 1).all() and ((sealed == 1) | (sealed * np.int64(PAGE) <= counts)).all(), "impossible quantised pages")
    kinds = need("kinds", np.uint8, (int(pages.sum()),))
    quantised = (_first(sealed, max_pages) & (np.arange(max_pages) > 0))[_first(pages, max_pages)]
    _require(((kinds > 0) == quantised).all() and (kinds < len(cache.pools)).all(), "impossible page lists")
    return counts, kinds


class _Tensors:
    """The file's tensors, as far as they are what they must be."""

    def __init__(self, file):
        self._file = file

    def matches(self, name, dtype, shape=None):
        found = self._file.get_slice(name)
        return found.get_dtype() == NAMES[np.dtype(dtype).name] and shape in (None, tuple(found.get_shape()))

    def __call__(self, name, dtype, shape=None):
        _require(self.matches(name, dtype, shape), f"{name} has a wrong type or shape")
        return self._file.get_tensor(name)


def _require(good, what):
    if not good:
        raise SessionError(f"damaged: {what}")


def _fill(array, numbers, source):
    step = max(1, CHUNK_BYTES // array[:1].nbytes)
    for start in range(0, len(numbers), step):
        end = min(start + step, len(numbers))
        array[numbers[start:end]] = source[start:end]
