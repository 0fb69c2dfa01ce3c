"""Numba kernels for x86 and Arm CPUs: one operator a file, the same name as in the operator table."""
