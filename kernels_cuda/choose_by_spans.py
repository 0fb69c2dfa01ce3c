"""Lists of what a prompt reads, by how far back it lies: policies/prefill/moa.py and streaming.py have the reference."""
import numpy as np

from edgeattn.kernels_cuda import compile, prefill_call
from edgeattn.kernels_cuda.steps import Launch

OWN = "prefill.alpha", "prefill.beta", "alpha", "beta"
ARGS = (*prefill_call.ARGS, *OWN)
FOR_PROMPTS = True  # launched where some sequence has lists


def launches(a: dict[str, int], most: dict) -> list[Launch]:
    prefill_call.check(a)
    pages = prefill_call.pages_of(a, most)
    kernel = compile.function("choose_by_spans", "choose_by_spans", pages + prefill_call.STATIC)
    args = (*prefill_call.choice_args(a), *(np.int64(a[name]) for name in OWN))
    return [prefill_call.write(a, most),
            Launch(kernel, prefill_call.blocks_grid(a, most), prefill_call.THREADS, args, pages, overlap=True)]
