"""Which pages a decode step reads: scores of each KV head's pages (page_scores.py), and the best of them as lists (selections.py)."""
from importlib import import_module

import numpy as np
from numba import carray, cfunc, int64, njit

from edgeattn.kernels_cpu import attention_call
from edgeattn.kernels_cpu.attention_call import (CALL, KEYS_ROTATION, KV_HEADS, ROWS_INDEX, SELECTIONS, SEQUENCES_INDEX, THREADS,
                                                 WORKSPACE, make_call, rows_of, slots_of)
from edgeattn.kernels_cpu.attention_write import rotate_queries
from edgeattn.kernels_cpu.cached_attention import PagedCache, bind
from edgeattn.kernels_cpu.page_index import index_width
from edgeattn.kernels_cpu.parallel import call_worker, parallel, worker
from edgeattn.kernels_cpu.selection_call import (ALONE, ARGS, COMBINE, FINISHER, HALF, MASS, PEAK, SCORE, SCORER, candidates, rank_floats,
                                                  wanted_pages)
from edgeattn.kernels_cpu.selection_choice import choose, choose_together, choosing_together, count_reads, still_good, use_again
from edgeattn.kernels_cpu.selections import COUNT, HEADER, STATS_FIELDS
from edgeattn.kernels_cpu.simd import at
from edgeattn.kernels_cpu.steps import STEP, call as call_step, thread_count
from edgeattn.page_formats import PAGE

EXACT = "mass", "peak", "rank", "max_mass"
INDEXES = {"bound": "bounds", **{x: x for x in ("hierarchy", "representatives", "landmarks", "components", "collisions")}}  # by score


def workspace_bytes(tensors, attributes, rows, threads):
    """What attention takes, and what ranking does."""
    found = attention_call.workspace_bytes(tensors, attributes, rows, threads)
    if attributes["score"] == "rank":
        pages = -(-tensors["cos"].shape[0] // PAGE)
        found += 4 * threads * rank_floats(int(attributes["num_heads"]) // int(attributes["kv_heads"]), pages)
    return found


def links(attributes, extra) -> dict[str, int]:
    """Addresses of the workers that score, which are compiled only where a policy asks for them."""
    score = attributes["score"]
    name = "page_scores_exact" if score in EXACT else "page_scores_index" if extra["selection.width"] else "page_scores"
    module = import_module(f"edgeattn.kernels_cpu.{name}")
    return {"selection.scorer": module.score.compiled.address,
            "selection.finisher": module.finish.compiled.address if score == "max_mass" else 0}


def select_pages(q, cos, sin, past_key, positions, components=None, *, num_heads, kv_heads, head_dim, rotary_dim, interleaved=0, scale,
                 layer=0, capacity, share=1.0, score, rank=0, tables=0, **options):
    width = index_width(INDEXES.get(score, ""), head_dim, rank or tables or options.get("block", 0))
    cache = PagedCache([past_key], [past_key], [1])
    lists = np.zeros((1, kv_heads, HEADER + capacity), np.int32)
    nothing = np.zeros((1, kv_heads * head_dim), np.float32)
    about = dict(num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved, scale=scale)
    options |= {"score": score}
    tensors, attributes, extra, _kept = bind(cache, q, nothing, nothing, cos, sin, positions, about | options, lists, capacity)
    state = {"batch.sealed": np.ones((1, kv_heads), np.int32), "batch.indexed": np.zeros((1, kv_heads), np.int32),
             "batch.index": np.zeros((1, kv_heads, cache.tables.shape[2], width), np.uint16)}
    each = {name: np.array([array.ctypes.data], np.int64) for name, array in state.items()}
    each |= {"selection.scores": np.zeros((1, kv_heads, cache.tables.shape[2]), np.float32),
             "selection.shares": np.full(kv_heads, share, np.float32), "selection.stats": np.zeros(STATS_FIELDS, np.int64)}
    vectors = np.ascontiguousarray(components, np.float32) if components is not None else np.zeros(1, np.float32)
    extra |= {name: array.ctypes.data for name, array in each.items()}
    extra |= {"selection.width": width, "selection.components": vectors.ctypes.data}
    attributes |= {"reuse": 0.0}
    call_step(step, ARGS, tensors, attributes, extra | links(attributes, extra), workspace_bytes)
    return lists[0, :, HEADER:], lists[0, :, COUNT]


@worker
def select_head(a, rows, first, task, thread):
    """One KV head of a sequence: scores, and its list where heads choose for themselves."""
    call = at(int64, a[WORKSPACE] + CALL)
    sequence, head = task // call[KV_HEADS], task % call[KV_HEADS]
    if at(int64, call[SELECTIONS])[sequence] == 0:
        return
    slots = slots_of(call, sequence, head)
    total, wanted = (slots + PAGE - 1) // PAGE, wanted_pages(a, call, head, slots)
    if a[COMBINE] == ALONE and still_good(a, call, sequence, head, slots):
        use_again(a, call, sequence, head, total)
        return
    begin, last = candidates(a, call, sequence, head, total)
    if wanted < total if a[COMBINE] == ALONE else choosing_together(a, call, sequence):
        call_worker(a[SCORER], carray(a, 1).ctypes.data, begin, last, task, thread)
    if a[COMBINE] == ALONE:
        choose(a, call, sequence, head, wanted, slots, total, thread)


@njit(nogil=True, error_model="numpy")
def _run(address, a, call, rows, tasks):
    if call[THREADS] > 1 and tasks > 1:
        parallel(address, carray(a, 1).ctypes.data, rows, 0, tasks)
    else:
        for task in range(tasks):
            call_worker(address, carray(a, 1).ctypes.data, rows, 0, task, 0)


@cfunc(STEP, cache=True)
def step(a, state):
    selections, sequences, some = at(int64, a[SELECTIONS]), state[a[SEQUENCES_INDEX]], False
    for s in range(sequences):
        some = some or selections[s] != 0
    if not some:  # every sequence reads everything
        return
    call = make_call(a, state[a[ROWS_INDEX]], sequences, 0, thread_count())
    for s in range(sequences):
        if selections[s]:
            exact = a[SCORE] == MASS or a[SCORE] >= PEAK  # by the keys themselves, as the cache rotates them
            rotate_queries(call, rows_of(call, s)[0], call[KEYS_ROTATION] and exact)
    _run(select_head(), a, call, 0, sequences * call[KV_HEADS])
    if a[FINISHER]:
        parts = np.int64(0)
        for s in range(sequences):
            parts = max(parts, (slots_of(call, s, 0) + HALF - 1) // HALF)
        _run(a[FINISHER], a, call, parts, sequences * parts)
    for s in range(sequences):
        if selections[s]:
            if a[COMBINE] != ALONE:
                choose_together(a, call, s)
            count_reads(a, call, s)
