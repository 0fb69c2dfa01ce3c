"""Requests to the chat page's routes that their description allows or forbids: none is an error of the server's."""
import pytest
from described import statuses
from schemathesis import GenerationMode
from schemathesis.openapi import from_asgi
from web_page import Page

from edgeattn.apps.server.settings import Settings


@pytest.fixture(scope="module")
def description(nano_int4, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "conversations.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        page = Page(nano_int4, path, patch, Settings(max_tokens=3, allowed_hosts=("testserver",)))
        for number in range(4):
            page.store.save([{"role": "user", "content": f"Question {number}"}, {"role": "assistant", "content": "*Yes.*"}], "nano")
        page.engine.start()
        yield from_asgi("/openapi.json", page.app)
        page.engine.close()


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path, method, examples", [
    ("/api/status", "GET", 2), ("/api/answer", "POST", 15), ("/api/stop/{answer}", "POST", 3), ("/api/count", "POST", 15),
    ("/api/conversations", "GET", 3), ("/api/conversations/{number}", "GET", 8), ("/api/conversations/{number}", "PATCH", 10),
    ("/api/predict", "POST", 15), ("/api/settings", "POST", 5), ("/api/conversations/{number}", "DELETE", 8)])
def test_nothing_that_the_description_allows_or_forbids_breaks_the_page(description, path, method, examples, mode):
    found = statuses(description, path, method, mode, examples)
    assert mode is GenerationMode.POSITIVE or found is None or 200 not in found or "{" in path
    assert mode is GenerationMode.NEGATIVE or "{" in path or 200 in found
