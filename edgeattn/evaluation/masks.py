"""The masks of the Long-Context Attention Benchmark (Bu et al., 2025, arXiv 2510.17896) as far as a causal decoder has them, each made the
way this runtime makes it, checked against the mask itself in NumPy, and timed.

    causal                 a prompt
    causal_document        several prompts in one call: none sees another
    share_question         one text and several continuations of it: branches of a sequence
    sliding_window_causal  a model's window
    global_sliding_window  the first page and recent ones, as sparse prefill lists them (its causal half)
    block_sparse           pages at random for each KV head and 64 queries: what every method of sparse prefill is to the kernels
    variable_block_sparse  the same, with single keys besides

The other half of that suite lets tokens see later ones (full, full_document, sliding_window, both prefix_lm, block_causal_document) or
joins texts that were read apart (causal_blockwise). No decoder that runs here attends so, and no kernel here can.
"""
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeattn.evaluation import Source
from edgeattn.evaluation.mask_layer import MaskLayer
from edgeattn.evaluation.outcome import Outcome
from edgeattn.page_formats import PAGE
from edgeattn.prefill_plan import PrefillPlan, causal as below, forced, shape_of, spread

KINDS = ("causal", "causal_document", "share_question", "sliding_window_causal", "global_sliding_window", "block_sparse",
         "variable_block_sparse")
BRANCHES = 4
SHARE = 0.25                   # of the length, that windows see; of pages, that are read at random
EXACT, ROUNDED = 1e-3, 0.08    # mean relative errors: of 16-bit pages; of codes, and of lists, whose keys and weights have 127 steps


@dataclass(frozen=True)
class Masks:
    samples: ClassVar[int] = 1
    length: ClassVar[int] = 4096
    room: ClassVar[int] = 0

    def total(self, source: Source) -> int:
        return len(KINDS) * source.samples

    def measure(self, model, tokenizer, source: Source, advance) -> Outcome:
        """Of the model only its shape counts, and its cache's types. A sample is every mask once."""
        if model.device != "cpu":
            raise ValueError("masks are checked on the CPU: leave out --device")
        if model.cache.options.moves_slots or model.config["model"]["window"]:
            raise ValueError("masks need a cache in which every token has its place: leave out --kv-eviction, --kv-heads and --kv-budget, "
                             "and take a model without sliding windows")
        values, layers = [], {kind: [] for kind in KINDS}
        for kind in KINDS:  # compiles
            attend(kind, model, 4 * BRANCHES * PAGE, source.seed)
        for i in range(source.samples):
            values.append([])
            for kind in KINDS:
                layer = attend(kind, model, source.length, source.seed + i)
                rounded = len(layer.cache.pools) > 1 or kind in KINDS[4:]
                values[-1].append(int(layer.error < (ROUNDED if rounded else EXACT)))
                layers[kind].append(layer)
                advance(1)
        whole, metrics = source.length * (source.length + 1) / 2, {}
        for kind, some in layers.items():
            metrics |= {f"{kind} error": max(layer.error for layer in some), f"{kind} pairs": some[0].pairs / whole,
                        f"{kind} time": sum(layer.seconds for layer in some) / sum(layer.seconds for layer in layers["causal"])}
        return Outcome("share", values, metrics, model.kv_bytes(), source.length)


def attend(kind: str, model, length: int, seed: int) -> MaskLayer:
    """A layer that has read `length` tokens under a mask; its last call is checked."""
    about, options = model.config["model"], model.cache.options
    window = int(SHARE * length) if kind == "sliding_window_causal" else 0
    layer = MaskLayer((about["num_heads"], about["kv_heads"], about["head_dim"]), options, length + BRANCHES * 4 * PAGE, model.ubatch,
                      model.threads, window, seed)
    first = layer.cache.new_sequence()
    if kind == "share_question":
        read(layer, [first], length // 2)
        sequences = [layer.cache.fork(first) for _ in range(BRANCHES)]
        read(layer, sequences, length // 2)
    else:
        read(layer, [first, *(layer.cache.new_sequence() for _ in range(BRANCHES - 1))] if kind == "causal_document" else [first], length,
             kind)
    return layer


def read(layer: MaskLayer, sequences: list, tokens: int, kind: str = "causal") -> None:
    """So many tokens, shared evenly among sequences, in calls of a chunk."""
    each, step = tokens // len(sequences), max(1, layer.chunk // len(sequences))
    for start in range(0, each, step):
        count = min(step, each - start)
        layer.call([(sequence, count, plan(kind, layer, count, sequence.length + count)) for sequence in sequences], start + count == each)


def plan(kind: str, layer: MaskLayer, n: int, m: int) -> PrefillPlan | None:
    """What `n` new tokens of `m` read of each KV head; None: everything before them."""
    if kind == "global_sliding_window":
        return PrefillPlan(np.repeat(forced(n, m, 1, int(SHARE * m) // PAGE)[None], layer.cache.shape[1], 0), None, n, m)
    if not kind.endswith("block_sparse"):
        return None
    blocks, pages = shape_of(n, m)
    chosen = layer.rng.random((layer.cache.shape[1], blocks, pages)) < SHARE
    chosen = chosen & below(n, m) | forced(n, m)
    if kind == "block_sparse":
        return PrefillPlan(chosen, None, n, m)
    keys = (layer.rng.random((layer.cache.shape[1], blocks, m)) < 0.02) & spread(np.repeat(below(n, m)[None], len(chosen), 0), m)
    return PrefillPlan(chosen, keys & ~spread(chosen, m), n, m)
