"""Who may talk to the server: names, origins, keys, sizes."""
import logging

import pytest
from fastapi import APIRouter
from server_model import TOKENIZER, FakeModel
from starlette.testclient import TestClient

from edgeattn.apps.server.app import make_app
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.settings import Settings

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def engine():
    engine = Engine(FakeModel(), TOKENIZER).start()
    yield engine
    engine.close()


@pytest.fixture
def browse(engine):
    """A function: settings -> a client of a server with them."""
    router = APIRouter()

    @router.get("/")
    @router.get("/static/page.js")
    @router.get("/api/conversations")
    def page():
        return {"page": True}

    def make(base="http://127.0.0.1:8080", **settings):
        return TestClient(make_app(engine, Settings(**settings), (router,)), base_url=base, raise_server_exceptions=False)
    return make


@pytest.mark.parametrize("host", ["127.0.0.1:8080", "localhost", "LOCALHOST:1", "[::1]:8080", "127.0.0.2"])
def test_local_names_are_served(browse, host):
    assert browse().get("/health", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8080", "192.168.1.7", "127.0.0.1.nip.io", "", "[::",
                                  "a@localhost:x"])
def test_other_names_are_not(browse, host):
    """A page of evil.example whose name resolves to 127.0.0.1 sends its own name."""
    answer = browse().post("/v1/chat/completions", json=ASK, headers={"Host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


def test_a_server_for_others_takes_addresses_and_the_names_it_is_given(browse):
    client = browse(local=False, api_key="k", allowed_hosts=("box.lan",))
    for host, status in (("192.168.1.7:8080", 200), ("box.lan", 200), ("evil.example", 403)):
        assert client.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8080", "file://"])
def test_pages_of_other_origins_are_refused(browse, origin):
    answer = browse().post("/v1/chat/completions", json=ASK, headers={"Origin": origin})
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert browse().options("/v1/chat/completions", headers=preflight).status_code == 403


def test_our_own_page_and_allowed_origins_are_served(browse):
    assert browse().post("/v1/chat/completions", json=ASK, headers={"Origin": "http://127.0.0.1:8080"}).status_code == 200
    client, origin = browse(cors_origins=("https://app.example",), api_key="k"), {"Origin": "https://app.example"}
    preflight = client.options("/v1/chat/completions", headers=origin | {"Access-Control-Request-Method": "POST",
                                                                         "Access-Control-Request-Headers": "authorization"})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    answer = client.post("/v1/chat/completions", json=ASK, headers=origin | {"Authorization": "Bearer k"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/api/conversations", "/nothing"])
def test_a_key_opens_everything_but_the_page(browse, path):
    client = browse(api_key="right")
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"Authorization": "Bearer r\xefght"}):
        answer = client.get(path, headers={name: value.encode("latin-1") for name, value in given.items()})
        assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get(path, headers={"Authorization": "Bearer right"}).status_code == (404 if path == "/nothing" else 200)
    assert client.get("/").status_code == client.get("/health").status_code == client.get("/static/page.js").status_code == 200


def test_answers_carry_headers_that_keep_pages_in(browse):
    headers = browse().get("/health").headers
    assert headers["x-content-type-options"] == "nosniff" and "default-src 'self'" in headers["content-security-policy"]
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_bodies_have_a_limit_announced_or_not(browse):
    client, body = browse(max_body=1000), b'{"messages": [{"role": "user", "content": "' + b"a" * 2000
    for content in (body, iter([body[:900], body[900:]])):
        answer = client.post("/v1/chat/completions", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "1000 bytes" in answer.json()["error"]["message"]
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_the_key_is_in_no_log_and_no_text(browse, caplog, capfd):
    settings = Settings(api_key="s3cret")
    with caplog.at_level(logging.DEBUG):
        browse(api_key="s3cret").get("/v1/models", headers={"Authorization": "Bearer s3cret-no"})
    assert "s3cret" not in repr(settings) + caplog.text + "".join(capfd.readouterr())


def test_unknown_paths_and_methods_have_the_same_shape(browse):
    for answer, status in ((browse().get("/nothing"), 404), (browse().get("/v1/chat/completions"), 405)):
        assert answer.status_code == status and answer.json()["error"]["message"]
