"""What the host does for prompts that read a part on a GPU: which policies, from where on, and what a call tells the kernels."""
import numpy as np
import pytest
from imitated_gpu import make_backend

from edgeattn.cuda_limits import prefill_refusal
from edgeattn.policies import load_policy


def test_where_prompts_begin_to_read_a_part(monkeypatch):
    """The longer a chunk and the wider a layer, the sooner; who reads as much as there is never does."""
    backend, auto = make_backend(monkeypatch), load_policy("prefill", "auto")
    found = [backend.lists_from(auto, 4 * chunk * 32 * 64) for chunk in (256, 512, 2048)]
    assert found == sorted(found, reverse=True) and 4_000 < found[1] < 8_000
    assert backend.lists_from(load_policy("prefill", "auto", {"fraction": 1.0}), 1e6) > 1 << 30
    assert backend.lists_from(load_policy("prefill", "xattention"), 1e6) == load_policy("prefill", "xattention").min_len


def test_a_call_tells_which_prompts_read_lists(monkeypatch):
    """Blocks and pages are numbered on over the sequences that have lists, as far as kernels' scratch goes."""
    from types import SimpleNamespace
    cache = SimpleNamespace(shape=(2, 2), plan=SimpleNamespace(max_pages=20))
    batch = make_backend(monkeypatch).batch(256, 4, 4, cache)
    assert batch.arguments()["batch.prefill_lists"] == 0
    batch.hold_lists(2)
    assert batch.arguments()["batch.prefill_lists"] == batch.address(batch.prefill_lists)
    assert batch.list_prompt(0, 320, 70, 0) and batch.list_prompt(2, 300, 64, 2) and not batch.list_prompt(3, 64, 64, 0)
    np.testing.assert_array_equal(batch.chunks[[0, 2]], [[0, 0, 0], [2, 10, 2]])
    assert batch.prefill_lists[2] - batch.prefill_lists[0] == 4 * 2 * 2 * (4 + 20) and batch.listed == 3
    batch.clear()
    assert batch.listed == 0 and batch.list_prompt(1, 640, 64, 0)


@pytest.mark.parametrize("name, options, works", [
    ("auto", {}, True), ("sale", {}, True), ("xattention", {}, True), ("xattention", {"stride": 4}, False), ("hip", {}, False)])
def test_prefill_policies(name, options, works):
    policy = load_policy("prefill", name, options)
    assert (not prefill_refusal(policy)) == works and prefill_refusal(policy, "tail") and prefill_refusal(policy, None, 72, 8)
