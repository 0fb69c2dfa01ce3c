"""Every CUDA source compiles for every GPU that is supported, without spills: NVRTC from pip, no GPU and no driver needed."""
import os
import re
from concurrent.futures import ProcessPoolExecutor

import pytest

from edgeattn.kernels_cuda import compile
from edgeattn.ops import OPS

NAMES = sorted(path.stem for path in compile.HERE.glob("*.cu"))
CPU_ALONE = {"antidiagonal_weights", "score_excess"}  # operators without a CUDA kernel


def test_every_operator_with_a_kernel_has_its_sources():
    """What an operator's file launches is in a source that is compiled here, and each source is launched by an operator."""
    kernels = {name: compile.HERE / f"{name}.py" for name in OPS}
    assert {name for name in OPS if not kernels[name].exists()} == CPU_ALONE
    launched = {name: set(re.findall(r'compile\.function\("(\w+)"', kernels[name].read_text())) for name in set(OPS) - CPU_ALONE}
    launched["embedding"] = launched["gather_rows"]  # the same under the names of a table
    names = "move_tokens", "attention_mass", "attention_in_part", "page_scores"
    others = *compile.HERE.glob("cho*.py"), *(compile.HERE / f"{name}.py" for name in names)
    launched |= {path.stem: set(re.findall(r'compile\.function\("(\w+)"', path.read_text())) for path in others}
    for name, sources in launched.items():
        assert sources, f"{name}.py launches nothing"
        assert sources <= set(NAMES), f"{name}.py launches what has no source: {sources - set(NAMES)}"
    assert set().union(*launched.values()) == set(NAMES)


@pytest.fixture(scope="module")
def reports():
    """(name, target) -> report of its kernels, or what the compiler said. Made in processes, as many as there are cores."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="NVRTC's package is not installed: pip install 'edgeattn[test]'",
                        exc_type=ImportError)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) as pool:
        jobs = [(name, target) for name in NAMES for target in compile.TARGETS]
        return dict(zip(jobs, pool.map(build, *zip(*jobs))))


def build(name, target):
    try:
        return compile.report(compile.build(name, target)[1])
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", compile.TARGETS)
def test_compiles_without_spills(reports, name, target):
    made = reports[name, target]
    assert isinstance(made, dict), made
    assert made, f"{name}.cu has no kernel"
    spilled = {kernel: found for kernel, found in made.items() if found["spill_bytes"] or found["stack"]}
    assert not spilled, f"{name}.cu for sm_{target} keeps registers in memory: {spilled}"
