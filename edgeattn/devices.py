"""Where a model runs: the CPU, or a GPU by CUDA."""
from edgeattn.backend_cpu import CpuBackend

DEVICES = "cpu", "cuda", "auto"


def cuda_missing() -> str:
    """Why no GPU can be used here, in one line; "" where one can."""
    from edgeattn.kernels_cuda import device
    try:
        device.cupy()
    except ValueError as error:
        return str(error)
    return ""


def make_backend(device: str):
    """ValueError: no such device, or CUDA was asked for where it cannot be used."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cpu" or device == "auto" and cuda_missing():
        return CpuBackend()
    from edgeattn.backend_cuda import CudaBackend  # CuPy is imported only when CUDA is chosen
    return CudaBackend()
