"""Decode policies whose selections serve several layers and heads: each method's own promises."""
import numpy as np
import pytest

from edgeattn.cache.options import CacheOptions
from edgeattn.kernels_cpu.selections import ALL, COUNT, HEADER
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions

SHARED = ("tidal_decode", "delta", "less_is_more")
PROMPT = 700


def tokens(n):
    return np.random.default_rng().integers(4, 8000, n)


class Steps:
    """Decode steps of the same text with several models of one export, kept loaded."""

    def __init__(self, folder):
        self.folder, self.models = folder, {}

    def model(self, sparse, cache=CacheOptions("f16", "f16")):
        key = repr((sparse, cache))
        if key not in self.models:
            self.models[key] = Model.load(self.folder, cache=cache, ctx_size=1024, ubatch=128, sparse=sparse)
        return self.models[key]

    def run(self, sparse, ids, steps=3, **options):
        """-> logits [steps, vocab], the model and its sequence after a prompt and some tokens one by one."""
        model = self.model(sparse, **options)
        sequence = model.new_sequence()
        model.forward([(sequence, ids[:-steps])], "none")
        return np.concatenate([model.forward([(sequence, [x])]) for x in ids[-steps:]]), model, sequence


@pytest.fixture(scope="module")
def runs(nano_fp32):
    return Steps(nano_fp32)


@pytest.mark.parametrize("name, layers, expected", [
    ("tidal_decode", 8, [None, None, None, 2, None, 4, 4, 4]), ("less_is_more", 8, [None, None, None, 2, None, 4, 4, 4]),
    ("delta", 8, [None, None, None, 2, None, 4, None, 6]), ("tidal_decode", 4, [None, None, None, 2]), ("delta", 2, [None, None])])
def test_sources(name, layers, expected):
    assert load_policy("decode", name).sources(layers) == expected


def test_delta_selects_where_its_paper_does():
    sources = load_policy("decode", "delta").sources(28)
    assert [layer for layer, source in enumerate(sources) if source is None] == [0, 1, 2, 14, 22]
    assert sources[3] == sources[13] == 2 and sources[15] == sources[21] == 14 and sources[23] == sources[27] == 22


def test_tidal_decode_selects_again_where_it_is_told():
    policy = load_policy("decode", "tidal_decode", {"reselect": 13})
    sources = policy.sources(32)
    assert sources[12] == 2 and sources[13] is None and sources[14] == sources[31] == 13
    with pytest.raises(ValueError, match="no layer 13"):
        policy.sources(13)
    with pytest.raises(ValueError, match="reselect > 2"):
        load_policy("decode", "tidal_decode", {"reselect": 2})


@pytest.mark.parametrize("cache", [CacheOptions("f16", "f16"), CacheOptions("int4", "int4")], ids=["f16", "int4"])
@pytest.mark.parametrize("name", SHARED)
def test_a_budget_for_everything_is_dense_bit_for_bit(runs, name, cache):
    ids = tokens(PROMPT)
    expected, _, _ = runs.run(None, ids, cache=cache)
    got, model, sequence = runs.run(SparseOptions(name, {"budget": 1024}, 0), ids, cache=cache)
    np.testing.assert_array_equal(got, expected)
    assert (sequence.selection[..., COUNT] == ALL).all()


@pytest.mark.parametrize("name", SHARED)
def test_selecting_layers_are_dense_and_the_others_are_not(runs, name):
    """Layer 3 is the first to read a list, so that the keys of layers 0 to 3, and no others, are what they are without one."""
    ids = tokens(PROMPT)
    _, dense, expected = runs.run(None, ids, steps=1)
    _, model, got = runs.run(SparseOptions(name, {"budget": 192}, 0), ids, steps=1)
    for layer in range(8):
        same = all((dense.cache.read(expected, layer, head)[0] == model.cache.read(got, layer, head)[0]).all() for head in range(2))
        assert same == (layer <= 3), f"layer {layer}"


def lists(sequence):
    """[groups][kv_heads] -> page numbers."""
    return [[row[HEADER:HEADER + row[COUNT]].tolist() for row in group] for group in sequence.selection]


@pytest.mark.parametrize("name, budget, recent", [("tidal_decode", 256, 3), ("delta", 320, 4), ("less_is_more", 512, 3)])
def test_lists_fill_the_budget_and_hold_what_is_always_read(runs, name, budget, recent):
    _, model, sequence = runs.run(SparseOptions(name, {"budget": budget}, 0), tokens(PROMPT))
    total = -(-PROMPT // PAGE)
    for group in lists(sequence):
        for pages in group:
            assert len(pages) == budget // PAGE and pages == sorted(set(pages))
            assert pages[0] == 0 and pages[-recent:] == list(range(total - recent, total))
        assert name == "tidal_decode" or all(pages == group[0] for pages in group)
    assert name != "tidal_decode" or any(group[0] != group[1] for group in lists(sequence))


def test_delta_scores_sum_to_one_at_least_and_to_the_number_of_heads_at_most(runs):
    _, model, sequence = runs.run(SparseOptions("delta", {"budget": 192}, 0), tokens(PROMPT))
    scores = model.scheduler.scores[0, :, :-(-PROMPT // PAGE)]
    assert (scores >= 0).all() and (scores == scores[0]).all() and 1 - 1e-4 <= scores[0].sum() <= 8


@pytest.mark.parametrize("name", SHARED)
def test_lists_serve_more_steps_where_that_is_asked_for(runs, name):
    _, model, sequence = runs.run(SparseOptions(name, {"budget": 256, "reuse": 0.01}, 0), tokens(PROMPT), steps=70)
    total = -(-PROMPT // PAGE)
    assert 0.5 < model.scheduler.figures()["reused"] < 1
    assert all(pages[-1] == total - 1 and pages == sorted(set(pages)) for group in lists(sequence) for pages in group)


@pytest.mark.parametrize("options", [dict(budget=4 << 20), dict(storage="zipcache")], ids=["eviction", "sorted"])
@pytest.mark.parametrize("name", [*SHARED, "infllm"])
def test_what_tells_layers_or_heads_apart_is_refused(nano_fp32, name, options):
    with pytest.raises(ValueError, match=f"{name} selects pages for several {'heads' if name == 'infllm' else 'layers'}"):
        Model.load(nano_fp32, cache=CacheOptions("int4", "int4", **({"eviction": "key_diff"} if "budget" in options else {}), **options),
                   sparse=SparseOptions(name, min_len=0))


@pytest.mark.parametrize("name", SHARED)
def test_a_batch_selects_for_each_sequence(runs, name):
    """Two sequences in one step get what each gets alone."""
    sparse, ids, cache = SparseOptions(name, {"budget": 192}, 0), [tokens(n) for n in (600, 380)], CacheOptions("f32", "f32")
    alone = [runs.run(sparse, x, steps=1, cache=cache) for x in ids]
    expected, chosen = np.concatenate([logits for logits, _, _ in alone]), [sequence.selection.copy() for _, _, sequence in alone]
    model = alone[0][1]
    for _, _, sequence in alone:
        model.free(sequence)
    sequences = [model.new_sequence() for _ in ids]
    for sequence, x in zip(sequences, ids):
        model.forward([(sequence, x[:-1])], "none")
    together = model.forward([(sequence, x[-1:]) for sequence, x in zip(sequences, ids)])
    for sequence, rows in zip(sequences, chosen):
        np.testing.assert_array_equal(sequence.selection, rows)
    np.testing.assert_allclose(together, expected, atol=2e-4)
