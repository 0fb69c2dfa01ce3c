"""Tokens of pages of floats to other places: HostPages.move and permute (edgeattn/cache/pages.py) are the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.steps import Launch, run as run_launches

MOST_TOKENS = 256  # that change places with each other


def run(pages, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """pages: page_pool.py's, of floats; parts: (sources, targets), places 32 * page + slot of one KV head's tokens, in the order of the
    text, each going to an earlier slot."""
    _launch("move", pages, [parts], 1)


def permute(pages, turns: list[list[tuple[np.ndarray, np.ndarray]]]) -> None:
    """The same, where the tokens of a part change places with each other; parts of a turn at once, turns one after the other."""
    if any(len(sources) > MOST_TOKENS for parts in turns for sources, _ in parts):
        raise ValueError(f"a GPU sorts {MOST_TOKENS} tokens at a time; run with --device cpu")
    _launch("permute", pages, turns, pages.format.blocks)


def _launch(name, pages, turns, blocks):
    xp, parts = device.cupy(), [part for turn in turns for part in turn]
    starts = np.cumsum([0, *(len(sources) for sources, _ in parts)])
    if not starts[-1]:
        return
    held = xp.asarray(np.concatenate([starts, *(np.concatenate(x) for x in zip(*parts))]), np.int32)  # one copy
    sources, targets = held.data.ptr + 4 * (len(starts) + np.array([0, starts[-1]]))
    kernel = compile.function("move_tokens", f"{name}_{'halves' if pages.format.k_type == 'f16' else 'floats'}")
    firsts, launches = np.cumsum([0, *map(len, turns)]), []
    for first, turn in zip(firsts, turns):
        args = pages.k.data.ptr, pages.v.data.ptr, held.data.ptr + 4 * first, sources, targets, pages.format.head_dim
        if turn:
            launches.append(Launch(kernel, (len(turn), blocks, 1), 256, tuple(np.int64(x) for x in args), overlap=True))
    run_launches(launches)
    xp.cuda.get_current_stream().synchronize()  # the places lie in memory that is given back here
