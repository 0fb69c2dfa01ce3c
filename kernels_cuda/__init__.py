"""CUDA kernels (CUDA C++ by NVRTC, launched through CuPy's modules): one operator a file, the same name as in the operator table.

Nothing here imports CuPy until a kernel is called: see device.py.
"""
