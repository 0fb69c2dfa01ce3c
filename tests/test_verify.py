"""edgeattn verify: a device that computes right passes, and faults planted in kernels and around them are found."""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from numba.core import config

from edgeattn import kernels_cpu
from edgeattn.backend_cpu import CpuBackend
from edgeattn.exporters.export import export
from edgeattn.ops import OPS, load_kernel
from edgeattn.scheduler import Scheduler
from edgeattn.verification import cases, operators, settings
from edgeattn.verification.settings import Setting

SOURCES = Path(kernels_cpu.__file__).parent


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(operator, right, wrong): the operator's kernel is compiled again with that text of its source exchanged, and used."""
    def plant(operator, right, wrong):
        source = (SOURCES / f"{operator}.py").read_text()
        assert source.count(right) == 1
        path = tmp_path / f"faulty_{operator}.py"
        path.write_text(source.replace(right, wrong))
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "compiled"))
        spec = importlib.util.spec_from_file_location(f"edgeattn.kernels_cpu.faulty_{operator}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, f"edgeattn.kernels_cpu.{operator}", module)
        monkeypatch.setattr(kernels_cpu, operator, module)
    return plant


FAULTS = {  # in the text of a kernel: what it is exchanged for
    "the-last-vector-is-left-out": ("add", "for i in range(0, whole, 16)", "for i in range(0, whole - 16, 16)"),
    "one-element-too-far": ("rms_normalization", "load(F, weight, i))", "load(F, weight, i + 1))"),
    "the-gate-s-neighbour": ("gated_activation", "up = gate + width", "up = gate + width - 1"),
    "a-scale-of-another-row": ("embedding_nbits", "place = block * 16 + row % 16", "place = block * 16 + (row + 1) % 16"),
    "the-row-after": ("gather_rows", "[row] * a[X_STRIDE]", "[row] * a[X_STRIDE] + 1"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_s_source_is_found(plant, fault):
    name = FAULTS[fault][0]
    assert operators.check_operator(name, "cpu").passed
    plant(*FAULTS[fault])
    found = operators.check_operator(name, "cpu")
    assert found.passed is False and found.figures["worst"] > 1 and found.note.endswith("differs")


@pytest.mark.parametrize("name", OPS)
def test_one_number_off_by_a_little_more_than_allowed_is_found(monkeypatch, name):
    tolerances = [tolerance for _, _, tolerance in cases.CASES[name]]

    def kernel(*args, **attributes):
        found = load_kernel(name, "cpu")(*args, **attributes)
        first = (found[0] if isinstance(found, tuple) else found).copy()
        first.flat[-1] = first.flat[-1] ^ 1 if first.dtype.kind in "iu" else first.flat[-1] + max(1.5 * max(tolerances), 1e-3)
        return (first, *found[1:]) if isinstance(found, tuple) else first
    monkeypatch.setattr(operators, "load_kernel", lambda n, device: kernel if device == "cpu" else load_kernel(n, device))
    assert operators.check_operator(name, "cpu").passed is False


@pytest.mark.parametrize("got", [[1.0, np.nan], [1.0, np.inf], [1.0], [[1.0, 2.0]], [1.0, 2.1]], ids=str)
def test_what_is_no_number_is_a_deviation(got):
    assert operators.deviation(np.array(got), np.array([1.0, 2.0]), 0.01) > 1
    assert operators.deviation(np.array([np.nan]), np.array([np.nan]), 0.0) == 0


def test_what_a_device_does_not_have_is_left_out(monkeypatch):
    def refuses(*args, **attributes):
        raise ValueError("3-bit weights run on the CPU alone: use --device cpu")
    monkeypatch.setattr(operators, "load_kernel", lambda name, device: refuses)
    found = operators.check_operator("matmul_nbits", "cuda")
    assert found.passed is None and found.figures["cases"] == 0 and "CPU" in found.note
    failed = operators.check_operator("matmul_nbits", "cpu")  # which has everything
    assert failed.passed is False and "ValueError: 3-bit weights" in failed.note
    monkeypatch.undo()
    assert operators.check_operator("score_excess", "cuda").note == "has no kernel for cuda"


# ---- settings --------------------------------------------------------------------------------------------------------
def sealed_elsewhere(monkeypatch):
    """Quantised pages land one page further."""
    seal = CpuBackend.seal
    monkeypatch.setattr(CpuBackend, "seal", lambda self, table, depth, sources, targets: seal(
        self, table, depth, sources, np.roll(targets, 1)))


def another_layers_lists(monkeypatch):
    """A layer reads what another one chose, or nothing sensible."""
    arguments = Scheduler.arguments
    monkeypatch.setattr(Scheduler, "arguments", lambda self, layer: arguments(self, layer) | {
        "selection.group": arguments(self, (layer + 3) % len(self.sources))["selection.group"]})


def prompts_lists_without_pages(monkeypatch):
    """Blocks of queries get the plan of the block before."""
    from edgeattn.policies.prefill.auto import Auto
    select = Auto.select

    def shifted(self, *args, **more):
        plan = select(self, *args, **more)
        plan.blocks[:] = np.eye(plan.blocks.shape[-1], dtype=bool)[-1]
        return plan
    monkeypatch.setattr(Auto, "select", shifted)


def chosen(flags):
    return next(setting for setting in settings.settings(True) if setting.flags == flags)


@pytest.fixture
def check(nano_int4, monkeypatch):
    def check(*wanted):
        monkeypatch.setattr(settings, "settings", lambda every: iter(wanted))
        return settings.check_settings(nano_int4, "cpu", True)
    return check


@pytest.mark.parametrize("fault, flags", [(sealed_elsewhere, "-ctk int8 -ctv int8"), (sealed_elsewhere, "-ctk int2 -ctv int2"),
                                          (prompts_lists_without_pages, "--sparse-prefill auto")])
def test_a_fault_around_the_kernels_is_found(check, monkeypatch, fault, flags):
    right, = check(chosen(flags))
    fault(monkeypatch)
    wrong, = check(chosen(flags))
    assert right.passed is True and wrong.passed is False, (right, wrong)


def test_a_setting_that_the_model_lacks_is_left_out(check):
    missing, works = check(Setting("--kv-heads razor", "evicts", dict(heads="razor")), Setting("-ctk f16 -ctv f16", "exact"))
    assert missing.passed is None and "calibrate" in missing.note
    assert works.passed is True and works.figures["kl"] == 0 and works.figures["top1"] == 1


def test_limits_are_of_trained_models(tmp_path, monkeypatch):
    """What codes and policies change in random weights' answers says nothing about the device; an answer that is no number still does."""
    tiny.save_tiny("llama", tmp_path / "checkpoint", max_position_embeddings=1024)
    export(tmp_path / "checkpoint", tmp_path / "out", precision="fp32")
    wanted = Setting("-ctk int2 -ctv int2", "int2", dict(k_type="int2", v_type="int2"))
    monkeypatch.setattr(settings, "settings", lambda every: iter([wanted]))
    found, = settings.check_settings(tmp_path / "out", "cpu", False)
    assert found.passed is None and found.figures["kl"] > found.figures["kl_limit"] and "untrained" in found.note
    answers = iter([settings.answers, lambda model, ids: np.full((settings.CHUNK + settings.DECODED, model.vocab_size), np.nan)])
    monkeypatch.setattr(settings, "answers", lambda model, ids: next(answers)(model, ids))
    assert settings.check_settings(tmp_path / "out", "cpu", False)[0].passed is False


def test_every_type_and_policy_is_among_the_settings():
    from edgeattn.cache.options import evictions
    from edgeattn.policies import policy_names
    text = "\n".join(setting.flags for setting in settings.settings(True)) + "\n"
    flags = {"storage": "--kv-storage", "heads": "--kv-heads", "decode": "--sparse-attention", "prefill": "--sparse-prefill"}
    assert all(f"{flag} {name}" in text for kind, flag in flags.items() for name in policy_names(kind))
    assert all(f"--kv-eviction {name}\n" in text for name in evictions())
    assert all(f"-ctk {kind}" in text for kind in ("f32", "f16", "int8", "int4", "int3", "int2"))
    assert len(list(settings.settings(False))) < 10


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_command_passes_and_tells(edgeattn, nano_int4):
    done = edgeattn("verify", nano_int4)
    assert done.returncode == 0, done.stdout
    for text in (*OPS, "against onnxruntime: rms error", "-ctk int2 -ctv int2", "--sparse-prefill auto", "checks passed"):
        assert text in done.stdout


def test_the_command_fails_where_a_kernel_does(edgeattn, nano_int4, plant):
    plant(*FAULTS["one-element-too-far"])
    done = edgeattn("verify", nano_int4, "--only", "operators,export")
    assert done.returncode == 1 and "FAILED: do not trust" in done.stdout
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("  FAILED")]
    assert failed == ["rms_normalization", nano_int4.name]
    found = json.loads(edgeattn("verify", nano_int4, "--only", "operators", "-o", "json").stdout)
    assert found["passed"] is False and {check["name"]: check["passed"] for check in found["checks"]} == {
        name: name != "rms_normalization" for name in OPS}


def test_mistakes(edgeattn, nano_int4):
    assert "wanted some of operators,export,settings" in edgeattn.fails("verify", nano_int4, "--only", "kernels")
