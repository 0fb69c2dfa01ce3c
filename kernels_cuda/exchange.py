"""Memory in which blocks of a launch tell each other numbers (exchange.cuh)."""
import gc
import weakref

import numpy as np

from edgeattn.kernels_cuda.attention_call import BLOCKS, processors

MOST_GANGS, TOLD, MOST_SCORES = 1024, 8 * 130 + 2, 8192
_owner = None  # the backend whose kernels' blocks may wait for each other


def most_blocks() -> int:
    """Of a launch whose blocks wait for each other."""
    return BLOCKS * processors()


def nbytes(blocks: int) -> int:
    """For launches of at most so many blocks, two of each gang at least; all of them zeros at first."""
    gangs = blocks // 2
    return 4 * MOST_GANGS + 8 * (gangs.bit_length() * blocks * TOLD + gangs * MOST_SCORES)


def arguments(memory: int) -> tuple:
    """Of a kernel: the struct Exchange; no memory: its blocks do not wait for each other."""
    return np.int64(memory), np.int64(most_blocks())


def take(backend) -> int:
    """The address of a backend's own, which allocates it; 0 where another one has some: launches of two streams whose blocks wait for each
    other could share a device's processors so that none of them is ever there as a whole."""
    global _owner
    if _owner and _owner():
        gc.collect()  # of a model that is no longer used there may be some left
        if _owner():
            return 0
    _owner = weakref.ref(backend)
    backend.exchange = backend.allocate(nbytes(most_blocks()))
    return backend.exchange.data.ptr
