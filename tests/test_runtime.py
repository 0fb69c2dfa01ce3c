"""The whole model through the runtime: parity with transformers, batching, sharing, chunking, limits."""
import threading

import numba
import numpy as np
import pytest

from edgeattn.cache.options import CacheOptions
from edgeattn.cache.pages import CacheFull
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

RNG = np.random.default_rng()


@pytest.fixture(scope="module")
def model(nano_fp32):
    return Model.load(nano_fp32, ctx_size=2048, ubatch=128)


def tokens(n):
    return RNG.integers(4, 8000, n)


def fresh(model, ids, **options):
    sequence = model.new_sequence()
    try:
        return model.forward([(sequence, ids)], **options)
    finally:
        model.free(sequence)


def test_batch_equals_one_by_one(model):
    prompts = [tokens(n) for n in (1, 37, 200, 32)]
    alone = [fresh(model, ids, logit_rows="all") for ids in prompts]
    sequences = [model.new_sequence() for _ in prompts]
    np.testing.assert_allclose(model.forward(list(zip(sequences, prompts)), "all"), np.concatenate(alone), atol=2e-4)
    more = [tokens(1) for _ in prompts]  # a decode step of four sequences together
    together = model.forward(list(zip(sequences, more)))
    for i, (sequence, ids, extra) in enumerate(zip(sequences, prompts, more)):
        np.testing.assert_allclose(together[i], fresh(model, np.concatenate([ids, extra]))[0], atol=2e-4)
        model.free(sequence)
    assert not any(pool.used for pool in model.cache.pools)


def test_prefill_in_pieces_equals_at_once(model):
    ids = tokens(300)
    whole = fresh(model, ids, logit_rows="all")
    sequence, found, start = model.new_sequence(), [], 0
    for size in (1, 31, 1, 64, 3, 200):
        found.append(model.forward([(sequence, ids[start:start + size])], "all"))
        start += size
    np.testing.assert_allclose(np.concatenate(found), whole, atol=2e-4)
    model.free(sequence)


def test_forks_share_pages_and_then_differ(model):
    ids = tokens(100)
    a = model.new_sequence()
    model.forward([(a, ids)], "none")
    before = model.kv_bytes()
    b = model.fork(a)
    assert model.kv_bytes() == before + b.nbytes
    last_pages = np.prod(model.cache.shape) * model.cache.pools[0].format.page_bytes
    x, y = tokens(5), tokens(5)
    out = model.forward([(a, x), (b, y)])
    assert model.kv_bytes() == before + b.nbytes + last_pages  # only the last page of each head, partly filled, is copied
    for got, more in zip(out, (x, y)):
        np.testing.assert_allclose(got, fresh(model, np.concatenate([ids, more]))[0], atol=2e-4)
    model.free(a), model.free(b)


def test_truncate_goes_back(model):
    ids, a = tokens(90), model.new_sequence()
    model.forward([(a, ids)], "none")
    model.truncate(a, 40)
    np.testing.assert_allclose(model.forward([(a, ids[40:])])[0], fresh(model, ids)[0], atol=2e-4)
    model.free(a)


def test_full_context_changes_nothing(model):
    a, ids = model.new_sequence(), tokens(2040)
    model.forward([(a, ids[:2000])], "none")
    expected = model.forward([(a, ids[2000:])])
    with pytest.raises(CacheFull, match="--ctx-size"):
        model.forward([(a, tokens(9))])
    b = model.new_sequence()
    with pytest.raises(CacheFull):
        model.forward([(b, tokens(100))])
    assert (a.length, b.length) == (2040, 0)
    model.truncate(a, 2000)
    np.testing.assert_allclose(model.forward([(a, ids[2000:])]), expected, atol=2e-4)
    model.free(a)


@pytest.mark.parametrize("ids, message", [([], "at least one"), ([8192], "0 to 8191"), ([-1], "0 to 8191")])
def test_bad_tokens_are_refused(model, ids, message):
    with pytest.raises(ValueError, match=message):
        model.forward([(model.new_sequence(), ids)])


def test_the_same_sequence_twice_is_refused(model):
    sequence = model.new_sequence()
    with pytest.raises(ValueError, match="once"):
        model.forward([(sequence, [5]), (sequence, [6])])


def test_half_precision_cache_is_close(nano_fp32, model):
    half = Model.load(nano_fp32, cache=CacheOptions("f16", "f16"), ctx_size=1024)
    ids = tokens(400)
    exact, got = fresh(model, ids, logit_rows="all"), fresh(half, ids, logit_rows="all")
    assert np.abs(got - exact).max() < 0.02 * exact.std()  # halves keep 11 bits: 5e-4 a value


def test_window_wide_enough_equals_dense_and_a_narrow_one_does_not(nano_fp32, model):
    ids = tokens(500)

    def decoded(pages):
        sparse = Model.load(nano_fp32, ctx_size=1024, sparse=SparseOptions("sink_window", {"budget": 32 * pages, "recent": 2}, 0))
        sequence = sparse.new_sequence()
        sparse.forward([(sequence, ids)], "none")
        return sparse.forward([(sequence, ids[:1])])
    expected = fresh(model, np.append(ids, ids[0]))
    wide, narrow = decoded(40), decoded(2)
    np.testing.assert_allclose(wide, expected, atol=2e-4)
    assert np.abs(narrow - expected).max() > 0.05


def test_profile_covers_every_step(model):
    a = model.new_sequence()
    model.forward([(a, tokens(3))])
    profile = model.plan.profile(model._batch.state)
    assert [operator for _, operator, _ in profile].count("cached_attention") == 8
    assert all(seconds > 0 for _, _, seconds in profile)
    model.free(a)


def test_greedy_equals_transformers_for_200_tokens(model, nano_checkpoint):
    import torch
    from transformers import AutoModelForCausalLM
    theirs = AutoModelForCausalLM.from_pretrained(nano_checkpoint, dtype=torch.float32)
    ids = tokens(64)
    expected = theirs.generate(torch.tensor(ids[None]), max_new_tokens=200, do_sample=False, eos_token_id=None)[0, 64:].tolist()
    sequence, got = model.new_sequence(), []
    logits = model.forward([(sequence, ids)])
    for _ in range(200):
        got.append(int(logits[0].argmax()))
        logits = model.forward([(sequence, got[-1:])])
    model.free(sequence)
    assert got == expected


def test_thread_counts_of_two_models_do_not_mix(nano_fp32, model):
    """Scratch is sized for a model's own threads; Numba's number is per thread and shared by models."""
    ids = tokens(40)
    one = Model.load(nano_fp32, ctx_size=256, threads=1)
    expected = fresh(one, ids)
    Model.load(nano_fp32, ctx_size=256)
    seen = []

    def elsewhere():
        seen.append(fresh(one, ids))
        seen.append(numba.get_num_threads())
    worker = threading.Thread(target=elsewhere)
    worker.start(), worker.join()
    np.testing.assert_array_equal(seen[0], expected)
    assert seen[1] == 1


def test_nothing_to_compute_is_refused(model):
    with pytest.raises(ValueError, match="at least one"):
        model.forward([])


# ---- what a caller may ask -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [dict(ctx_size=-1), dict(ctx_size=1.5), dict(ctx_size="7"), dict(ubatch=-1), dict(threads=-1),
                                     dict(threads=1 << 20)])
def test_impossible_sizes_are_named(nano_int4, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Model.load(nano_int4, **options)


def test_sizes_beyond_the_export_are_its_own(nano_int4):
    model = Model.load(nano_int4, ctx_size=1 << 60, ubatch=1 << 60, threads=1, sparse=SparseOptions("off"), prefill=PrefillOptions("off"))
    assert model.ctx_size == model.config["model"]["ctx_size"] >= model.ubatch


@pytest.mark.parametrize("ids", [[1 << 70], [-1], [8192], [1.5], ["a"], [None], [], [float("nan")], [[1, 2], [3]], b"ab", [1 << 63]])
def test_impossible_tokens_are_refused(nano_int4, ids):
    model = Model.load(nano_int4, ctx_size=64, threads=1)
    sequence = model.new_sequence()
    with pytest.raises(ValueError):
        model.forward([(sequence, ids)])
    assert sequence.length == 0 and model.forward([(sequence, [1])]).shape == (1, model.vocab_size)
