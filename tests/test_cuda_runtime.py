"""Whole models on a GPU against the CPU: logits, sharing, sessions, graphs, sampling.

Both round activations to int8, and a last digit decides: two engines that compute the same differ by about a hundredth of the logits'
standard deviation. Where pages are selected, a tie more or less changes what is read.
"""
import numpy as np
import pytest
from cuda_device import needs_cuda
from same_drops import SameDrops

from edgeattn import calibrate_thresholds
from edgeattn.cache import session
from edgeattn.cache.options import CacheOptions
from edgeattn.generation import Generation, SamplerOptions
from edgeattn.ops import load_kernel
from edgeattn.prefill_scheduler import PrefillOptions
from edgeattn.runtime import Model
from edgeattn.scheduler import SparseOptions
from edgeattn.tokenizer import Tokenizer

pytestmark = needs_cuda
PROMPT, DECODED = 600, 60
CLOSE, SELECTED = 0.03, 0.12  # root-mean-square differences of logits, in standard deviations
SCORES, PAGES = 0.06, {"f16": 0.05, "int4": 0.15}  # the same of eviction's scores, and of what pages hold
SPARSE = {"dense": SparseOptions("off"), "quest": SparseOptions("quest", {"budget": 256}, 0),
          "auto": SparseOptions("auto", {"budget": 256}, 0)}
RNG = np.random.default_rng()


def tokens(n):
    return RNG.integers(4, 8000, n)


def close(got, expected, limit=CLOSE):
    assert got.shape == expected.shape and np.isfinite(got).all()
    error = np.sqrt(np.square(got - expected).mean(-1)) / expected.std()
    assert error.mean() < limit and error.max() < 4 * limit, f"mean {error.mean():.4f}, largest {error.max():.4f} at {error.argmax()}"
    return float(error.mean())


def deviation(got, expected):
    """Root-mean-square difference, in standard deviations."""
    assert got.shape == expected.shape
    return float(np.sqrt(np.square(got - expected).mean()) / expected.std())


@pytest.fixture(scope="module")
def load(nano_int4):
    """load(device, cache, sparse): a model, made once."""
    made = {}

    def loaded(device, cache="f16", sparse="dense", storage="kivi", **more):
        key, (k, _, v) = (device, cache, sparse, storage, *more.items()), cache.partition("/")
        if key not in made:
            options = dict(ctx_size=2048, ubatch=128, sparse=SPARSE[sparse], prefill=PrefillOptions("off"),
                           cache=CacheOptions(k, v or k, storage))
            made[key] = Model.load(nano_int4, device=device, **options | more)
        return made[key]
    return loaded


@pytest.fixture(scope="module")
def text(nano_int4):
    """Tokens of a text, so that greedy decoding has something to say."""
    story = ("The lighthouse on Gull Island was built in 1871 by the engineer Anna Petrov. It is forty metres tall. "
             "The keeper climbed the stairs each evening to light the lamp, and counted the ships that passed. ")
    ids = Tokenizer(nano_int4).encode(story * 20)
    assert len(ids) >= PROMPT
    return np.array(ids[:PROMPT])


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize("cache", ["f16", "int8", "int4"])
def test_a_prompt_and_decoded_tokens(load, text, cache, sparse):
    limit = CLOSE if sparse == "dense" else SELECTED
    cpu, gpu = load("cpu", cache, sparse), load("cuda", cache, sparse)
    a, b = cpu.new_sequence(), gpu.new_sequence()
    expected, got = cpu.forward([(a, text)], "all"), gpu.forward([(b, text)], "all")
    prompt = close(got, expected)
    rows, found, token = [], [], int(expected[-1].argmax())
    for _ in range(DECODED):  # the CPU's greedy tokens
        rows.append(cpu.forward([(a, [token])])[0])
        found.append(gpu.forward([(b, [token])])[0])
        token = int(rows[-1].argmax())
    rows, found = np.array(rows), np.array(found)
    decoded = close(found, rows, limit)
    best = np.sort(rows, -1)
    clear = best[:, -1] - best[:, -2] > 4 * limit * rows.std()
    assert (rows.argmax(-1) == found.argmax(-1))[clear].all()
    print(f"{cache} {sparse}: prompt {prompt:.4f}, decoded {decoded:.4f}")
    cpu.free(a), gpu.free(b)
    assert not any(pool.used for pool in gpu.cache.pools)


@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_sequences_together_forks_and_truncation(load, text, cache):
    ids, more, found = [text[:200], text[200:277]], text[300:340], []  # of random tokens, the CPU's own levels differ by 0.05 with int4
    for model in (load("cpu", cache), load("cuda", cache)):
        a, b = model.new_sequence(), model.new_sequence()
        got = [model.forward([(a, ids[0]), (b, ids[1])], "all")]
        got += [model.forward([(a, more[i:i + 1]), (b, more[i + 1:i + 2])]) for i in range(35)]
        c = model.fork(a)
        got.append(model.forward([(a, more[:5]), (c, more[5:8]), (b, more[:1])]))
        got += [model.forward([(a, more[i:i + 1]), (c, more[-i:][:1])]) for i in range(3)]
        kept = model.truncate(a, 150)
        got.append(model.forward([(a, ids[0][kept:])], "all"))
        got.append(model.forward([(c, more[:1])]))
        for sequence in (a, b, c):
            model.free(sequence)
        found.append(got)
    for expected, got in zip(*found, strict=True):
        assert got.shape == expected.shape
    expected, got = (np.concatenate(rows) for rows in found)
    close(got, expected)


@pytest.mark.parametrize("sparse", ["dense", "quest"])
@pytest.mark.parametrize("cache, storage", [("int4", "hadamard"), ("int3", "bitnet"), ("int4", "akvq"), ("int4", "zipcache"),
                                            ("delta/int4", "delta")])
def test_other_ways_to_quantise(load, text, cache, storage, sparse):
    """Where tokens are sorted, a last digit decides as well."""
    found = []
    for model in (load("cpu", cache, sparse, storage), load("cuda", cache, sparse, storage)):
        a = model.new_sequence()
        rows = [model.forward([(a, text[:500])], "all")]
        found.append(np.concatenate([*rows, *(model.forward([(a, [token])]) for token in text[500:560])]))
        model.free(a)
    prompt, decoded = (close(found[1][rows], found[0][rows], SELECTED) for rows in (slice(500), slice(500, None)))
    print(f"{storage} {cache} {sparse}: prompt {prompt:.4f}, decoded {decoded:.4f}")


@pytest.mark.parametrize("cache, storage", [("f16", "kivi"), ("int4", "kivi"), ("int4", "akvq"), ("int4", "zipcache"),
                                            ("delta/int4", "delta")])
def test_a_session_saved_on_the_cpu_goes_on_on_the_gpu(load, text, cache, storage, tmp_path):
    cpu, gpu = load("cpu", cache, storage=storage), load("cuda", cache, storage=storage)
    a = cpu.new_sequence()
    cpu.forward([(a, text)], "none")
    session.save(tmp_path / "a", cpu.cache, a, text.tolist(), cpu.config, {})
    b, known, _ = session.load(tmp_path / "a", gpu.cache, gpu.config)
    assert known == text.tolist()
    for expected, got in zip(pages(cpu, a), pages(gpu, b), strict=True):
        np.testing.assert_array_equal(got, expected)
    session.save(tmp_path / "b", gpu.cache, b, known, gpu.config, {})
    c, _, _ = session.load(tmp_path / "b", cpu.cache, cpu.config)
    for expected, got in zip(pages(cpu, a), pages(cpu, c), strict=True):
        np.testing.assert_array_equal(got, expected)
    got, expected = zip(*((gpu.forward([(b, [token])])[0], cpu.forward([(a, [token])])[0]) for token in tokens(40)))
    close(np.array(got), np.array(expected), CLOSE if storage == "kivi" else SELECTED)
    for model, sequence in ((cpu, a), (cpu, c), (gpu, b)):
        model.free(sequence)


def pages(model, sequence):
    entries = sequence.tables[sequence.tables >= 0]
    for i, pool in enumerate(model.cache.pools):
        for array in pool.pages.stored().values():
            if array.shape[1]:
                yield np.asarray(array[entries[entries % 4 == i] // 4])


@pytest.mark.parametrize("cache, sparse", [("f16", "dense"), ("int4", "dense"), ("int4", "quest")])
def test_a_graph_replays_what_plain_launches_compute(load, text, cache, sparse):
    model = load("cuda", cache, sparse)
    a, rows = model.new_sequence(), []
    model.forward([(a, text[:330])], "none")
    for i in range(4):  # plain, captured and replayed twice, if no test before has
        rows.append(model.forward([(a, [7])])[0])
        assert model.truncate(a, 330) == 330
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])
    table, = model.plan.items
    assert table.graphs
    table.graphs.clear(), table.ran.clear()
    np.testing.assert_array_equal(model.forward([(a, [7])])[0], rows[0])
    assert not table.graphs
    model.free(a)


@pytest.mark.parametrize("settings", [dict(temperature=0.0), dict(temperature=0.8, top_k=40), dict(temperature=1.0, repeat_penalty=1.2)])
def test_tokens_are_chosen_by_the_reference_s_rules(load, text, settings):
    model = load("cuda")
    a = model.new_sequence()
    row, = model.forward([(a, text)], fetch=False)
    logits = model.plan.read("logits", model._batch.state)[-1]
    for uniform in (0.01, 0.5, 0.97):
        about = dict(temperature=1.0, top_k=0, top_p=0.95, min_p=0.05, repeat_penalty=1.0, uniform=uniform) | settings
        history = text[-64:]
        assert row.sample(about, history) == int(load_kernel("sample", "reference")(logits, history, **about)[0])
    model.free(a)


def test_greedy_generation_in_place_is_that_of_fetched_logits(load, nano_int4, text):
    model, tokenizer = load("cuda", "int4", "auto"), Tokenizer(nano_int4)
    run = Generation(model, tokenizer, model.new_sequence(), text[:100].tolist(), SamplerOptions(temperature=0), 40)
    list(run)
    a = model.new_sequence()
    logits, expected = model.forward([(a, text[:100])]), []
    while len(expected) < len(run.tokens):
        expected.append(int(logits[-1].argmax()))
        logits = model.forward([(a, expected[-1:])])
    assert expected == run.tokens and len(expected) > 5
    model.free(a)


@pytest.mark.parametrize("method, options, correction", [
    ("auto", {"budget": 128, "least": 64, "fraction": 0.1, "recent": 1}, None), ("xattention", {"tau": 0.5}, None),
    ("sale", {"threshold": 3, "bits": 8}, None),  # as the GPU scans
    ("minference", {"n_v": 60, "n_s": 50, "recent": 0}, None), ("dhsa", {"density": 0.2}, None), ("moa", {"beta": 0.2}, None),
    ("streaming", {"sink": 1, "recent": 2}, None), ("streaming", {"sink": 1, "recent": 2}, "delta"),
    ("streaming", {"sink": 1, "recent": 2}, "tail")])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_a_prompt_that_reads_a_part(load, nano_int4, text, cache, method, options, correction):
    found, read = [], []
    for device in ("cpu", "cuda", "whole"):
        model = load("cuda", cache) if device == "whole" else Model.load(
            nano_int4, device=device, cache=CacheOptions(cache, cache), ctx_size=1024, ubatch=256, sparse=SPARSE["dense"],
            prefill=PrefillOptions(method, options, 0, correction))
        a = model.new_sequence()
        found.append(np.concatenate([model.forward([(a, text)], "all"), model.forward([(a, text[:1])])]))
        model.free(a)
        read += [model.prefill.figures()["read"]] if model.prefill else []
    error = close(found[1], found[0], 2 * CLOSE)
    whole = np.sqrt(np.square(found[2] - found[0]).mean(-1)).mean() / found[0].std()
    print(f"{cache} {method} {correction}: {error:.4f}, of what reads everything {whole:.4f}; read {read}")
    assert error < whole / 2 and abs(read[1] - read[0]) < 0.02 and read[1] < 0.9


@pytest.mark.parametrize("way", ["certain", "thresholds"])
def test_decode_that_reads_pages_in_part(nano_int4, text, monkeypatch, way):
    """Of eight pages, which both read as one range, the values of the best ones; of keys the upper four bits, which changes little here."""
    curves, found = np.tile(np.float32([99, 0]), (8, 8, 1)), []
    monkeypatch.setattr(calibrate_thresholds, "load_thresholds", lambda folder, config: curves)
    theta = SparseOptions("top_theta", {"means": False}, 0) if way == "thresholds" else SPARSE["dense"]
    progressive = 0.001 if way == "certain" else 0
    for device, sparse, certain in (("cpu", theta, progressive), ("cuda", theta, progressive), ("cuda", SPARSE["dense"], 0)):
        model = Model.load(nano_int4, device=device, cache=CacheOptions("int8", "int8", window=32, progressive=certain), ctx_size=512,
                           ubatch=128, sparse=sparse, prefill=PrefillOptions("off"))
        a = model.new_sequence()
        model.forward([(a, text[:210])], "none")
        found.append(np.concatenate([model.forward([(a, [token])]) for token in text[210:250]]))
        model.free(a)
    apart, whole = close(found[1], found[0], SELECTED), np.sqrt(np.square(found[2] - found[0]).mean(-1)).mean() / found[0].std()
    print(f"{way}: {apart:.4f}, of what reads everything {whole:.4f}")
    assert apart < (whole / 1.5 if way == "thresholds" else CLOSE)


@pytest.mark.parametrize("method", ["key_diff", "l2_norm", "streaming_llm", "h2o", "snapkv", "caote"])
@pytest.mark.parametrize("cache", ["f16", "int4"])
def test_a_full_cache_drops_tokens(nano_int4, text, monkeypatch, cache, method):
    """The CPU drops what the GPU has dropped (same_drops.py), so that they hold the same all the time."""
    drops, models = SameDrops(monkeypatch), []
    for device in ("cuda", "cpu"):
        options = CacheOptions(cache, cache, budget=1_400_000 if cache == "f16" else 1_000_000, eviction=method)
        model = Model.load(nano_int4, device=device, cache=options, ctx_size=1024, ubatch=128, sparse=SPARSE["dense"],
                           prefill=PrefillOptions("off"))
        a = model.new_sequence()
        rows = [model.forward([(a, text[:500])])] + [model.forward([(a, [token])]) for token in text[500:]]
        assert a.counts.max() < 400
        models.append((np.concatenate(rows), [model.cache.read(a, *place) for place in np.ndindex(a.counts.shape)]))
        drops.follow()
    drops.finish()
    (got, ours), (expected, theirs) = models
    logits, pages = close(got, expected), [max(deviation(x, y) for x, y in zip(*pair)) for pair in zip(ours, theirs, strict=True)]
    print(f"{cache} {method}: {len(drops.apart)} drops, scores {np.mean(drops.apart):.4f}, at most {max(drops.apart):.4f}; logits "
          f"{logits:.4f}; keys and values {np.mean(pages):.4f}, at most {max(pages):.4f}")
    assert np.mean(drops.apart) < SCORES and max(drops.apart) < 4 * SCORES and max(pages) < PAGES[cache]


def test_a_budget_limits_the_cache_and_memory_is_told(nano_int4):
    model = Model.load(nano_int4, cache=CacheOptions(budget=2 << 20), ctx_size=4096, device="cuda")
    assert model.cache.options.method == "key_diff" and model.cache.total_bytes <= 2 << 20
    memory = model.memory()
    assert memory["weights"] <= memory["device"] and memory["rss"] >= memory["runtime"] > 0
    sequence = model.new_sequence()
    assert np.isfinite(model.forward([(sequence, tokens(100))])).all()


def test_commands(edgeattn, nano_int4, tmp_path):
    line = ["generate", "-m", nano_int4, "-p", "The lighthouse was built in", "-n", "8", "--temp", "0", "-c", "512", "--device", "cuda"]
    done = edgeattn(*line)
    assert done.returncode == 0 and done.stdout.strip()
    saved = [*line, "--session", tmp_path / "s"]
    assert edgeattn(*saved).stdout == done.stdout and (tmp_path / "s").is_file()
    done = edgeattn("bench", "-m", nano_int4, "-p", "64", "-n", "8", "-r", "2", "-o", "jsonl", "--device", "cuda")
    assert done.returncode == 0 and '"device": "cuda"' in done.stdout
