"""Tasks over tiny models and nano: what they count, that a bad setting scores lower, and that a second call measures nothing again."""
import json
from types import SimpleNamespace

import numpy as np
import pytest

from edgeattn.apps import record
from edgeattn.apps.eval import GROUPS, TASKS
from edgeattn.evaluation import TASKS as KNOWN, Source, docqa, kld, load_task, masks, run, words
from edgeattn.evaluation.asking import together
from edgeattn.evaluation.mask_layer import MaskLayer
from edgeattn.evaluation.outcome import Outcome
from edgeattn.cache.options import CacheOptions
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

TEXT = " ".join(f"The {number} boats of the harbour went out at dawn and came back with fish." for number in range(400))


@pytest.fixture(scope="module")
def tokenizer(nano_int4):
    return Tokenizer(nano_int4)


@pytest.fixture(scope="module")
def model(nano_int4):
    return Model.load(nano_int4, ctx_size=1024, ubatch=128, cache=CacheOptions("f16", "f16"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "boats.txt"
    path.write_text(TEXT)
    return path


def evaluate(edgeattn, folder, *arguments):
    done = edgeattn("eval", *arguments, "-m", folder, "-o", "jsonl")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- what tasks ask ------------------------------------------------------------------------------------------------
def test_the_command_knows_every_task():
    assert TASKS == KNOWN
    for name in TASKS:
        load_task(name)


@pytest.mark.parametrize("name", GROUPS["ruler"])
@pytest.mark.parametrize("length", [600, 3000])
def test_samples_fit_and_are_seeded(name, length, tokenizer):
    task, book = load_task(name), words.book(tokenizer, None, length)
    first, same, other = (task.sample(np.random.default_rng(seed), tokenizer, book, length) for seed in (1, 1, 2))
    assert first == same != other
    prompt = together(first)
    longest = max(map(len, first.questions))
    assert 0.9 * length - 120 < len(prompt) + longest <= length
    said = tokenizer.decode(prompt)
    wanted = sum(first.wanted, [])
    assert len(wanted) == task.each == len(set(wanted)) and all(one in said for one in wanted)
    assert not any(one in tokenizer.decode(question) for question in first.questions for one in wanted)


def test_frequent_words_are_the_most_frequent(tokenizer):
    hay = load_task("frequent_words").sample(np.random.default_rng(0), tokenizer, [], 2000)
    said = tokenizer.decode(hay.text).split()
    counts = {word: said.count(word) for word in set(said)}
    assert sorted(hay.wanted[0]) == sorted(sorted(counts, key=counts.get)[-3:])


def test_a_short_text_comes_again_in_another_order(tokenizer, text):
    ids = words.book(tokenizer, text, 30_000)
    assert len(ids) >= 30_000 and words.book(tokenizer, text, 30_000) == ids


# ---- what they find ------------------------------------------------------------------------------------------------
def test_nano_finds_facts_and_a_cache_without_room_loses_them(nano_int4, tokenizer, model):
    source = Source(length=700, samples=24)
    dense = run(model, tokenizer, "recall", source, facts=(8,))
    assert dense["score"] >= 0.75 and dense["low"] < dense["score"] and dense["tokens"] <= 700 < dense["tokens"] + 40
    least = CacheOptions("f16", "f16", budget=900_000, eviction="streaming_llm")
    from edgeattn.evaluation.asking import widen
    small = Model.load(nano_int4, ctx_size=1024, ubatch=128, cache=least)
    widen(small)
    poor = run(small, tokenizer, "recall", source, facts=(8,))
    change, _, high = Outcome.of(poor).against(Outcome.of(dense))
    assert poor["score"] <= 0.5 and change < 0 and high < 0 and poor["kv_bytes"] < dense["kv_bytes"]


@pytest.mark.parametrize("kind, each", [(1, 8), (8, 8), (32, 32), (0, 8)])
def test_questions_to_one_text_are_one_cluster(kind, each, tokenizer, model):
    record = run(model, tokenizer, "recall", Source(length=640, samples=1), facts=(kind,))
    assert [len(row) for row in record["values"]["of"]] == [each] and (record["low"], record["high"]) == (None, None)


def test_needle_has_a_grid(tokenizer, model):
    record = run(model, tokenizer, "needle", Source(length=500, samples=5))
    assert list(record["metrics"]) == ["at 0 %", "at 25 %", "at 50 %", "at 75 %", "at 100 %"] and record["samples"] == 5
    assert record["score"] == pytest.approx(np.mean(list(record["metrics"].values())))


def test_answers_are_scored_as_squad_does():
    assert docqa.f1("The Anna Petrov.", "anna petrov") == 1 and docqa.f1("Anna", "Anna Petrov") == pytest.approx(2 / 3)
    assert docqa.f1("", "x") == 0 and docqa.normal("An apple, a day!") == ["apple", "day"]


def test_docqa_reads_a_document_once(tokenizer, model, tmp_path):
    path, context = tmp_path / "qa.jsonl", "The lighthouse was built in 1871 by the engineer Anna Petrov. It is forty metres tall."
    rows = [{"context": context, "question": "Who built the lighthouse?", "answers": ["Anna Petrov"]},
            {"context": context, "question": "When was it built?", "answers": ["1871", "in 1871"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = run(model, tokenizer, "docqa", Source(length=500, samples=10), documents=str(path))
    assert record["samples"] == 2 and len(record["values"]["of"]) == 1 and record["metrics"]["F1"] > 0.5
    other = {"context": "The mill stands by the river.", "question": "Where does the mill stand?", "answers": ["by the river"]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], other, rows[1])))
    record = run(model, tokenizer, "docqa", Source(length=500, samples=10), documents=str(path))
    assert sorted(map(len, record["values"]["of"])) == [1, 2]  # questions about one text depend on each other, wherever they stand
    path.write_text(json.dumps(rows[0] | {"context": "A line\u2028and another."}, ensure_ascii=False))
    assert docqa.read(str(path))[0]["context"] == "A line\u2028and another."
    path.write_text('{"context": "x"}\n')
    with pytest.raises(ValueError, match="line 1: must be"):
        docqa.read(str(path))


def test_divergence_from_itself_is_nothing(tokenizer, model, nano_int4, text, tmp_path):
    source, base = Source(str(text), 300, 2), tmp_path / "base.npy"
    saved = run(model, tokenizer, "kld", source, save=str(base), decode=40)
    assert [path.name for path in tmp_path.glob("*base*")] == ["base.npy"] and saved["score"] == 0
    same = run(model, tokenizer, "kld", source, base=str(base), decode=40)
    assert abs(same["score"]) < 1e-6 and same["metrics"]["same top"] == 1
    assert same["metrics"]["perplexity"] == pytest.approx(saved["metrics"]["perplexity"])
    rough = Model.load(nano_int4, ctx_size=1024, ubatch=128, cache=CacheOptions("int2", "int2"))
    other = run(rough, tokenizer, "kld", source, base=str(base), decode=40)
    assert other["score"] > 1e-4 and other["metrics"]["99.9 %"] > other["metrics"]["median"] and other["low"] < other["score"]
    with pytest.raises(ValueError, match="give --lengths 300"):
        kld.open_base(str(base), model.vocab_size, 200)
    with pytest.raises(ValueError, match="this model has 7"):
        kld.open_base(str(base), 7, 300)
    base.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a base file"):
        kld.open_base(str(base), model.vocab_size, 300)


def test_a_base_says_what_made_it(tmp_path):
    path = tmp_path / "base.npy"
    for about in ({"key": "x", "model": "nano"}, None):
        with kld.SavedBase(str(path), 10, np.arange(6).reshape(1, 6), about) as saved:
            saved.put(0, 0, np.full((6, 10), -1.5))
        base = kld.open_base(str(path), 10, 6)
        assert kld.made_by(str(path)) == (about or {}) and base["token"].tolist() == [[*range(6)]] and (base["logs"] == -1.5).all()
    path.write_bytes(path.read_bytes()[:-2])  # an older one, which says nothing
    assert kld.made_by(str(path)) == {} and len(np.load(path)) == 1
    np.save(path, np.arange(3))
    assert kld.made_by(str(path)) is None
    path.write_text("a book")
    assert kld.made_by(str(path)) is None


def test_a_base_is_not_taken_for_anothers(edgeattn, nano_int4, tmp_path, text):
    """--save-base writes a new file, keeps its own, and leaves what is somebody else's."""
    base, out = tmp_path / "base.npy", tmp_path / "r.jsonl"
    arguments = "kld", "--lengths", 200, "--samples", 1, "--text", text, "--out", out, "--save-base", base
    first = evaluate(edgeattn, nano_int4, *arguments, "-ctk", "f16")
    held = base.read_bytes()
    both = evaluate(edgeattn, nano_int4, *arguments, "-ctk", "f16,int2")  # the first is known: its base is that of the second
    assert both[0] == first[0] and both[1]["score"] > 0 and base.read_bytes() == held
    told = edgeattn.fails("eval", *arguments, "-m", nano_int4, "-ctk", "int4")
    assert "holds another base (nano int4, -ctk f16, " in told and "remove it" in told and base.read_bytes() == held
    base.write_text("my book")
    assert "no base file" in edgeattn.fails("eval", *arguments, "-m", nano_int4, "-ctk", "f16") and base.read_text() == "my book"


def test_another_bases_divergence_is_another_result(edgeattn, nano_int4, tmp_path, text):
    """Bases of two settings may begin alike: what a chunk sees of itself is not stored yet."""
    arguments = "kld", "--lengths", 256, "--samples", 1, "--text", text
    for kind in ("f16", "int2"):
        evaluate(edgeattn, nano_int4, *arguments, "-ctk", kind, "--save-base", tmp_path / kind)
    found = [evaluate(edgeattn, nano_int4, *arguments, "-ctk", "f16", "--base", tmp_path / kind, "--out", tmp_path / "r.jsonl")[0]
             for kind in ("f16", "int2")]
    assert found[0]["key"] != found[1]["key"] and found[0]["score"] < 1e-6 < found[1]["score"]


def test_results_of_another_version_are_measured_again(edgeattn, nano_int4, tmp_path, monkeypatch):
    arguments = "needle", "--lengths", 300, "--samples", 1, "-m", nano_int4, "-o", "jsonl", "--out", tmp_path / "r.jsonl"
    first, here = json.loads(edgeattn("eval", *arguments).stdout), record.version()
    monkeypatch.setattr("edgeattn.apps.record.version", lambda: "9.9+another")
    monkeypatch.setattr("edgeattn.apps.eval_run.version", lambda: "9.9+another")
    done = edgeattn("eval", *arguments)
    again = json.loads(done.stdout)
    assert again["key"] != first["key"] and (first["edgeattn"], again["edgeattn"]) == (here, "9.9+another")
    assert "1 of 1 results are of other versions" in done.stderr and done.stderr.count("\n") == 1
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 2


def test_perplexity_is_that_of_the_logits(tokenizer, model, text):
    record = run(model, tokenizer, "perplexity", Source(str(text), 200, 1), decode=50)
    ids = words.book(tokenizer, text)[:200]
    sequence = model.new_sequence()
    rows = model.forward([(sequence, ids)], "all").astype(np.float64)
    model.free(sequence)
    losses = np.log(np.exp(rows[:-1] - rows[:-1].max(-1, keepdims=True)).sum(-1)) + rows[:-1].max(-1) - rows[np.arange(199), ids[1:]]
    assert record["score"] == pytest.approx(np.exp(losses.mean()), rel=1e-3) and record["low"] is None


def test_a_base_that_finds_no_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4 * 1000 * 300))
    with pytest.raises(ValueError, match="fewer --samples"):
        kld.SavedBase(str(tmp_path / "base.npy"), 1000, np.zeros((1, 300), np.int64))
    assert not list(tmp_path.iterdir())
    with kld.SavedBase(str(tmp_path / "base.npy"), 1000, np.zeros((1, 200), np.int64)):
        pass
    assert kld.open_base(str(tmp_path / "base.npy"), 1000, 200).shape == (1, 200)


@pytest.mark.parametrize("kind", masks.KINDS)
def test_kernels_keep_to_masks(kind, model):
    layer = masks.attend(kind, model, 640, 0)
    assert layer.error < masks.ROUNDED and layer.pairs > 0


def test_a_mask_that_is_not_kept_to_is_seen(model):
    about = model.config["model"]
    layer = MaskLayer((about["num_heads"], about["kv_heads"], about["head_dim"]), CacheOptions("f16", "f16"), 512, 128, model.threads)
    layer._seen = lambda sequence, count, plan: np.ones((1, count, sequence.length), bool)  # every token sees the later ones
    layer.call([(layer.cache.new_sequence(), 128, None)], True)
    assert layer.error > masks.ROUNDED


# ---- the command ---------------------------------------------------------------------------------------------------
def test_settings_are_paired_and_a_second_call_measures_nothing(edgeattn, nano_int4, tmp_path, text, monkeypatch):
    arguments = "kld,recall", "--lengths", 700, "--samples", 1, "--text", text, "-ctk", "f16,int2", "--out", tmp_path / "r.jsonl"
    records = evaluate(edgeattn, nano_int4, *arguments)
    assert [(r["task"], r["setting"], r["depth"]) for r in records] == [
        ("kld", "-ctk f16", 700), ("recall", "-ctk f16", 700), ("kld", "-ctk int2", 700), ("recall", "-ctk int2", 700)]
    assert records[0]["against"] is None and records[2]["against"]["setting"] == "-ctk f16" and records[2]["score"] > 0
    assert all({"kind", "model", "setting", "command", "machine", "date", "edgeattn", "samples", "score", "low", "high", "metrics",
                "kv_bytes"} <= set(r) for r in records)
    monkeypatch.setattr("edgeattn.apps.eval_run.run", lambda *a, **b: pytest.fail("measured again"))
    assert evaluate(edgeattn, nano_int4, *arguments) == records
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4
    table = edgeattn("eval", *arguments, "-m", nano_int4).stdout.splitlines()
    assert [line.split()[1] for line in table[2:6]] == ["kld", "kld", "recall", "recall"] and len(set(map(len, table[:6]))) == 1
    assert any(line.startswith("| 99.9 %") for line in table) and any(line.startswith("| 32 facts") for line in table)


def test_a_line_that_a_crash_cut_off_is_measured_again(edgeattn, nano_int4, tmp_path):
    arguments = "needle", "--lengths", 300, "--samples", 1, "--out", tmp_path / "r.jsonl"
    whole = evaluate(edgeattn, nano_int4, *arguments)
    text = (tmp_path / "r.jsonl").read_text()
    (tmp_path / "r.jsonl").write_text(text + text[:50])
    assert evaluate(edgeattn, nano_int4, *arguments) == whole
    (tmp_path / "r.jsonl").write_text(text[:-50])
    again = evaluate(edgeattn, nano_int4, *arguments)
    assert again[0]["values"] == whole[0]["values"] and (tmp_path / "r.jsonl").read_text() == json.dumps(again[0]) + "\n"


def test_where_stderr_is_no_terminal_progress_is_a_line_a_thing(edgeattn, nano_int4):
    done = edgeattn("eval", "needle", "-m", nano_int4, "--lengths", "200,300", "--samples", 1, "-o", "jsonl")
    assert done.returncode == 0 and done.stderr == ""  # less the lines that end in " ..."


@pytest.mark.parametrize("arguments, message", [
    (["perplexity"], "give one with --text FILE"), (["docqa"], "--documents FILE"), (["nothing"], "no task 'nothing'"),
    (["recall", "--lengths", "9000"], "need a context of"),
    (["recall", "--lengths", "100"], "raise --lengths"), (["frequent_words", "--lengths", "64"], "raise --lengths"),
    (["common_words", "--lengths", "200"], "raise --lengths"), (["kld", "--base", "none.npy"], "none.npy: no such file"),
    (["kld", "--base", "x", "--save-base", "y"], "give one of them"), (["recall", "--save-base", "y"], "the task kld's"),
    (["recall", "--out", "no/such/folder.jsonl"], "no such folder"), (["kld", "--save-base", "/"], "is a folder"),
    (["kld", "--save-base", "y", "--lengths", "100,200"], "windows of one length")])
def test_mistakes_are_told_in_a_line(edgeattn, nano_int4, arguments, message):
    assert message in edgeattn.fails("eval", *arguments, "-m", nano_int4)


def test_help_is_instant():
    import subprocess
    import sys
    code = "import sys; from edgeattn.apps import cli; cli.make_parser(); print({'numpy', 'scipy', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
