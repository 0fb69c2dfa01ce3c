"""What the host does for prompts that read a part on a GPU: which policies, from where on, and what a call tells the kernels."""
import numpy as np
import pytest
from imitated_gpu import make_backend

from edgeattn import runtime
from edgeattn.cache.options import CacheOptions
from edgeattn.cuda_limits import matrix_lines, prefill_refusal
from edgeattn.kernels_cuda import choose_by_lines
from edgeattn.kernels_cuda.prefill_call import FEWEST, QUERIES, SEQUENCES, most_blocks, most_lists
from edgeattn.policies import load_policy
from edgeattn.prefill_scheduler import PrefillOptions, PrefillScheduler

RNG = np.random.default_rng()


def test_where_prompts_begin_to_read_a_part(monkeypatch):
    """The longer a chunk and the wider a layer, the sooner, as measured of 32 heads of 128; who reads as much as there is never does."""
    backend, auto = make_backend(monkeypatch), load_policy("prefill", "auto")
    found = [backend.lists_from(auto, 4 * chunk * 32 * 128) for chunk in (256, 512, 2048)]
    assert found == sorted(found, reverse=True) and 6_000 < found[1] < 8_000
    assert backend.lists_from(auto, 4 * 512 * 32 * 64) > found[1]
    assert backend.lists_from(load_policy("prefill", "auto", {"fraction": 1.0}), 1e6) > 1 << 30
    assert backend.lists_from(load_policy("prefill", "xattention"), 1e6) == load_policy("prefill", "xattention").min_len


def test_a_call_tells_which_prompts_read_lists(monkeypatch):
    """Blocks and pages are numbered on over the sequences that have lists, as far as kernels' scratch goes."""
    from types import SimpleNamespace
    cache = SimpleNamespace(shape=(2, 2), plan=SimpleNamespace(max_pages=20), options=CacheOptions())
    batch = make_backend(monkeypatch).batch(256, 4, 4, cache)
    assert batch.arguments()["batch.prefill_lists"] == 0
    batch.hold_lists(2)
    assert batch.arguments()["batch.prefill_lists"] == batch.address(batch.prefill_lists)
    assert batch.list_prompt(0, 320, 70, 0) and batch.list_prompt(2, 300, 64, 2) and not batch.list_prompt(3, 64, 64, 0)
    np.testing.assert_array_equal(batch.chunks[[0, 2]], [[0, 0, 0], [2, 10, 2]])
    assert batch.prefill_lists[2] - batch.prefill_lists[0] == 4 * 2 * 2 * (4 + 20) and batch.listed == 3
    batch.clear()
    assert batch.listed == 0 and batch.list_prompt(1, 640, 64, 0)
    with pytest.raises(ValueError, match="--ubatch-size 256 is too large .* among 640 tokens"):
        batch.hold_lists(2, 1 << 30)


@pytest.mark.parametrize("name, options, works", [
    ("auto", {}, True), ("sale", {}, True), ("xattention", {}, True), ("xattention", {"stride": 4}, False),
    ("hip", {}, True), ("hip", {"beam": 2049}, False),
    ("anchor", {}, True), ("proxy_attn", {}, True), ("proxy_attn", {"stride": 32, "proxies": 99}, True),
    ("minference", {}, True), ("minference", {"rows": 65}, False), ("moa", {}, True), ("streaming", {}, True), ("dhsa", {}, True),
    ("dhsa", {"mode": "vs"}, True), ("dhsa", {"mode": "vsb"}, True), ("flex_prefill", {}, True), ("sample_attention", {}, True),
    ("sample_attention", {"segment": 32}, False), ("sample_attention", {"rows": 65}, False), ("sparge_attn", {}, True),
    ("sparge_attn", {"mode": "cdf", "similarity": 0.6}, True), ("sparge_attn", {"skip": 10.0}, False)])
def test_prefill_policies(name, options, works):
    policy = load_policy("prefill", name, options)
    assert (not prefill_refusal(policy)) == (not prefill_refusal(policy, "delta")) == works
    assert prefill_refusal(policy, "tail") and prefill_refusal(policy, None, 72, 8)
    said = matrix_lines()[1].split(";")[1].split(",")[0].split()
    assert (name in said) == (not prefill_refusal(load_policy("prefill", name)))


def test_a_list_has_room_for_single_keys(monkeypatch):
    """Those of the KV head whose query heads have most; a head that goes by pages has none."""
    from types import SimpleNamespace
    cache = SimpleNamespace(shape=(2, 2), plan=SimpleNamespace(max_pages=20), options=CacheOptions())
    backend = make_backend(monkeypatch)
    batch = backend.batch(256, 4, 4, cache)
    policy, fitted = load_policy("prefill", "minference"), np.int32([[1, 30, 0], [0, 40, 9], [2, 900, 0], [1, 60, 5]])
    assert policy.single_keys(None, 4) == 4000 and policy.single_keys({"patterns": fitted[None]}, 2) == 70
    assert load_policy("prefill", "auto").single_keys(None, 4) == 0
    scheduler = PrefillScheduler(PrefillOptions("minference", {}, 0), 2, 2)
    scheduler.prepare(backend, batch, 20, 4)
    assert scheduler.operators(0)[0][1]["columns"] == 640  # no more than there are tokens
    assert batch.list_prompt(0, 320, 70, 0) and batch.list_prompt(1, 300, 64, 2)
    assert batch.prefill_lists[1] - batch.prefill_lists[0] == 4 * 2 * 2 * (4 + 20 + 640)


def test_a_prompt_without_room_for_its_list_counts_as_dense(monkeypatch):
    from types import SimpleNamespace
    backend, scheduler = make_backend(monkeypatch), PrefillScheduler(PrefillOptions("streaming", {}, 0), 2, 2)
    batch = backend.batch(512, 4, 4, SimpleNamespace(shape=(2, 2), plan=SimpleNamespace(max_pages=20), options=CacheOptions()))
    scheduler.prepare(backend, batch, 20, 4)
    calls = [(place, SimpleNamespace(length=n, counts=np.array([n])), 150 * place, 150, True) for place, n in enumerate((320, 352, 300))]
    assert all(scheduler.wants(sequence, count, last) for _, sequence, _, count, last in calls) and scheduler.chunks == [0, 3]
    assert scheduler.between(batch, calls, None) is None
    assert scheduler.chunks == [1, 2] and batch.prefill_lists[:3].astype(bool).tolist() == [True, False, True]


def test_scratch_is_for_as_many_prompts_as_a_call_may_have():
    assert SEQUENCES == runtime.MAX_SEQUENCES
    for tokens in (FEWEST, 100, 512, 5000, 32768):
        for count in (1, 5, min(SEQUENCES, tokens // FEWEST)):
            each = np.full(count, FEWEST)
            each += RNG.multinomial(max(0, tokens - each.sum()), np.ones(count) / count)
            if each.sum() <= tokens:
                assert (-(-each // QUERIES)).sum() <= most_blocks(tokens) and count <= most_lists(tokens)
    about = dict(num_heads=32, kv_heads=8, head_dim=128, pages=1024)
    assert choose_by_lines.workspace_bytes({}, about, 32768, 1) < 60 << 20  # sampled queries are of each prompt, not of each block
