"""The chat page in a real browser: what a user does with it, what a text could try, and who can use it."""
import re

import pytest

from web_page import Page, chromium  # noqa: F401

from test_web import EVIL

WAIT = 90_000  # milliseconds; the machine may be busy
STORY = "The **old mill** stood at the river.\n\n```python\nprint('flour')\n```\n\nIt is gone now."


@pytest.fixture(scope="module")
def server(nano_int4, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, \
            Page(nano_int4, tmp_path_factory.mktemp("web") / "conversations.sqlite", patch).open() as opened:
        yield opened


@pytest.fixture
def tab(chromium, server):  # noqa: F811
    """A page that must not raise, log errors, or ask another server for anything."""
    context, wrong = chromium.new_context(viewport={"width": 1300, "height": 850}), []
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.on("pageerror", lambda error: wrong.append(f"raised {error}"))
    page.on("console", lambda message: wrong.append(message.text)
            if message.type in ("error", "warning") and "server responded with a status of 400" not in message.text else None)
    page.on("request", lambda request: None if request.url.startswith(server.address) else wrong.append(f"asked {request.url}"))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.goto(server.address)
    page.wait_for_selector("#cache-type option", state="attached")
    yield page
    context.close()
    assert not wrong


def say(tab, text):
    tab.fill("#question", text)
    tab.keyboard.press("Enter")


def done(tab):
    tab.wait_for_selector("#send", state="visible")
    return tab.locator(".assistant .words").last


def test_an_answer_streams_and_is_there_after_a_reload(tab, server):
    server.script.say(STORY, delay=0.03)
    say(tab, "Tell me of the mill")
    tab.wait_for_selector(".assistant .tail strong, .assistant .words strong")
    assert tab.locator("#stop").is_visible() and "gone now" not in tab.locator(".assistant").inner_text()
    assert done(tab).locator("strong").inner_text() == "old mill"
    assert tab.locator(".assistant pre code span.nb").inner_text() == "print"
    assert re.search(r"\d+ tokens · [\d.]+ per second · first after", tab.locator(".facts").inner_text())
    assert "Answer: The **old mill**" in tab.locator("#announce").inner_text()
    assert tab.locator("#speed").inner_text() != "–" and re.search(r"Context: \d+ of 8,192", tab.locator("#context-label").inner_text())
    tab.wait_for_selector("#list [aria-current]")
    tab.reload()
    assert tab.locator(".assistant strong").inner_text() == "old mill"
    tab.locator("h1", has_text="Tell me of the mill").wait_for()
    assert tab.evaluate("document.activeElement.id") == "question"


def test_stop_try_again_and_edit(tab, server):
    server.script.say("word " * 500, "Second.", "Third.", delay=0.02)
    say(tab, "First question")
    tab.locator(".words p", has_text="word word word").wait_for()
    tab.keyboard.press("Escape")
    assert len(done(tab).inner_text().split()) < 490 and "stopped" in tab.locator(".facts").inner_text()
    tab.get_by_role("button", name="Try again").click()
    tab.locator(".words p", has_text="Second.").wait_for()
    done(tab)
    assert tab.locator(".assistant").count() == 1
    tab.get_by_role("button", name="Edit").click()
    tab.get_by_label("Edit your question").fill("Another question")
    tab.keyboard.press("Enter")
    tab.locator(".words p", has_text="Third.").wait_for()
    done(tab)
    assert tab.locator(".user .words").all_inner_texts() == ["Another question"]
    newest = server.store.load(server.store.conversations()[0]["id"])
    assert [m["content"] for m in newest["messages"]] == ["Another question", "Third."]


def test_a_long_text_is_dropped_and_asked_about(tab, server):
    text = "".join(f"In the year {1500 + i} the miller counted {100 + 7 * i} sacks. " for i in range(330))
    tab.evaluate("""text => {
        const data = new DataTransfer();
        data.items.add(new File([text], "mill.txt", { type: "text/plain" }));
        document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }));
    }""", text)
    tab.locator("#files .chip").wait_for()
    server.script.say("Many.")
    tab.fill("#question", "How many sacks?")
    tab.locator("#count", has_text=re.compile(r"^[67],\d+ of 8,192 tokens")).wait_for()
    tab.keyboard.press("Enter")
    assert done(tab).inner_text() == "Many."
    assert tab.locator(".user .chip .name").inner_text() == "mill.txt" and tab.locator(".user .words").inner_text() == "How many sacks?"
    kept = server.store.load(server.store.conversations()[0]["id"])
    assert kept["title"] == "mill.txt: How many sacks?" and kept["messages"][0]["content"] == f"{text.rstrip()}\n\nHow many sacks?"
    tab.set_input_files("#file", {"name": "image.png", "mimeType": "image/png", "buffer": b"\x89PNG\0\0"})
    tab.get_by_text("image.png is not a text file.").wait_for()


def test_a_question_too_long_is_told_and_given_back(tab):
    tab.set_input_files("#file", {"name": "long.txt", "mimeType": "text/plain", "buffer": b"word " * 9000})
    say(tab, "How many words?")
    tab.get_by_text("shorten the question").wait_for()
    assert tab.locator("#question").input_value() == "How many words?" and tab.locator("#files .name").inner_text() == "long.txt"


def test_no_text_can_act(tab, server):
    server.script.say(EVIL, EVIL)
    say(tab, EVIL)
    done(tab)
    tab.reload()
    tab.locator(".assistant").first.wait_for()
    found = tab.evaluate("""() => [...document.querySelectorAll("#messages *")].flatMap(element => [element.tagName.toLowerCase(),
        ...[...element.attributes].map(one => one.name).filter(name => name.startsWith("on"))])""")
    assert not {"script", "img", "svg", "iframe"} & set(found) and not [name for name in found if name.startswith("on")]
    assert tab.locator(".user .words").inner_text().startswith("<script>alert(1)</script>")
    for link in tab.locator("#messages a").all():
        assert link.get_attribute("href").startswith("http") and link.get_attribute("rel") == "noopener noreferrer"


def test_conversations_are_renamed_found_and_deleted(tab, server):
    server.script.say("Yes.")
    say(tab, "A question to delete")
    done(tab)
    item = tab.locator("#list .item.now")
    item.get_by_label("Rename").click()
    tab.get_by_label("Title").fill("Mills of old")
    tab.keyboard.press("Enter")
    tab.locator("h1", has_text="Mills of old").wait_for()
    tab.fill("#find", "mills OF")
    assert tab.locator("#list .open").all_inner_texts() == ["Mills of old"]
    item.get_by_label("Delete").click()
    tab.get_by_role("button", name="Delete", exact=True).click()
    tab.get_by_text("Nothing found.").wait_for()
    assert tab.locator("#welcome").is_visible() and all(c["title"] != "Mills of old" for c in server.store.conversations())


def test_settings_show_what_they_will_take(tab, server):
    tab.get_by_label("KV cache type").select_option("int4")
    tab.get_by_text("would take").wait_for()
    tab.get_by_label("KV budget").fill("much")
    tab.get_by_text("the budget must be bytes").wait_for()
    tab.get_by_label("KV budget").fill("")
    tab.get_by_text("would take").wait_for()
    tab.get_by_role("button", name="Apply").click()
    tab.locator("#model", has_text="int4 cache").wait_for()
    assert server.engine.model.cache.options.k_type == "int4"


@pytest.mark.parametrize("width, scheme", [(1300, "light"), (390, "dark")])
def test_everyone_can_use_it(tab, server, width, scheme):
    from axe_playwright_python.sync_playwright import Axe
    server.script.say(STORY)
    tab.set_viewport_size({"width": width, "height": 800})
    tab.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    say(tab, "Tell me of the mill")
    done(tab)
    if width < 700:
        tab.get_by_role("button", name="Status and settings").click()
        assert tab.get_by_label("KV cache type").is_visible()
        tab.keyboard.press("Escape")
        assert not tab.get_by_label("KV cache type").is_visible()
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    tab.reload()
    tab.wait_for_selector(".assistant .words p")
    tab.locator(".skip").focus()
    assert tab.locator(".skip").bounding_box()["y"] >= 0  # in sight, now that it has the focus
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "question"
