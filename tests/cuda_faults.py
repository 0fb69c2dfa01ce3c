"""A plugin for pytest on a GPU (`-p cuda_faults`, with pytest-xdist's -n): a process that a kernel's bad address leaves without its GPU tells
the fault and ends, and another one takes its place, so that the tests after it do not fail as well."""
import os
import sys

FAULTS = ("illegal address", "IllegalAddress", "misaligned address", "launch failure", "LaunchFailure", "CUDA_ERROR_ILLEGAL",
          "CUDA_ERROR_LAUNCH", "illegal memory access", "unspecified launch")


def pytest_runtest_makereport(item, call):
    if call.excinfo is not None and any(fault in str(call.excinfo.value) for fault in FAULTS):
        print(f"{item.nodeid}\n{call.excinfo.getrepr(style='short')}", file=sys.__stderr__, flush=True)
        os._exit(1)
