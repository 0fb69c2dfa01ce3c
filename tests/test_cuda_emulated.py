"""The CUDA kernels' tests without a GPU: kernels run on the CPU (tests/emulated_gpu). In CI, where CI=true, only: minutes."""
import os
import subprocess
import sys
import time
from pathlib import Path

import emulated_gpu
import pytest
from cuda_device import cuda_missing
from emulated_gpu.translate import translate

TESTS = Path(__file__).parent
PARTS = {  # run side by side, for two cores; a GPU runs all of them
    "products and models": "test_cuda_kernels.py test_cuda_fused.py test_cuda_tiny.py test_cuda_tiny_prompts.py test_cuda_chosen.py "
                           "-k 'not (caote or zipvl or h2o and int4 or snapkv and f16 or int2 or f16 and (anchor or hip or flex or "
                           "sample_attention or sparge or dhsa) or proxy or pbs or dhsa_chunks or f16 and seer or come_back and f16 or "
                           "tail and f16 or duo or many_pages or budgets and not options0 or "
                           "other_scores and not (less_is_more and f16 or hisa and int4) or "
                           "other_pages or rotated_keys and not quest or other_ways and not akvq)'",
    "attention": "test_cuda_attention.py test_cuda_in_part.py test_cuda_moves.py test_cuda_prefill.py test_cuda_parts.py -k '"
                 "(not behind or 64 and f16) and (shape4 or not (lists_are or lines_are or heavy or delta_adds or tail_counts or "
                 "samples_say or alike) or shape3 and int4) and not (True and (ranks or spans or lines_are or heavy or samples_say or "
                 "alike or anchor) or delta_adds and minference or tail_counts and (True or shape3 or not int4))'",
    "gates and single keys": "test_cuda_gate.py test_cuda_sorted.py test_cuda_chunks.py -k 'int4 and False and (shape4 or sorted and "
                             "options1 and shape0) or wait_for and False or hold_other'",
}
FAULT = """
import sys
import conftest, emulated_gpu, numpy as np
emulated_gpu.install()
from edgeattn.verification.cases import matmul_ternary_case
from edgeattn.kernels_cuda import compile
from edgeattn.ops import load_kernel
source = compile.source
compile.source = lambda name: source(name).replace(*sys.argv[1:])
args, about = matmul_ternary_case(np.random.default_rng(), 130, 64, 512, 2, 8, False)
got, expected = (load_kernel("matmul_ternary", device)(*args, **about) for device in ("cuda", "reference"))
print("right" if np.allclose(got, expected, rtol=0, atol=1e-3) else "wrong")
"""
PROMPT_FAULT = """
import sys
import conftest, emulated_gpu
emulated_gpu.install()
import test_cuda_prefill as tests
from edgeattn.kernels_cuda import compile
source = compile.source
compile.source = lambda name: source(name).replace(*sys.argv[1:] if name in ("choose_by_lines", "attention_prefill") else ("", ""))
case = (4, 2, 64), [200], [130], [0], "int4"
try:
    tests.test_lines_are_where_the_weight_is("lines", *case, False)
    tests.test_delta_adds_what_the_first_query_of_a_block_lacked("auto", tests.LITTLE, *case)
    print("right")
except AssertionError:
    print("wrong")
"""
PASS_ON = r"""
extern "C" __global__ void pass_on(i64 from, i64 size, i64 memory, i64 blocks)
{
    DYNAMIC_SHARED(float, own);
    const Exchange exchange{memory, blocks};
    const int gang = (int)(blockIdx.y * (gridDim.x / size) + blockIdx.x / size), block = (int)(blockIdx.x % size);
    float* x = reinterpret_cast<float*>(from) + blockIdx.y * gridDim.x + blockIdx.x;
    float held = *x;
    for (u32 turn = 1; turn < 6; turn++) {
        if (threadIdx.x == 33) tell(exchange.words(gang, block) + turn, held, turn);
        u64 word;
        do word = hear(exchange.words(gang, (int)((block + 1) % size)) + turn);
        while (turn_of(word) != turn);
        held = told_by(word) + 1;
    }
    if (threadIdx.x == 0) *x = held;
}
"""
GANG_FAULT = """
import re, sys
import emulated_gpu, numpy as np
emulated_gpu.install()
from edgeattn.kernels_cuda import compile, exchange, steps
headers = "".join((compile.HERE / name).read_text() for name in ("common.cuh", "halves.cuh", "page_pool.cuh", "exchange.cuh"))
compile.source = lambda name: (re.sub("#(include|pragma).*", "", headers) + PASS_ON).replace(*sys.argv[1:])
x, memory = np.arange(24, dtype=np.float32).reshape(2, 12), np.zeros(exchange.nbytes(24), np.uint8)
args = tuple(map(np.int64, (x.ctypes.data, 4, memory.ctypes.data, 24)))
steps.run([steps.Launch(compile.function("pass_on", "pass_on"), (12, 2, 1), 64, args, 64, gang=4)])
print("right" if np.array_equal(x, np.roll(np.arange(24).reshape(2, 3, 4), -5, axis=2).reshape(2, 12) + 5) else "wrong")
""".replace("PASS_ON", repr(PASS_ON))
SECONDS = 1800  # some minutes on two quiet cores


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="runs in CI (CI=true)")
@pytest.mark.skipif(not cuda_missing(), reason="a GPU is there")
def test_kernels_on_an_emulated_gpu():
    assert not emulated_gpu.missing()
    environment = os.environ | {"EDGEATTN_EMULATE_CUDA": "1", "NUMBA_NUM_THREADS": "1"}
    command = f"cd '{TESTS}' && '{sys.executable}' -m pytest -q -x -p no:cacheprovider "
    running = {part: subprocess.Popen(["bash", "-c", command + files], env=environment, text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT) for part, files in PARTS.items()}
    end = time.monotonic() + SECONDS
    try:
        for part, process in running.items():
            output, _ = process.communicate(timeout=max(1, end - time.monotonic()))
            assert process.returncode == 0 and " passed" in output and " skipped" not in output, f"{part}: {output[-3000:]}"
    finally:
        for process in running.values():
            process.kill()


def test_instructions_become_calls():
    text = 'asm volatile("ld.x.v2 {%0, %1}, [%2], 16;" : "=r"(a[0]), "=r"(f(b, 1)) : "l"(p + (n)) : "memory"); DYNAMIC_SHARED(uint4, m);'
    assert translate(text) == ("ptx::ld_x_v2((a[0]), (f(b, 1)), (p + (n)), 16); "
                               "uint4* const m = reinterpret_cast<uint4*>(emulated::shared);")
    with pytest.raises(ValueError, match="not one instruction"):
        translate('asm("add %0, %1; sub %0, %1;" : "=r"(a) : "r"(b));')


@pytest.mark.skipif(bool(emulated_gpu.missing()), reason=emulated_gpu.missing())
@pytest.mark.parametrize("whole, part, said", [
    ("", "", "right"), ("cp_async_wait<STAGES - 2>();", "", "wrong"), ("__syncthreads();", "", "wrong"),
    ("x_step = threadIdx.x % 4", "x_step = threadIdx.x % 2", "wrong")])
def test_faults_show(whole, part, said):
    """The last of them a wrong address; the others waits that are missing."""
    assert output_with(FAULT, whole, part) == f"{said}\n"


@pytest.mark.skipif(bool(emulated_gpu.missing()), reason=emulated_gpu.missing())
@pytest.mark.parametrize("whole, part, said", [
    ("", "", "right"), ("cp_async_wait<0>();", ";", "wrong"), ("tile + 1 < tiles ? others[n]", "false ? others[n]", "wrong"),
    ("begin + t - TILE < slots", "begin + t - TILE < slots - 40", "wrong"), ("APART * (tokens - 1)", "(tokens - 1)", "wrong"),
    ("sum * before + partial[depth + 1] * now", "sum + partial[depth + 1]", "wrong")])
def test_faults_in_what_prompts_read_show(whole, part, said):
    """Of lines a missing wait, half of what a distance is asked for, and the newest keys; of Delta what is seen, and sums of ranges."""
    assert output_with(PROMPT_FAULT, whole, part) == f"{said}\n"


@pytest.mark.skipif(bool(emulated_gpu.missing()), reason=emulated_gpu.missing())
@pytest.mark.parametrize("whole, part, said", [("", "", "right"), ("turn_of(word) != turn", "false", "wrong")])
def test_gangs_wait_for_each_other(whole, part, said):
    assert output_with(GANG_FAULT, whole, part) == f"{said}\n"


@pytest.mark.skipif(bool(emulated_gpu.missing()), reason=emulated_gpu.missing())
def test_an_address_that_is_not_aligned_ends_the_run():
    with pytest.raises(AssertionError, match="not aligned"):
        output_with(GANG_FAULT, "float held = *x;", "float held = *(float*)((char*)x + size / 2);")


def output_with(script, whole, part):
    done = subprocess.run([sys.executable, "-c", script, whole, part], cwd=TESTS, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout
