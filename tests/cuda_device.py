"""Whether CUDA tests can run here: they need a GPU, its driver and CuPy."""
import pytest


def cuda_missing() -> str:
    """Why not; empty where they can."""
    from edgeattn.kernels_cuda import device
    try:
        device.cupy()
    except ValueError as error:
        return str(error)
    return ""


needs_cuda = pytest.mark.skipif(bool(cuda_missing()), reason=cuda_missing())
