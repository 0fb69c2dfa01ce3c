"""Memory in which blocks of a launch tell each other numbers (exchange.cuh): one for each stream, as its kernels run one after another."""
import numpy as np

from edgeattn.kernels_cuda.attention_call import BLOCKS, processors

MOST_GANGS, TOLD, MOST_SCORES = 1024, 8 * 130 + 2, 8192


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
