"""edgeattn report: a page that stands alone, holds what was measured, and says by which commands."""
import re
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
from test_bench import ROW

from edgeattn.apps import record, report_plan
from edgeattn.apps.bench_report import Trial
from edgeattn.apps.report import latest
from edgeattn.apps.report_figures import figures
from edgeattn.apps.report_page import render
from edgeattn.apps.report_settings import labels, styles
from edgeattn.apps.report_tables import markdown, tables

VOID = {"meta", "link", "br", "img", "input", "hr"}


def bench(setting, depth, n_prompt, n_gen, speed, **about):
    test = Trial(depth, n_prompt, n_gen)
    rows = asdict(ROW) | {"setting": setting, "test": test.name, "depth": depth, "n_prompt": n_prompt, "n_gen": n_gen,
                          "tokens_per_second": speed, "samples_s": [(n_prompt + n_gen) / speed] * 3,
                          "command": f"edgeattn bench -n {n_gen}", "kv_bytes": 4096 * (1 + depth),
                          "sensors": {"frequency": "cpufreq", "power": None}}
    if n_prompt:
        rows["ttft_ms"] = 1e3 * n_prompt / speed
    if n_gen:
        rows |= {"p50_ms": 1e3 / speed, "p90_ms": 1.1e3 / speed, "p95_ms": 1.2e3 / speed, "kv_bytes_per_token": 2048 * (1 + depth),
                 "bandwidth": 1e10, "bandwidth_share": 0.5}
    return rows | about


def quality(task, setting, score, kv_bytes, **about):
    return {"kind": "eval", "model": "nano int4", "setting": setting, "command": f"edgeattn eval {task}", "machine": "a board",
            "date": "2026-01-02", "edgeattn": "0", "task": task, "depth": 4000, "samples": 40, "score": score, "low": score - 0.05,
            "high": score + 0.05, "unit": "% right", "metrics": {"8 facts": score - 0.01}, "kv_bytes": kv_bytes} | about


RESULTS = [bench(f"-c 8192 --kv-bits {bits}", depth, n_prompt, n_gen, (200 + bits) / (1 + depth / 4096) + n_prompt)
           for bits in (16, 4) for depth in (0, 2048, 4096) for n_prompt, n_gen in ((512, 0), (0, 64))]
RESULTS += [quality("recall", "-c 8192 --kv-bits 16", 0.9751, 16 << 20), quality("recall", "-c 8192 --kv-bits 4", 0.9377, 4 << 20),
            quality("recall", "-c 8192 --kv-bits '2 <&>'", 0.5123, 5 << 20),
            quality("kld", "-c 8192 --kv-bits 16", 0.0, 16 << 20, unit="nats", metrics={}, low=None, high=None),
            quality("kld", "-c 8192 --kv-bits 4", 0.0123, 4 << 20, unit="nats", metrics={"same top": 0.9}, low=None, high=None)]


class Page(HTMLParser):
    """Checks that tags close in order, and gathers ids, references and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.text, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.references += [value for name, value in attributes if name in ("href", "xlink:href", "src", "data", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def text():
    return render(RESULTS)


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def test_the_page_is_well_formed(text, page):
    assert text.startswith("<!DOCTYPE html>") and page.open == [] and len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == len(figures(RESULTS)) == 9 and "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_the_page_asks_for_nothing_else(text, page):
    assert all(reference.startswith("#") and reference[1:] in page.ids for reference in page.references)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags) and "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of formats
    assert set(re.findall(r"https?://[^\"'\s<]*", text)) <= names


def test_the_page_holds_what_was_measured(page):
    seen = "\n".join(page.text)
    for row in RESULTS:
        if row["kind"] == "bench":
            assert f"{row['tokens_per_second']:.1f} ± 1.5" in seen
        else:
            assert (f"{100 * row['score']:.1f} %" if row["task"] == "recall" else f"{row['score']:.4f}") in seen
    assert "--kv-bits 2 <&>" in seen and "a board" in seen and "power" in seen


def test_a_file_of_somebody_else_writes_no_markup():
    evil = [row | {"task": '"><script>\\1', "setting": f"--x '{row['setting']}<script>'"} for row in RESULTS if row["kind"] == "eval"]
    page = Page(render(evil))
    assert "script" not in page.tags and page.tags.count("svg") and '"><script>' in "".join(page.text)


def test_every_figure_names_its_commands():
    for one in [*figures(RESULTS), *tables(RESULTS)]:
        assert one.commands and all(command.startswith("edgeattn ") for command in one.commands), one.title
    by = {figure.title: figure.commands for figure in figures(RESULTS)}
    assert by["Generation"] == ["edgeattn bench -n 64"] and by["Quality: recall, 4,000 tokens"] == ["edgeattn eval recall"]


def test_colours_are_the_pages_own(text):
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--c0)" in svgs and "currentColor" in svgs and set(re.findall(r"#[0-9a-f]{6}", svgs)) <= {"#ffffff", "#000000"}


def points(figure):
    """Heights of a figure's first line in its SVG, from the axis up."""
    path = re.search(r'id="[^"]*-line2d_\d+">\s*<path d="([^"]*)" [^>]*style="[^"]*stroke: var\(--c0\); stroke-width: 1.6', figure.svg)[1]
    return [-float(y) for _, y in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]


def test_a_line_has_the_shape_of_its_numbers():
    found = next(figure for figure in figures(RESULTS) if figure.title == "Generation")
    speeds = [row["tokens_per_second"] for row in RESULTS if row["kind"] == "bench" and row["n_gen"] and row["setting"].endswith("16")]
    heights = points(found)
    assert np.corrcoef(heights, speeds)[0, 1] > 0.9999


def test_prompts_of_several_lengths_are_not_one_line():
    both = RESULTS + [row | {"n_prompt": 128, "test": "other"} for row in RESULTS if row["kind"] == "bench" and row["n_prompt"]]
    titles = [figure.title for figure in figures(both)]
    assert "Prompts, 512 tokens" in titles and "Prompts, 128 tokens" in titles and "Generation" in titles
    page = Page(render(both))
    assert page.open == [] and len(page.ids) == len(set(page.ids))


def test_of_two_results_the_last_counts():
    again = RESULTS[0] | {"tokens_per_second": 1.0, "repetitions": 9}
    assert latest([*RESULTS, again]) == [again, *RESULTS[1:]]


def test_of_two_results_the_one_over_more_samples_counts():
    few, many = quality("recall", "-c 8192 --kv-bits 16", 0.5, 16 << 20, samples=8), RESULTS[-5]
    assert latest([many, few]) == latest([few, many]) == [many]
    newer = few | {"edgeattn": "0.2"}  # another version's counts, over however few
    assert latest([many, newer]) == latest([few, many, newer]) == [newer]


def test_versions_that_stand_side_by_side_are_told(edgeattn, kept):
    record.append(kept, quality("needle", "", 0.5, 16 << 20, edgeattn="0.2"))
    done = edgeattn("report", "--from", kept, "--markdown")
    assert done.returncode == 0 and done.stderr == "results of several versions of edgeattn stand side by side: 0, 0.2\n"


def test_results_of_several_machines_stand_side_by_side():
    other = [row | {"machine": "a laptop, 8 cores, Linux 6"} for row in RESULTS]
    found = latest([*RESULTS, *other, *(row | {"machine": "a laptop, 8 cores, Linux 7"} for row in other)])
    assert len(found) == 2 * len(RESULTS) and found[len(RESULTS)]["machine"].endswith("Linux 7")
    assert list(labels(found[:1] + found[len(RESULTS):][:1]).values()) == ["nano int4 on a board", "nano int4 on a laptop"]


def test_labels_say_what_differs():
    assert list(labels(RESULTS).values())[:2] == ["--kv-bits 16", "--kv-bits 4"]
    sparse = [{"model": "a", "setting": "--kv-bits 4 --sparse-attention off"}, {"model": "a", "setting": "--kv-bits 4"}]
    assert list(labels(sparse).values()) == ["--sparse-attention off", "--sparse-attention auto"]
    mixed = [{"model": "a", "setting": ""}, {"model": "b", "setting": "-t 2"}]
    assert list(labels(mixed).values()) == ["a", "b -t 2"] and list(labels(mixed[:1]).values()) == ["defaults"]


def test_settings_that_differ_in_one_flag_share_a_colour():
    names = [f"--kv-bits {rest}" for rest in ("16 --kv-window 64", "16 --kv-window 32", "4 --kv-window 64")]
    assert styles(names) == [(0, 0), (0, 1), (1, 0)]
    assert styles(["--kv-bits 16", "--kv-bits 4"]) == styles(["defaults", "--kv-bits 4 --kv-window 32"]) == [(0, 0), (1, 0)]


def test_what_one_result_is_enough_for():
    page = Page(render(RESULTS[:1]))
    assert page.open == [] and page.tags.count("svg") == 1  # memory
    assert Page(render(RESULTS[-1:])).tags.count("svg") == 0


def test_markdown_is_brief_and_names_commands():
    text = re.sub(" +", " ", markdown(RESULTS))
    assert "| --kv-bits 16 | 216 | 144 | 108 | 16.0 MiB | 24.0 MiB | 90.0 MiB |" in text
    assert "`edgeattn bench -n 64`" in text and "51.2 %" in text
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in text.split("\n\n") if block.startswith("|"))


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "kept.jsonl"
    for result in RESULTS:
        record.append(path, result)
    return path


def test_the_command(edgeattn, kept, tmp_path):
    page = tmp_path / "page.html"
    done = edgeattn("report", "--from", kept, "-o", page)
    assert done.returncode == 0 and done.stdout == f"{page}\n" and Page(page.read_text()).open == []
    assert "| --kv-bits 16 |" in edgeattn("report", "--from", kept, "--markdown").stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept.jsonl", "page.html"]


def test_mistakes(edgeattn, kept, tmp_path, monkeypatch):
    assert "no such file" in edgeattn.fails("report", "--from", tmp_path / "none.jsonl")
    assert "no such folder" in edgeattn.fails("report", "--from", kept, "-o", tmp_path / "no/page.html")
    (tmp_path / "bad.jsonl").write_text('{"kind": "bench"}\nno json\n')
    assert "bad.jsonl, line 1: no result" in edgeattn.fails("report", "--from", tmp_path / "bad.jsonl", "-o", tmp_path / "page.html")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install matplotlib" in edgeattn.fails("report", "--from", kept, "-o", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_a_crash_cut_off_can_be_added_to(tmp_path):
    path = tmp_path / "cut.jsonl"
    record.append(path, RESULTS[0])
    with open(path, "a") as file:
        file.write('{"kind": "be')
    assert record.read(path) == RESULTS[:1]
    record.append(path, RESULTS[1])
    assert record.read(path) == RESULTS[:2] and path.read_text().count("\n") == 2


def test_a_whole_last_line_without_its_end_is_kept(kept):
    kept.write_text(kept.read_text()[:-1])
    assert record.read(kept) == RESULTS
    record.append(kept, RESULTS[0])
    assert record.read(kept) == [*RESULTS, RESULTS[0]]


@pytest.mark.parametrize("result", [{name: value for name, value in RESULTS[0].items() if name != "samples_s"},
                                    {"kind": "eval", "task": "recall"}, {"kind": ["bench"]}, {"name": "x"}, ["bench"]], ids=lambda _: "")
def test_what_is_no_result_is_refused(kept, result):
    record.append(kept, result)
    with pytest.raises(ValueError, match=f"line {len(RESULTS) + 1}: no result"):
        record.read(kept)


def test_a_text_that_is_no_result_is_not_cut(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    with pytest.raises(ValueError, match="line 1: no result"):
        record.read(path)
    record.append(path, RESULTS[0])
    assert path.read_text().startswith("my notes\n{")


def test_the_plan_is_of_commands_that_the_parser_knows():
    from edgeattn.apps.cli import make_parser
    about = {"model": {"ctx_size": 8192, "num_layers": 8, "kv_heads": 2, "head_dim": 64}}
    plan = report_plan.steps(["-m", "some folder"], about)
    assert {step.arguments[0] for step in plan} == {"bench", "eval"} and len({step.title for step in plan}) == len(plan)
    for step in plan:
        args = make_parser().parse_args([*step.arguments, "--out", "x.jsonl"])
        assert args.out == "x.jsonl" and args.model == ["some folder"]
    short = report_plan.steps([], {"model": about["model"] | {"ctx_size": 256}})
    assert {step.arguments[0] for step in short} == {"bench"} and "0,192" in short[0].arguments
