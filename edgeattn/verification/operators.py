"""A device's kernels against the NumPy references, on the same random inputs each time."""
import zlib

import numpy as np

from edgeattn.ops import OPS, load_kernel
from edgeattn.verification import Check
from edgeattn.verification.cases import CASES


def check_operators(device: str, progress=None) -> list[Check]:
    """A Check for each operator. device: "cpu" or "cuda"; progress(operator, done, total)."""
    found = []
    for i, name in enumerate(OPS):
        if progress:
            progress(name, i, len(OPS))
        found.append(check_operator(name, device))
    return found


def check_operator(name: str, device: str) -> Check:
    """`worst` is the largest error of a case, as a part of what the case allows; NaN, infinity or another shape in place of a number is
    infinite. Cases that the device refuses, as `docs/cuda-runtime.md` says, are left out and counted."""
    run, refused, worst, where = 0, 0, 0.0, ""
    try:
        kernel = load_kernel(name, device)
    except ModuleNotFoundError as error:
        if error.name != f"edgeattn.kernels_{device}.{name}":
            raise
        return Check("operator", name, None, {"cases": 0}, f"has no kernel for {device}")
    for case, build, tolerance in CASES[name]:
        args, attributes = build(np.random.default_rng(zlib.crc32(f"{name} {case}".encode())))
        try:
            got = kernel(*args, **attributes)
        except Exception as error:  # whatever a kernel does but compute is a failure
            if device != "cpu" and isinstance(error, ValueError) and "cpu" in str(error).lower():
                refused += 1
                continue
            return Check("operator", name, False, {"cases": run + 1, "worst": np.inf}, f"{case}: {type(error).__name__}: {error}")
        run += 1
        error = deviation(got, load_kernel(name, "reference")(*args, **attributes), tolerance)
        if error > worst:
            worst, where = error, case
    note = f"{where} differs" if worst > 1 else f"{refused} cases are the CPU's alone" if refused else ""
    return Check("operator", name, worst <= 1 if run else None, {"cases": run, "worst": worst}, note)


def deviation(got, expected, tolerance: float) -> float:
    """The largest difference as a part of `tolerance`; of exact results (tolerance 0) infinity where one number differs.
    got, expected: arrays, or tuples of arrays."""
    pairs = list(zip(got, expected, strict=True)) if isinstance(expected, tuple) else [(got, expected)]
    return max(_deviation(np.asarray(g), np.asarray(e), tolerance) for g, e in pairs)


def _deviation(got, expected, tolerance):
    if got.shape != expected.shape:
        return np.inf
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    error = np.where((got == expected) | np.isnan(got) & np.isnan(expected), 0.0, np.abs(got - expected))
    largest = float(np.nan_to_num(error, nan=np.inf, posinf=np.inf).max(initial=0.0))
    return largest / tolerance if tolerance else np.inf if largest else 0.0

