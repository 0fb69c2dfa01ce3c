"""Keys that are cut into chunks on a GPU, and what is read of them, against the policy in NumPy."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import LAST, SHAPES, Prompts, pairs_of
from test_cuda_parts import keys_of

from edgeattn.kernels_cuda import choose_by_chunks, device
from edgeattn.kernels_cuda.prefill_call import QUERIES, most_blocks
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.policies.prefill import dhsa_chunks
from edgeattn.policies.prefill.dhsa_chunks import SIDE, boundaries
from edgeattn.prefill_plan import causal

pytestmark = needs_cuda


def found_chunks(prompts, head=0):
    """Of each sequence that has lists: (scores of places, where chunks begin), as the KV head has them, or all together the first."""
    pages, page, place, found = prompts.pages(), 0, 0, {}
    offsets = choose_by_chunks.offsets(prompts.about | {"pages": pages}, pages, sum(prompts.new))
    scratch = prompts.scratch(offsets[-1])
    floats, ints = scratch.view(np.float32), scratch.view(np.int32)
    turns, starts, counts = (offsets[choose_by_chunks.ARRAYS.index(name)] // 4 for name in ("turns", "starts", "counts"))
    slots = prompts.cache.slot_counts.get()
    for s in prompts.listed:
        first, m = head * pages + page, slots[s, head]
        count = ints[counts + head * most_blocks(sum(prompts.new)) + place]
        found[s] = floats[turns + PAGE * first:][:m - 2 * SIDE + 1], ints[starts + 4 * first:][:count]
        page, place = page - -(prompts.lengths[s] + prompts.new[s]) // PAGE, place - -prompts.new[s] // QUERIES
    return found


def by(monkeypatch, turns, starts):
    """The policy cuts where the kernels do, if that is where it would by their scores, and these are nearly its own."""
    def cut(scores, turn, count, m):
        np.testing.assert_allclose(turns, scores, atol=1e-5)
        np.testing.assert_array_equal(starts, boundaries(turns, turn, count, m))
        return starts
    monkeypatch.setattr(dhsa_chunks, "boundaries", cut)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f32", "f16", "int4"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES)
@pytest.mark.parametrize("options", [{"budget": 256}, {"budget": 150, "chunk": 40, "turn": 0.2, "recent": 0}])
def test_whole_chunks_are_read(monkeypatch, options, shape, lengths, new, listed, types, whole):
    prompts, scale = Prompts(types, *shape, lengths, new, listed, whole), shape[2] ** -0.5
    policy = load_policy("prefill", "dhsa_chunks", options)
    found, out, (read, _) = prompts.run(policy)
    total, chunks = 0, found_chunks(prompts)
    for s, plan in found.items():
        by(monkeypatch, *chunks[s])
        expected = policy.select(prompts.q[s], list(prompts.keys(s)[0]), scale).union(shape[1])
        if whole:
            expected.blocks[:, -LAST:] = causal(plan.queries, plan.keys)[-LAST:]
        got, wanted = keys_of(plan), keys_of(expected)
        print(f"{len(chunks[s][1])} chunks, read {got.mean():.3f}, policy {wanted.mean():.3f}")
        assert (got != wanted).mean() < 0.01 and (got.sum(2) == wanted.sum(2)).all()
        assert prompts.close(s, out, plan, scale) < 4e-3
        total += pairs_of(plan)
    assert abs(read - total) < 0.5


@pytest.mark.parametrize("back", [False, True])
def test_cuts_that_wait_for_each_other(monkeypatch, back):
    """Keys turn faster and faster, or ever slower, so that each place waits for the next one or the one before."""
    prompts, policy, angles = Prompts("f32", 1, 1, 64, [1000], [70], [0], False), load_policy("prefill", "dhsa_chunks"), np.arange(1070)
    k = np.zeros((1, 1070, 64), np.float32)
    angles = 2e-4 * (angles[::-1] if back else angles) ** 2.0
    k[0, :, 3], k[0, :, 40] = np.cos(angles), np.sin(angles)
    prompts.cache.fill(0, k[:, :1000], k[:, :1000])
    prompts.tensors["k"] = device.cupy().asarray(k[0, 1000:])
    found = prompts.run(policy)[0][0]
    turns, starts = found_chunks(prompts)[0]
    assert (np.diff(turns) > 0).mean() > 0.99 or back and (np.diff(turns) < 0).mean() > 0.99
    by(monkeypatch, turns, starts)
    expected = policy.select(prompts.q[0], list(prompts.keys(0)[0]), 0.125).union(1)
    assert (keys_of(found) != keys_of(expected)).mean() < 0.01 and len(starts) > 60


def test_heads_that_hold_other_tokens_are_cut_by_themselves(monkeypatch):
    prompts, policy = Prompts("f16", 4, 2, 64, [600], [70], [0], False), load_policy("prefill", "dhsa_chunks", {"budget": 200})
    held = [670, 530]
    prompts.cache.slot_counts[0] = device.cupy().asarray(np.int32(held))
    plan = prompts.run(policy)[0][0]
    for head, m in enumerate(held):
        by(monkeypatch, *found_chunks(prompts, head)[0])
        keys = keys_of(policy.select(prompts.q[0][2 * head:2 * head + 2], [prompts.keys(0)[0][head, :m]], 0.125).union(1))[0]
        assert (keys_of(plan)[head, :, :m] != keys).mean() < 0.01 and not plan.columns[head, :, m:].any()


def test_of_equals_the_earlier_come_first(monkeypatch):
    """Keys are all the same; of the long last chunk all is read, of some others, and of one of these a part."""
    prompts, k = Prompts("f16", 1, 1, 64, [400], [70], [0], False), np.zeros((1, 470, 64), np.float32)
    policy = load_policy("prefill", "dhsa_chunks", {"turn": -1.0, "budget": 290, "recent": 0})
    k[:, :, 3] = 1
    prompts.cache.fill(0, k[:, :400], k[:, :400])
    prompts.tensors["k"], prompts.q[0][:, :, 3] = device.cupy().asarray(k[0, 400:]), np.abs(prompts.q[0][:, :, 3])
    prompts.tensors["q"] = device.cupy().asarray(np.ascontiguousarray(prompts.q[0][0]))
    found = prompts.run(policy)[0][0]
    turns, starts = found_chunks(prompts)[0]
    assert (turns == turns[0]).all() and starts[:3].tolist() == [0, 4, 13]
    by(monkeypatch, turns, starts)
    np.testing.assert_array_equal(keys_of(found), keys_of(policy.select(prompts.q[0], list(prompts.keys(0)[0]), 0.125)))
