"""Whole tiny models on a GPU, or on an emulated one, against the CPU: prompts that read a part."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from tiny_on_gpu import CLOSE, RNG, WHOLE, both, error, make, run

from edgeattn import runtime
from edgeattn.cache.options import CacheOptions
from edgeattn.prefill_scheduler import PrefillOptions

pytestmark = needs_cuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("method, options, correction", [
    ("auto", {"budget": 96, "least": 64, "fraction": 0.1, "recent": 1}, None), ("xattention", {"tau": 0.6}, None),
    ("sale", {"threshold": 10, "bits": 8}, None), ("minference", {"n_v": 40, "n_s": 60, "recent": 0}, None),
    ("flex_prefill", {"gamma": 0.3, "tau": 1.0, "budget": 0, "recent": 0}, None),
    ("sample_attention", {"columns": 0.1, "slashes": 0.05, "recent": 1}, None), ("sparge_attn", {"fraction": 0.3, "recent": 0}, None),
    ("dhsa", {"density": 0.2, "mode": "vs", "recent": 0}, None), ("dhsa", {"density": 0.3, "mode": "vsb", "recent": 0}, None),
    ("seer_attention", {"fraction": 0.2, "recent": 0}, None), ("pbs_attn", {"tau": 0.3, "segment": 64, "recent": 0}, None),
    ("dhsa_chunks", {"budget": 130, "recent": 0}, None), ("anchor", {"theta": 4.7, "step": 2, "recent": 0}, None),
    ("proxy_attn", {"gamma": 0.4, "budget": 0, "recent": 0}, None), ("hip", {"keep": 1, "beam": 2, "sink": 1, "recent": 0}, None),
    ("streaming", {"sink": 1, "recent": 2}, "delta"), ("streaming", {"sink": 1, "recent": 2}, "tail")])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_a_prompt_that_reads_a_part(folder, cache, method, options, correction):
    prompt, found, read = RNG.integers(3, 150, 320), [], []
    for model in both(folder, CacheOptions(cache, cache), prefill=PrefillOptions(method, options, 0, correction)):
        found.append(run(model, prompt, prompt[:2])[1])
        read.append(model.prefill.figures()["read"])
    whole = run(both(folder, CacheOptions(cache, cache))[0], prompt, prompt[:2])[1]
    print(f"{cache} {method}: {error(found[1], found[0]):.4f}, of what reads everything {error(whole, found[0]):.4f}; read {read}")
    assert error(found[1], found[0]) < error(whole, found[0]) / 2 and abs(read[1] - read[0]) < 0.1 and read[1] < 0.95


@pytest.mark.parametrize("method, options", [
    ("auto", {"budget": 96, "least": 64, "fraction": 0.1, "recent": 1}), ("dhsa", {"density": 0.2}),
    ("sparge_attn", {"fraction": 0.3, "recent": 0}), ("dhsa_chunks", {"budget": 130, "recent": 0})])
def test_a_prompt_that_reads_a_part_of_rotated_keys(folder, method, options):
    prompt, found, cache = RNG.integers(3, 150, 320), [], CacheOptions("int4", "int4", "hadamard")
    for model in (*both(folder, cache, prefill=PrefillOptions(method, options, 0)), both(folder, cache)[0]):
        found.append(run(model, prompt, prompt[:2])[1])
    apart, whole = error(found[1], found[0]), error(found[2], found[0])
    print(f"{method}: {apart:.4f}, of what reads everything {whole:.4f}")
    assert apart < whole / 2


def test_duo_s_kv_heads_choose_each_by_itself(folder, monkeypatch):
    """Where they hold different numbers of tokens, proxy_attn has no means of several."""
    monkeypatch.setattr(runtime, "head_classes", lambda *given: np.array([[True, False], [False, True]]))
    prompt, found, read, options = RNG.integers(3, 150, 450), [], [], PrefillOptions("proxy_attn", {"gamma": 0.4, "budget": 0}, 0)
    for model in both(folder, CacheOptions("f16", "f16", heads="duo"), prefill=options):
        a = model.new_sequence()
        found.append(model.forward([(a, prompt)], "all"))
        read.append(model.prefill.figures()["read"])
    assert len(set(a.counts[0])) == 2 and error(found[1], found[0]) < 0.3 and abs(read[1] - read[0]) < 0.05 and read[1] < 0.95


def test_a_prompt_without_room_for_its_lists_reads_everything(folder):
    """Two that share their beginning have more pages between them than scratch memory is for; each counts as what it was."""
    prompt, ends, found = RNG.integers(3, 150, 330), RNG.integers(3, 150, (2, 130)), []
    for prefill in (WHOLE, PrefillOptions("streaming", {"sink": 1, "recent": 0}, 410)):
        model = both(folder, CacheOptions("f16", "f16"), prefill=prefill, ubatch=512)[1]
        a = model.new_sequence()
        model.forward([(a, prompt)], "none")
        found.append(model.forward([(a, ends[0]), (model.fork(a), ends[1])], "all"))
    assert model.prefill.chunks == [2, 1]
    assert error(found[1][130:], found[0][130:]) < CLOSE["f16"] < 0.5 < error(found[1][:64], found[0][:64])
