"""Instruction levels: each that this machine has gives the right results with the instructions it promises."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import boolean, float32, int8, int32, int64, njit, types, uint8, uint16

from edgeattn import kernels_cpu
from edgeattn.kernels_cpu import LEVEL, available_levels, cache_key, compile_features, linux_arm_features, matmul_ternary
from edgeattn.kernels_cpu.gemm_nbits import sweep4
from edgeattn.kernels_cpu.gemv_nbits import gemv_1_2, gemv_1_3, gemv_1_4, gemv_1_8
from edgeattn.kernels_cpu.simd import SIGNED_BYTES, convert, dot4, dot8, f32, hsum, i8, i32, load, load_half, nearest, store, u8

TESTS = Path(__file__).parent
SDOT_BY_LANE = r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[[0-3]\]"
PROMISES = {  # what the assembly of 4- and 8-bit GEMV must hold, and must not
    "avx512": (r"vpdpbusd.*%zmm", r"vpdpbusd.*%zmm", r"maddubs"),
    "avxvnni": (r"\{vex\}\s+vpdpbusd.*%ymm", r"\{vex\}\s+vpdpbusd.*%ymm", r"%zmm|maddubs"),
    "avx2": (r"vpmaddubsw.*%ymm", r"vpsignb.*%ymm", r"%zmm|vpdpbusd"),
    "plain": (r"", r"", r"vpdpbusd|maddubs|%[yz]mm|sdot"),
    "neon": (SDOT_BY_LANE, SDOT_BY_LANE, r"smmla"),
    "i8mm": (SDOT_BY_LANE, SDOT_BY_LANE, r"udot"),
}

FLOAT_KERNELS = "rms_normalization or gated_activation-silu or linear-3x or linear-100x or sample-chain or batch_of_prefill_and_decode[32"
FLOATS = types.CPointer(float32)
ACTIVATIONS = types.Tuple([types.CPointer(t) for t in (int8, float32, int32, float32)])


def assembly(function, *signature):
    """Of a function that cached workers contain."""
    function.compile(signature)
    return "\n".join(function.inspect_asm().values())


def test_expected_instructions():
    four, eight, never = PROMISES[LEVEL]
    weights = types.Tuple([types.CPointer(t) for t in (uint8, uint16, uint8)])
    for function, wanted in ((gemv_1_4, four), (gemv_1_8, eight)):
        text = assembly(function, weights, ACTIVATIONS, *(FLOATS,) * 3, types.UniTuple(int64, 7), types.UniTuple(boolean, 2))
        assert re.search(wanted, text)
        assert not re.search(never, text)


@pytest.mark.parametrize("function", [gemv_1_2, gemv_1_3, matmul_ternary.gemv_1_2, matmul_ternary.gemv_1_1],
                         ids=["2 bits", "3 bits", "ternary", "five to a byte"])
def test_expected_instructions_of_few_bits(function):
    of_digits = function is matmul_ternary.gemv_1_1
    scales = uint16 if function in (gemv_1_2, gemv_1_3) else float32
    weights = types.Tuple([types.CPointer(t) for t in (uint8, scales, uint8)])
    text = assembly(function, weights, ACTIVATIONS, *(FLOATS,) * 3, types.UniTuple(int64, 7), types.Tuple((int64, boolean)))
    assert re.search(PROMISES[LEVEL][1 if of_digits else 0], text)
    assert not re.search(PROMISES[LEVEL][2], text)
    if of_digits and LEVEL != "plain":  # tripling bytes takes additions
        assert not re.search(r"vpmullw|\bmul\s+v\d+\.16b|gf2p8", text)


def test_expected_instructions_of_many_tokens():
    weights, start = types.Tuple((types.CPointer(uint8), FLOATS, FLOATS)), types.Tuple((FLOATS, int64, int64))
    text = assembly(sweep4, weights, ACTIVATIONS, *(int64,) * 4, boolean, start, FLOATS, int64, int64)
    assert re.search(r"smmla" if LEVEL == "i8mm" else PROMISES[LEVEL][0], text)


F16, I16, U64, S64 = f32(16), i32(16), u8(64), i8(64)


@njit
def _dot_both(codes, values, out4, out8):
    a, b = load(U64, codes, 0), load(S64, values, 0)
    store(out4, 0, dot4(load(I16, out4, 0), a & 127, b))
    store(out8, 0, dot8(load(I16, out8, 0), a, b))


@pytest.mark.parametrize("extreme", [False, True])
def test_dots(extreme):
    rng = np.random.default_rng()
    codes, values = rng.integers(0, 256, 64, np.uint8), rng.integers(-127, 128, 64, np.int8)
    if extreme:
        codes, values = rng.choice([0, 127, 128, 255], 64).astype(np.uint8), rng.choice([-127, 127], 64).astype(np.int8)
    start = rng.integers(-1000, 1000, 16, np.int32)
    out4, out8 = start.copy(), start.copy()
    _dot_both(codes, values, out4, out8)
    seen = codes.view(np.int8) if SIGNED_BYTES else codes

    def dot(w):
        return start + (w.astype(np.int32) * values).reshape(16, 4).sum(1)
    np.testing.assert_array_equal(out4, dot(codes & 127))
    np.testing.assert_array_equal(out8, dot(seen))


@njit
def _halves(bits, out):
    for i in range(0, bits.size, 16):
        store(out, i, load_half(F16, bits, i))


def test_every_half():
    bits, out = np.arange(1 << 16, dtype=np.uint16), np.empty(1 << 16, np.float32)
    _halves(bits, out)
    with np.errstate(invalid="ignore"):  # some of them are NaN
        np.testing.assert_array_equal(out, bits.view(np.float16).astype(np.float32))


@njit
def _round(x, out, sums):
    n, whole = nearest(load(F16, x, 0))
    store(out, 0, n)
    store(sums, 0, whole)
    store(sums, 16, convert(F16, convert(I16, load(F16, x, 0))))
    return hsum(whole)


def test_rounding():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -127.4, 3e6, -3e6, 0, 7, -7, 0.49999997, 1e-20, 99.5, -100.5], np.float32)
    out, floats = np.empty(16, np.int32), np.empty(32, np.float32)
    total = _round(x, out, floats)
    np.testing.assert_array_equal(out, np.rint(x))
    np.testing.assert_array_equal(floats, np.tile(np.rint(x), 2))
    assert total == np.rint(x).sum()


# ---- levels and the cache folder ---------------------------------------------------------------------------------
def python(*arguments, **environment):
    return subprocess.run([sys.executable, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)


@pytest.mark.parametrize("level", list(PROMISES))
def test_level(level):
    """The tests of this file and of the operators that use dot products, with that level forced and three threads.

    Two levels, of half the vector's width and of none, take some of the float kernels too.
    """
    if os.environ.get("EDGEATTN_SIMD"):
        pytest.skip("a level is forced already")
    if level not in available_levels():
        pytest.skip(f"this machine has {available_levels()}")
    if level == LEVEL:
        pytest.skip("the level of all other tests")
    files = [str(TESTS / f"test_{name}.py") for name in ("simd", "nbits", "kernels", "attention")]
    chosen = "simd or nbits or ternary" + (f" or {FLOAT_KERNELS}" if level in ("avx2", "plain") else "")
    done = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen, EDGEATTN_SIMD=level, NUMBA_NUM_THREADS="3")
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("hwcap, hwcap2, features, levels", [
    (0x887, 0, set(), ["plain"]),                                                                # Raspberry Pi 4
    (0x119FFF, 0, {"fullfp16", "dotprod"}, ["neon", "plain"]),                                   # Raspberry Pi 5
    (0xDFFFFFFF, 0x1F201, {"fullfp16", "dotprod", "i8mm"}, ["i8mm", "neon", "plain"])])          # Graviton 3
def test_levels_of_arm_machines(hwcap, hwcap2, features, levels, monkeypatch):
    monkeypatch.setattr(kernels_cpu, "ARM", True)
    for name in ("CPU_NAME", "CPU_FEATURES"):
        monkeypatch.setattr(kernels_cpu.config, name, None)
    assert linux_arm_features(hwcap, hwcap2) == features
    text = compile_features("+crc,+neon", features)
    assert text is None if not features else text == ",".join(["+crc,+neon", *(f"+{f}" for f in sorted(features))])
    monkeypatch.setattr(kernels_cpu.config, "CPU_FEATURES", text or "+crc,+neon")
    assert available_levels() == levels


def test_numbas_own_settings_win(monkeypatch):
    monkeypatch.setattr(kernels_cpu.config, "CPU_NAME", "cortex-a53")
    monkeypatch.setattr(kernels_cpu.config, "CPU_FEATURES", None)
    assert compile_features("+neon", {"dotprod"}) is None
    monkeypatch.setattr(kernels_cpu.config, "CPU_FEATURES", "+crc")
    assert compile_features("+neon", {"dotprod"}) == "+crc"


def test_unknown_level():
    done = python("-c", "import edgeattn.kernels_cpu", EDGEATTN_SIMD="mmx")
    assert done.returncode == 1
    assert re.search(r"ValueError: EDGEATTN_SIMD must be one of \['.*'\] on this machine, got 'mmx'", done.stderr)


def test_cache_follows_sources(tmp_path):
    sources = tmp_path / "kernels"
    shutil.copytree(Path(kernels_cpu.__file__).parent, sources, ignore=shutil.ignore_patterns("__pycache__"))
    before = cache_key(sources, LEVEL)
    assert before == cache_key(Path(kernels_cpu.__file__).parent, LEVEL) and kernels_cpu.CACHE_FOLDER.name == f"kernels-{before}"
    assert cache_key(sources, "other") != before
    helper = sources / "simd_emit.py"
    helper.write_text(helper.read_text().replace("12582912.0", "12582913.0"))
    assert cache_key(sources, LEVEL) != before


def test_second_process_compiles_nothing(tmp_path):
    code = "import edgeattn.kernels_cpu as k, edgeattn.kernels_cpu.embedding_nbits; print(k.CACHE_FOLDER, k.cached_kernels())"
    places = [python("-c", code, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path)).stdout.split() for _ in range(2)]
    assert places[0] == places[1] and places[0][0].startswith(str(tmp_path)) and int(places[0][1]) > 1
    stamps = {path: path.stat().st_mtime_ns for path in Path(places[0][0]).rglob("*.nb*")}
    python("-c", code, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path))
    assert stamps == {path: path.stat().st_mtime_ns for path in Path(places[0][0]).rglob("*.nb*")}
