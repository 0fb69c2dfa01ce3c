"""Whether CUDA tests can run here: they need a GPU, its driver and CuPy, or EDGEATTN_EMULATE_CUDA=1: then kernels run on the CPU."""
import os

import pytest


def cuda_missing() -> str:
    """Why not; empty where they can."""
    from edgeattn.kernels_cuda import device
    if os.environ.get("EDGEATTN_EMULATE_CUDA"):
        import emulated_gpu
        emulated_gpu.install()
        return emulated_gpu.missing()
    try:
        device.cupy()
    except ValueError as error:
        return str(error)
    return ""


needs_cuda = pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing())
