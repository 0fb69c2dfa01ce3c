"""The structure of the source tree: imports go one way, every operator has its files, files stay small."""
import ast
from pathlib import Path

import pytest

from edgeattn.ops import OPS
from edgeattn.page_formats import BITS

ROOT = Path(__file__).parent.parent
FOLDERS = {"edgeattn": "edgeattn", "exporters": "edgeattn.exporters", "kernels_cpu": "edgeattn.kernels_cpu",
           "kernels_cuda": "edgeattn.kernels_cuda", "apps": "edgeattn.apps"}
LAYERS = [  # a file may import only from its own row or the rows above
    ["edgeattn.ops", "edgeattn.page_formats", "edgeattn.arguments", "edgeattn.device_profile", "edgeattn.reference", "edgeattn.folder",
     "edgeattn.private", "edgeattn.log_softmax",
     "edgeattn.__init__"],
    ["edgeattn.kernels_cpu", "edgeattn.kernels_cuda"],
    ["edgeattn.cache", "edgeattn.policies", "edgeattn.batch", "edgeattn.arena", "edgeattn.graph", "edgeattn.contract", "edgeattn.exported",
     "edgeattn.views", "edgeattn.segments", "edgeattn.plan", "edgeattn.tokenizer", "edgeattn.templates", "edgeattn.template_world",
     "edgeattn.bandwidth", "edgeattn.calibration", "edgeattn.calibrate_thresholds", "edgeattn.principal_components",
     "edgeattn.scheduler", "edgeattn.prefill_plan", "edgeattn.prefill_lists", "edgeattn.prefill_scheduler", "edgeattn.prefill_corrections",
     "edgeattn.prefill_crossover", "edgeattn.attention_case", "edgeattn.crossover", "edgeattn.recording", "edgeattn.page_sums",
     "edgeattn.calibrate_prefill", "edgeattn.backend_cpu", "edgeattn.backend_cuda", "edgeattn.cuda_limits", "edgeattn.devices",
     "edgeattn.device_batch", "edgeattn.device_launches", "edgeattn.device_pages", "edgeattn.device_sampling", "edgeattn.device_sequence",
     "edgeattn.sensors", "edgeattn.sensors_smi", "edgeattn.sensors_sysfs"],
    ["edgeattn.runtime", "edgeattn.rebuild", "edgeattn.memory_estimate", "edgeattn.context_shift", "edgeattn.generation",
     "edgeattn.conversation", "edgeattn.evaluation", "edgeattn.verification", "edgeattn.tuning"],
    ["edgeattn.exporters"],
    ["edgeattn.apps"],
]
HELPERS = {"__init__", "steps", "parallel", "simd", "simd_bits", "simd_emit", "simd_pairs", "floats", "float_tiles", "quantise",
           "quantise_tokens", "ternary_inputs", "gemm_nbits",
           "estimate_bytes", "stored_keys", "gemv_nbits", "attention_bytes", "attention_call", "attention_write", "attention_decode",
           "attention_prefill", "attention_prefill_int8", "attention_scores_int8", "attention_softmax",
           "attention_thresholds", "attention_compensation", "attention_fold", "attention_mass", "hadamard", "page_expand", "key_means",
           "page_index", "page_means", "page_pool", "page_rows", "rotate_heads", "page_scores", "page_scores_exact", "page_scores_index",
           "selection_call", "selection_choice", "selections", "top_pages",
           *(f"page_{kind}" for kind in BITS)}
WIDTH = 140                                                            # characters of a line
LONG = {"simd.py": 600}                                                # files that may pass 300 lines, and how far


def sources():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inside = path.relative_to(ROOT / folder).with_suffix("")
            name = ".".join([package, *inside.parts]) if inside.name != "__init__" or inside.parent.name == "" else \
                ".".join([package, *inside.parent.parts])
            yield pytest.param(path, name, id=name)


def level(module):
    found = [i for i, names in enumerate(LAYERS) for n in names if module == n or module.startswith(n + ".")]
    assert found, f"{module} is in no layer: add it to LAYERS"
    return found[0]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)  # a name may be a module: from edgeattn import apps


@pytest.mark.parametrize("path, module", list(sources()))
def test_imports_go_one_way(path, module):
    for name in imported(path):
        assert name.split(".")[0] not in set(FOLDERS) - {"edgeattn"}, f"{path}: import edgeattn.{name}, not {name}"
        if name.startswith("edgeattn."):
            assert level(name) <= level(module), f"{module} may not import {name}"


def test_a_package_imported_as_a_name_is_seen(tmp_path):
    (tmp_path / "module.py").write_text("from edgeattn import apps, ops\nimport edgeattn.cache")
    assert list(imported(tmp_path / "module.py")) == ["edgeattn.apps", "edgeattn.ops", "edgeattn.cache"]


def test_every_operator_has_reference_and_cpu_kernel():
    assert {p.stem for p in (ROOT / "kernels_cpu").glob("*.py")} - HELPERS == set(OPS)
    assert {p.stem for p in (ROOT / "edgeattn/reference").glob("*.py")} - {"__init__"} == set(OPS)


FILES = [pytest.param(p, id=str(p.relative_to(ROOT))) for f in (*FOLDERS, "tests", "benchmarks", "models")
         for p in sorted((ROOT / f).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES)
def test_files_stay_small(path):
    assert len(path.read_text().splitlines()) <= LONG.get(path.name, 300)


FILES += [pytest.param(p, id=f"page/{p.name}") for p in sorted((ROOT / "apps/web/page").iterdir()) if p.suffix != ".svg"]
CUDA = [pytest.param(p, id=str(p.relative_to(ROOT))) for p in sorted((ROOT / "kernels_cuda").glob("*.cu*"))]


@pytest.mark.parametrize("path", FILES + CUDA)
def test_lines_stay_short(path):
    long = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > WIDTH]
    assert not long, f"lines {long}"
