"""CuPy raw CUDA kernels: one operator a file, the same name as in the operator table."""
