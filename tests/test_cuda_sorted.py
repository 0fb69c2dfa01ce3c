"""Keys that are sorted by weight on a GPU, and what is read of them, against the policy in NumPy."""
import numpy as np
import pytest
from cuda_device import needs_cuda
from cuda_prompts import SHAPES, Prompts
from test_cuda_parts import check

from edgeattn.kernels_cuda import choose_by_lines, choose_by_sorting
from edgeattn.kernels_cuda.prefill_call import most_lists
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.policies.prefill.pbs_attn import PbsAttn
from edgeattn.prefill_plan import true_weights

pytestmark = needs_cuda


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("types", ["f16", "int4", "int8"])
@pytest.mark.parametrize("shape, lengths, new, listed", SHAPES[:4])
@pytest.mark.parametrize("options", [{}, {"segment": 96, "rows": 40, "recent": 0}, {"segment": 1088}])
def test_sorted_blocks_are_read(monkeypatch, options, shape, lengths, new, listed, types, whole):
    """Where weights are nearly alike kernels may order keys otherwise, and the policy takes theirs."""
    policy = load_policy("prefill", "pbs_attn", {"tau": 0.5} | options)
    if policy.segment > 1024:  # one that is longer than what a block sorts, and than what it averages, at a time
        lengths, new, listed = [1200], [70], [0]
    prompts = Prompts(types, *shape, lengths, new, listed, whole)
    orders = {}

    def order(self, q, k, scale):
        if not orders:
            for s, found in sorted_keys(prompts).items():
                orders.update({keys.tobytes(): x for keys, x in zip(prompts.keys(s)[0], found)})
        return checked(policy, q, k, orders[k.tobytes()])
    monkeypatch.setattr(PbsAttn, "_order", order)
    check(monkeypatch, prompts, policy, shape[2] ** -0.5)


def sorted_keys(prompts):
    """Of each sequence that has lists [kv_heads, tokens]: which key stands where, as far as segments are complete."""
    pages, first, found = prompts.pages(), 0, {}
    at = choose_by_lines.offsets(prompts.heads, prompts.kv_heads, prompts.head_dim, most_lists(sum(prompts.new)), pages)[1]
    at += 4 * prompts.heads * pages * PAGE
    scratch = prompts.scratch(choose_by_sorting.workspace_bytes({}, prompts.about | {"pages": pages}, sum(prompts.new), 1))
    rows = scratch[at:at + 4 * prompts.kv_heads * pages * PAGE].view(np.int32).reshape(prompts.kv_heads, -1)
    for s in prompts.listed:
        m = prompts.lengths[s] + prompts.new[s]
        found[s], first = rows[:, PAGE * first:][:, :m], first - -m // PAGE
    return found


def checked(policy, q, k, order):
    """The order that kernels have found, with what is behind it: segments sorted by weight, up to what halves round."""
    n, m = q.shape[1], len(k)
    weights = true_weights(q, k, np.arange(max(0, n - policy.rows), n), k.shape[1] ** -0.5).mean((0, 1))
    whole = m // policy.segment * policy.segment
    for begin in range(0, whole, policy.segment):
        part = order[begin:begin + policy.segment]
        np.testing.assert_array_equal(np.sort(part), np.arange(begin, begin + policy.segment))
        assert (weights[part[1:]] <= 1.05 * weights[part[:-1]]).all()
    return np.concatenate([order[:whole], np.arange(whole, m)])
