"""What every policy that chooses what decode steps read must keep to, on each kind of cache."""
import numpy as np
import pytest

from edgeattn.cache.options import CacheOptions
from edgeattn.page_formats import PAGE
from edgeattn.policies import load_policy, policy_names
from sparse_driver import SparseDriver, model_folder

CACHES = {"f16": CacheOptions(k_type="f16", v_type="f16"), "kivi": CacheOptions(k_type="int4", v_type="int4"),
          "hadamard": CacheOptions(k_type="int4", v_type="int4", storage="hadamard"),
          "zipcache": CacheOptions(k_type="int4", v_type="int4", storage="zipcache")}
METHODS = [name for name in policy_names("decode")  # others choose for layers further on (test_decode_layers.py), or leave values out
           if set(load_policy("decode", name).sources(3)) - {None}]
HELD, BUDGET = 1300, 512  # tokens


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    folder = model_folder(tmp_path_factory.mktemp("model"))
    return lambda method, cache="f16", **options: make_driver(folder, method, cache, **options)


def make_driver(folder, method, cache, **options):
    known = {"budget": BUDGET, "dense_layers": 0} | options
    fields = load_policy("decode", method).__dataclass_fields__
    return SparseDriver(method, {name: value for name, value in known.items() if name in fields}, CACHES[cache], folder=folder)


def chosen(lists):
    return [pages for layer in lists for pages in layer if pages is not None]


@pytest.fixture(scope="module")
def text():
    """q, k, v of HELD tokens and more, keys with a mean and a few that stand out."""
    from sparse_driver import DEPTH, GROUP, KV_HEADS, LAYERS
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((LAYERS, HELD + 200, n, DEPTH), np.float32) for n in (KV_HEADS * GROUP, KV_HEADS, KV_HEADS))
    k[..., :4] += 1.5
    k[:, rng.integers(0, HELD, 60)] *= 2
    return q, k, v


def read(model, text, start, stop, chunk=512, sequence=None):
    sequence = sequence or model.cache.new_sequence()
    for first in range(start, stop, chunk):
        part = [x[:, first:min(stop, first + chunk)] for x in text]
        model.forward([(sequence, part)], check=False)
    return sequence


def decode(model, sequence, text, tokens, sparse=True):
    """-> ([outputs], [lists]) of so many steps."""
    found = [model.decode(sequence, [x[:, i:i + 1] for x in text], sparse) for i in range(sequence.length, sequence.length + tokens)]
    return [out for out, _ in found], [lists for _, lists in found]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", METHODS)
def test_lists_hold_the_first_and_the_newest_pages_in_order(driver, method, cache, text):
    model = driver(method, cache)
    if model.scheduler.policy.thresholds:
        pytest.skip("leaves out values token by token: it has no lists")
    sequence = read(model, text, 0, HELD)
    recent, capacity = model.scheduler.policy.recent, model.cache.plan.selection.capacity
    for _ in range(40):  # a page is begun on the way
        out, lists = model.decode(sequence, [x[:, sequence.length:sequence.length + 1] for x in text])
        total = -(-sequence.length // PAGE)
        assert np.isfinite(out).all() and chosen(lists), "nothing is sparse"
        for pages in chosen(lists):
            assert pages == sorted(set(pages)) and len(pages) <= min(capacity, total)
            assert {0, *range(total - recent, total)} <= set(pages) and pages[-1] < total


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_for_everything_is_dense_to_the_bit(driver, method, cache, text):
    model = driver(method, cache, budget=4096)
    one, other = (read(model, text, 0, 700) for _ in range(2))
    for a, b in zip(decode(model, one, text, 3)[0], decode(model, other, text, 3, sparse=False)[0]):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("cache", ["f16", "kivi"])
@pytest.mark.parametrize("method", METHODS)
def test_where_pages_lie_and_how_they_came_changes_nothing(driver, method, cache, text):
    model = driver(method, cache)
    one = read(model, text, 0, HELD)
    disturbing, other = model.cache.new_sequence(), model.cache.new_sequence()
    for first in range(0, HELD, 20):  # pages of both in turn
        read(model, text, first, min(HELD, first + 20), sequence=other)
        if first % 60 == 0 and first < 400:
            read(model, text, disturbing.length, disturbing.length + 33, sequence=disturbing)
    assert (one.tables != other.tables).any()
    for a, b in zip(zip(*decode(model, one, text, 3)), zip(*decode(model, other, text, 3))):
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1] == b[1]


@pytest.mark.parametrize("cache", ["f16", "kivi"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("left", [130, 900])
def test_tokens_that_come_again_are_chosen_as_fresh_ones(driver, method, cache, left, text):
    model = driver(method, cache)
    one = read(model, [x[:, ::-1] for x in text], 0, HELD)  # other tokens, indexed
    decode(model, one, text, 2)
    model.cache.truncate(one, 0)
    one = read(model, text, 0, HELD - 3, sequence=one)
    decode(model, one, text, 40)
    model.cache.truncate(one, left)
    one = read(model, text, one.length, HELD, sequence=one)
    other = read(model, text, 0, HELD)
    assert decode(model, one, text, 3)[1] == decode(model, other, text, 3)[1]
