"""Imports all kernels, before atheris changes what is imported next: Numba cannot compile the changed code. bandwidth.py has one too."""
from importlib import import_module
from pkgutil import iter_modules

import edgeattn.bandwidth  # noqa: F401
import edgeattn.kernels_cpu

for module in iter_modules(edgeattn.kernels_cpu.__path__):
    import_module(f"edgeattn.kernels_cpu.{module.name}")
