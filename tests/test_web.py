"""The chat page's routes: answers as events, what is kept of them, settings; and what no text can do."""
import json

import httpx
import pytest

from edgeattn.apps import models
from edgeattn.apps.cli import make_parser
from edgeattn.apps.markdown import Blocks, to_html
from edgeattn.apps.options import cache_options, sparse_options
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.web.memory import Asked, predict
from edgeattn.apps.web.routes import Changes
from edgeattn.memory_estimate import estimate

from web_page import Page

QUESTION = [{"role": "user", "content": "Who built the mill?"}]
EVIL = """<script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) ![b](http://evil.example/x.png)
[c](https://good.example/"onmouseover="alert(1)) <a href="data:text/html,x">d</a> &lt;script&gt;

```"><script>
</code><script>alert(1)</script>
```
| <b>x</b> | `<i>` |
|---|---|
| <svg onload=alert(1)> | [d]: http://evil.example |
"""


@pytest.fixture
def page(nano_int4, tmp_path, monkeypatch):
    with Page(nano_int4, tmp_path / "conversations.sqlite", monkeypatch).open() as opened:
        opened.client = httpx.Client(base_url=opened.address, timeout=60)
        yield opened


def answer(page, messages=QUESTION, **more):
    with page.client.stream("POST", "/api/answer", json={"messages": messages, **more}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


def test_an_answer_comes_as_html_and_is_kept(page):
    text = "Jonas **Weber** did.\n\n- in 1784\n- for *money*\n\n```python\nprint(1)\n```\nThe end."
    page.script.say(text, delay=0.01)
    events = list(answer(page, title="The mill"))
    assert events[0]["type"] == "start" and events[0]["conversation"] and events[-1]["type"] == "end"
    assert events[-1]["text"] == text and events[-1]["html"] == to_html(text)
    texts = [event for event in events if event["type"] == "text"]
    assert "".join(html for event in texts for html in event["done"]) + texts[-1]["tail"] == to_html(text) and len(texts) > 3
    facts = events[-1]["facts"]
    assert facts["finish"] == "stop" and facts["tokens"] > 20 and facts["ttft_s"] > 0 and facts["prompt_tokens"] > 5
    kept = page.client.get(f"/api/conversations/{events[-1]['conversation']}").json()
    assert kept["title"] == "The mill" and [m["content"] for m in kept["messages"]] == [QUESTION[0]["content"], text]
    assert kept["messages"][1]["html"] == to_html(text) and kept["revision"] == events[-1]["revision"]


def test_the_next_question_reads_only_what_is_new(page):
    page.script.say("It was Jonas Weber, long ago, for the people of the valley.", "In 1784.")
    first = list(answer(page))[-1]
    said = {"role": "assistant", "content": first["text"], "facts": first["facts"]}
    second = list(answer(page, [*QUESTION, said, {"role": "user", "content": "When?"}], conversation=first["conversation"],
                         revision=first["revision"]))[-1]
    assert second["conversation"] == first["conversation"] and second["facts"]["cached_tokens"] > first["facts"]["prompt_tokens"]
    assert len(page.store.load(first["conversation"])["messages"]) == 4


def test_stop_keeps_what_was_said(page):
    page.script.say("word " * 400, delay=0.01)
    told = []
    for event in answer(page):
        told.append(event)
        if event["type"] == "text" and event["facts"]["tokens"] > 5:
            page.client.post(f"/api/stop/{told[0]['answer']}")
    assert told[-1]["type"] == "end" and told[-1]["facts"]["finish"] == "cancelled" and 5 < told[-1]["facts"]["tokens"] < 390
    assert page.store.load(told[-1]["conversation"])["messages"][1]["content"] == told[-1]["text"]
    assert page.client.post(f"/api/stop/{told[0]['answer']}").json() == {"stopped": False}


def test_a_page_that_is_closed_leaves_what_was_said(page):
    import time
    page.script.say("word " * 400, delay=0.01)
    for event in answer(page):
        if event["type"] == "text" and event["facts"]["tokens"] > 5:
            break
    end = time.monotonic() + 30
    number = page.store.conversations()[0]["id"]
    while len(messages := page.store.load(number)["messages"]) < 2 or page.engine.status()["running"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert messages[1]["content"].startswith("word word") and messages[1]["facts"]["finish"] == "cancelled"


def test_a_full_disk_is_told_and_the_chat_goes_on(page):
    pages = page.store._base.execute("PRAGMA page_count").fetchone()[0]
    page.store._base.execute(f"PRAGMA max_page_count = {pages}")
    page.script.say("Yes.", "Yes.")
    long = [{"role": "user", "content": "word " * 1500}]
    end = list(answer(page, long))[-1]
    assert end["type"] == "end" and end["text"] == "Yes." and end["told"].startswith("Not kept: ") and "full" in end["told"]
    assert end["conversation"] is None
    page.store._base.execute("PRAGMA max_page_count = 100000")
    end = list(answer(page, long))[-1]  # all of it is sent again, so all of it is kept
    assert end["told"] == "" and len(page.store.load(end["conversation"])["messages"]) == 2


def test_a_conversation_changed_elsewhere_is_kept_beside_it(page):
    page.script.say("One.", "Two.")
    first = list(answer(page))[-1]
    page.store.save([{"role": "user", "content": "other"}], "nano", first["conversation"], first["revision"])
    second = list(answer(page, conversation=first["conversation"], revision=first["revision"]))[-1]
    assert second["conversation"] != first["conversation"]
    assert page.store.load(first["conversation"])["messages"][0]["content"] == "other"


def test_changed_elsewhere_on_a_full_disk_is_told(page):
    page.script.say("One.", "Two.")
    first = list(answer(page))[-1]
    page.store.save([{"role": "user", "content": "other"}], "nano", first["conversation"], first["revision"])
    page.store._base.execute(f"PRAGMA max_page_count = {page.store._base.execute('PRAGMA page_count').fetchone()[0]}")
    long = [{"role": "user", "content": "word " * 1500}]
    end = list(answer(page, long, conversation=first["conversation"], revision=first["revision"]))[-1]
    assert end["type"] == "end" and end["told"].startswith("Not kept: ")


@pytest.mark.parametrize("facts", ['{"ttft_s": NaN}', '{"files": 5}', '{"tokens": "5"}', "[" * 400 + "]" * 400])
def test_facts_that_could_not_be_shown_again_are_refused(page, facts):
    body = f'{{"messages": [{{"role": "user", "content": "x", "facts": {facts}}}]}}'
    response = page.client.post("/api/answer", content=body, headers={"Content-Type": "application/json"})
    status = page.engine.status()
    assert response.status_code == 400 and status["running"] == status["waiting"] == 0 and not page.store.conversations()


def test_facts_that_the_page_does_not_know_are_not_kept(page):
    page.script.say("Yes.")
    deep = json.loads('{"a":' * 300 + "1" + "}" * 300)
    facts = {"files": [{"name": "mill.txt", "length": 1}], "deep": deep}
    end = list(answer(page, [{**QUESTION[0], "facts": facts}]))[-1]
    assert page.store.load(end["conversation"])["messages"][0]["facts"] == {"files": facts["files"]}


def test_the_memory_of_a_full_context_does_not_grow_with_use(page):
    page.script.say("Yes.")
    before = page.client.get("/api/status").json()["memory"]["total"]
    list(answer(page, [{"role": "user", "content": "word " * 3000}]))
    assert page.client.get("/api/status").json()["memory"]["total"] == before


def test_long_code_has_no_colours():
    """Lexers may take time by the square of a text, and while it is told it is coloured again and again."""
    assert "<span" in to_html("```python\nx = 1\n```") and "<span" not in to_html("```python\n" + "x = 1\n" * 5000 + "```")


def test_what_cannot_be_answered_is_refused_in_words(page):
    def refused(status, path, **body):
        response = page.client.post(path, json=body)
        assert response.status_code == status, response.text
        return response.json()["error"]["message"]
    assert "the context holds 8,192" in refused(400, "/api/answer", messages=[{"role": "user", "content": "word " * 9000}])
    assert "must be the user's" in refused(400, "/api/answer", messages=[{"role": "assistant", "content": "x"}])
    assert "messages" in refused(400, "/api/answer", messages=[])
    assert "no conversation 99" in page.client.get("/api/conversations/99").json()["error"]["message"]
    assert "budget must be" in refused(400, "/api/predict", kv_budget="much")
    assert refused(400, "/api/settings", kv_budget="1K") and refused(400, "/api/predict", sparse_attention="nothing")
    assert page.client.get("/static/routes.py").status_code == page.client.get("/static/..%2froutes.py").status_code == 404
    assert page.client.post("/api/count", json={"messages": QUESTION}).json()["tokens"] == len(page.engine.tokenizer.encode_chat(QUESTION))


def test_the_prediction_is_what_the_model_then_takes(page):
    predicted = page.client.post("/api/predict", json={"cache_type": "int4"}).json()
    before = page.client.get("/api/status").json()
    after = page.client.post("/api/settings", json={"cache_type": "int4"}).json()
    assert after["cache"]["cache_type"] == "int4" and before["cache"]["cache_type"] == "f16"
    assert after["memory"]["kv"] == pytest.approx(predicted["kv"], rel=0.01) and predicted["kv"] < before["memory"]["kv"] / 2
    again = page.client.post("/api/predict", json={"cache_type": "f16"}).json()
    assert again["kv"] == pytest.approx(before["memory"]["kv"], rel=0.01)


def test_after_an_answer_that_failed_its_conversation_goes_on(page):
    def fail(*given, **more):
        raise RuntimeError("no")
    page.script.say("No.", "Yes.")
    page.engine.model.forward = fail
    error = list(answer(page))[-1]
    del page.engine.model.forward
    assert error["type"] == "error" and "internal error" in error["message"] and error["told"] == ""
    end = list(answer(page, conversation=error["conversation"], revision=error["revision"]))[-1]
    assert end["text"] == "Yes." and end["told"] == "" and len(page.store.conversations()) == 1


def test_a_conversation_deleted_while_it_is_answered_stays_so(page):
    page.script.say("word " * 400, "Yes.", delay=0.005)
    for event in answer(page):
        if event["type"] == "start":
            begun = event
        if event["type"] == "text" and event["facts"]["tokens"] > 5 and page.store.conversations():
            assert page.client.delete(f"/api/conversations/{begun['conversation']}").status_code == 200
            page.client.post(f"/api/stop/{begun['answer']}")
    assert event["type"] == "end" and "deleted" in event["told"] and event["conversation"] is None
    assert not page.store.conversations()
    end = list(answer(page, conversation=begun["conversation"], revision=begun["revision"]))[-1]  # who goes on with it starts another one
    assert end["told"] == "" and len(page.store.load(end["conversation"])["messages"]) == 2


def test_names_and_removal(page):
    page.script.say("One.")
    number = list(answer(page))[-1]["conversation"]
    assert page.client.patch(f"/api/conversations/{number}", json={"title": "Mills"}).status_code == 200
    for title in ("", "  \t"):
        assert page.client.patch(f"/api/conversations/{number}", json={"title": title}).status_code == 400
    assert page.client.patch(f"/api/conversations/{number + 1}", json={"title": "Mills"}).status_code == 404
    assert page.client.get("/api/conversations").json()["conversations"][0]["title"] == "Mills"
    assert page.client.delete(f"/api/conversations/{number}").status_code == 200
    assert page.client.get("/api/conversations").json()["conversations"] == []
    assert page.client.delete(f"/api/conversations/{number}").status_code == 404


@pytest.mark.parametrize("begun, changes", [
    ("-c=8192", {}), ("-c=8192", {"cache_type": "int8"}), ("-c=8192", {"cache_type": "int4", "sparse_attention": "quest"}),
    ("-c=8192", {"kv_budget": "6M"}), ("-c=8192", {"sparse_attention": "off"}), ("--kv-budget=6M", {"kv_budget": ""}),
    ("-c=8192", {"kv_budget": "4M", "kv_eviction": "snapkv"}), ("-c=2048", {"cache_type": "int8"}),
    ("--kv-budget=1500K", {"kv_budget": "6M"})], ids=str)
def test_the_prediction_is_what_edgeattn_estimate_tells(nano_int4, begun, changes):
    """For the same settings, of a model that was loaded with others and has computed."""
    def loaded(*flags):
        args = make_parser().parse_args(["estimate", "-m", str(nano_int4), "-t", "1", *flags])
        return args, models.load(args)[0]
    args, model = loaded(begun)
    model.forward([(model.new_sequence(), [7] * 600)])
    flags = {name: value for name, value in changes.items() if value and name != "cache_type"}
    flags |= dict.fromkeys(("cache-type-k", "cache-type-v"), changes["cache_type"]) if "cache_type" in changes else {}
    begun = [] if "kv_budget" in changes and "budget" in begun else [begun]
    expected = estimate(loaded(*begun, *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items()))[1])
    asked = Asked(cache_options(args), sparse_options(args), args.ctx_size or None, args.ubatch_size)
    told = predict(model, asked, Changes(**changes).flags, expected.runtime)
    assert told["kv"] == sum(expected.kv_layers) + expected.kv_state
    assert told["total"] - expected.runtime == pytest.approx(expected.total - expected.runtime, rel=0.03)


def test_without_a_store_and_with_a_key(nano_int4, tmp_path, monkeypatch):
    with Page(nano_int4, tmp_path / "x.sqlite", monkeypatch, Settings(api_key="secret")).open() as opened:
        assert httpx.get(opened.address).status_code == httpx.get(opened.address + "/static/app.js").status_code == 200
        for path in ("/api/status", "/api/conversations"):
            assert httpx.get(opened.address + path).status_code == 401
            assert httpx.get(opened.address + path, headers={"Authorization": "Bearer secret"}).status_code == 200
        policy = httpx.get(opened.address).headers["content-security-policy"]
        assert "default-src 'self'" in policy and "unsafe" not in policy


# ---- Markdown ------------------------------------------------------------------------------------------------------
def test_no_text_becomes_html_of_its_own():
    from html.parser import HTMLParser
    allowed = {"p", "a", "code", "pre", "span", "table", "thead", "tbody", "tr", "th", "td", "br", "em", "strong"}

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert tag in allowed and {name for name, _ in attributes} <= {"class", "href", "target", "rel"}, (tag, attributes)
            links.extend(value for name, value in attributes if name == "href")
    links = []
    Reader().feed(to_html(EVIL))
    assert links and all(link.startswith(("https://", "http://")) for link in links)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_blocks_are_the_text_cut_where_nothing_changes_any_more(size):
    text = "# One\ntwo *three*\n\n- a\n- b\n\n      c\n\n1. x\n\n```\ncode\n\n\nmore\n```\nafter\n\n> quote\n\n|a|b|\n|-|-|\n|1|2|\n\nlast"
    blocks = Blocks()
    done = [block for i in range(0, len(text), size) for block in blocks.add(text[i:i + size])]
    assert "".join(to_html(block) for block in [*done, blocks.tail]) == to_html(text) and len(done) >= 7
