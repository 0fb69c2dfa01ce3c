"""Tokens of pages of floats to lower places: HostPages.move (edgeattn/cache/pages.py) is the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, device
from edgeattn.kernels_cuda.steps import Launch, run as run_launches


def run(pages, parts: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """pages: page_pool.py's, of floats; parts: (sources, targets), places 32 * page + slot of one KV head's tokens, in the order of the
    text, each going to an earlier slot."""
    xp, page_format = device.cupy(), pages.format
    starts = np.cumsum([0, *(len(sources) for sources, _ in parts)])
    if not starts[-1]:
        return
    numbers = [starts, *(np.concatenate(x) for x in zip(*parts))]
    held = xp.asarray(np.concatenate(numbers), np.int32)  # one copy
    offsets = np.cumsum([0, len(starts), starts[-1]])
    args = tuple(np.int64(x) for x in (pages.k.data.ptr, pages.v.data.ptr, *(held.data.ptr + 4 * offsets), page_format.head_dim))
    kernel = compile.function("move_tokens", "move_halves" if page_format.k_type == "f16" else "move_floats")
    run_launches([Launch(kernel, (len(parts), 1, 1), 256, args, overlap=True)])
    xp.cuda.get_current_stream().synchronize()  # the places lie in memory that is given back here
