"""What requests and connections may take before anything is computed for them."""
import asyncio
import json
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from server_model import TOKENIZER, FakeModel, serving
from uvicorn.server import ServerState

from edgeattn.apps.server import admission, answers, connection
from edgeattn.apps.server.app import make_app
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.settings import Settings

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class SlowTokenizer:
    """TOKENIZER, whose `encode` waits until `open` is set, and counts."""

    def __init__(self):
        self.open, self.lock, self.now, self.most, self.calls = threading.Event(), threading.Lock(), 0, 0, 0

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text, special=True):
        with self.lock:
            self.now, self.calls = self.now + 1, self.calls + 1
            self.most = max(self.most, self.now)
        self.open.wait(30)
        with self.lock:
            self.now -= 1
        return TOKENIZER.encode(text, special)


@pytest.fixture
def served():
    """A function: (settings, connections, model, tokenizer) -> (a client of a server over a FakeModel, its engine)."""
    with ExitStack() as stack:
        def start(settings=Settings(), connections=600, model=None, tokenizer=TOKENIZER):
            engine = Engine(model or FakeModel(), tokenizer).start()
            stack.callback(engine.close)
            address = stack.enter_context(serving(make_app(engine, settings), connections))
            return stack.enter_context(httpx.Client(base_url=address, timeout=30, limits=httpx.Limits(max_connections=100))), engine
        yield start


def dial(client, content=b""):
    connected = socket.create_connection((client.base_url.host, client.base_url.port), timeout=30)
    connected.sendall(content)
    return connected


def heard(connected):
    """The status and the JSON of what a server says until it hangs up; (0, None): nothing."""
    said = b""
    try:
        while piece := connected.recv(65536):
            said += piece
    except ConnectionError:
        pass
    head, _, body = said.partition(b"\r\n\r\n")
    return (int(head.split()[1]), json.loads(body)) if said else (0, None)


def soon(happens):
    end = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- before the queue ----------------------------------------------------------------------------------------------
def test_few_requests_are_prepared_at_once_and_others_answered_meanwhile(served):
    tokenizer = SlowTokenizer()
    client, engine = served(tokenizer=tokenizer)
    with ThreadPoolExecutor(40) as threads:
        asked = [threads.submit(client.post, "/v1/chat/completions", json=ASK) for _ in range(40)]
        soon(lambda: tokenizer.now == admission.PLACES)
        assert client.get("/health").status_code == client.get("/v1/models").status_code == 200
        assert engine.status()["waiting"] == 0
        tokenizer.open.set()
        assert {one.result().status_code for one in asked} == {200}
    assert tokenizer.most == admission.PLACES and tokenizer.calls == 40


def test_who_waits_too_long_to_be_prepared_is_refused(served):
    tokenizer = SlowTokenizer()
    client, _ = served(Settings(wait_limit=0.2), tokenizer=tokenizer)
    with ThreadPoolExecutor(admission.PLACES) as threads:
        asked = [threads.submit(client.post, "/v1/completions", json={"prompt": "a"}) for _ in range(admission.PLACES)]
        soon(lambda: tokenizer.now == admission.PLACES)
        refused = client.post("/v1/chat/completions", json=ASK)
        assert refused.status_code == 503 and refused.headers["retry-after"] and refused.json()["error"]["code"] == "server_busy"
        tokenizer.open.set()
        assert {one.result().status_code for one in asked} == {200}
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200  # the places are free again


def test_who_vanishes_before_being_prepared_costs_nothing(served):
    tokenizer = SlowTokenizer()
    client, engine = served(tokenizer=tokenizer)
    content = json.dumps(ASK).encode()
    gone = [dial(client, HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)) for _ in range(admission.PLACES + 5)]
    soon(lambda: tokenizer.now == admission.PLACES)
    time.sleep(0.2)  # the others have come too
    for connected in gone:
        connected.close()
    time.sleep(0.2)
    tokenizer.open.set()
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    assert tokenizer.calls == admission.PLACES + 1


def test_long_bodies_have_a_limit_together_and_short_ones_always_room(served):
    client, _ = served(Settings(max_body=200_000))
    with ExitStack() as stack:
        def status():
            return client.post("/v1/chat/completions", content=json.dumps(ASK).encode() + b" " * 150_000,
                               headers={"Content-Type": "application/json"}).status_code

        def refused():
            stack.enter_context(dial(client, HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 199_000))  # the rest never comes
            return status() == 503
        assert status() == 200
        soon(refused)
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    soon(lambda: status() == 200)


def test_of_many_long_bodies_at_once_those_get_through_for_which_there_is_room(served):
    client, _ = served(Settings(max_body=200_000))
    content = json.dumps(ASK).encode() + b" " * 150_000
    room, head = admission.BODIES * 200_000 // len(content), HEAD + b"Content-Length: %d\r\n\r\n" % len(content)
    begun = [dial(client, head + content[:100]) for _ in range(room + 10)]
    soon(lambda: len(select.select(begun, [], [], 0)[0]) == 10)  # are refused before they send it all
    refused = select.select(begun, [], [], 0)[0]
    for connected in begun:
        if connected not in refused:
            connected.sendall(content[100:])
        assert connected.recv(100).split()[1] == (b"503" if connected in refused else b"200")
        connected.close()


def test_a_body_that_trickles_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(admission, "SLOWEST", 1 << 20)
    client, _ = served(Settings(write_limit=0.5))
    with dial(client, HEAD + b"Content-Length: 1000\r\n\r\n") as connected:
        connected.settimeout(0.1)
        for _ in range(100):
            connected.sendall(b" ")
            try:
                assert connected.recv(100).startswith(b"HTTP/1.1 408")
                break
            except TimeoutError:
                pass
        else:
            pytest.fail("ten seconds were given to a body of which there are 100 bytes")


# ---- connections ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\nHost: local"], ids=["nothing", "half a head"])
def test_a_head_that_does_not_come_is_not_waited_for(served, monkeypatch, begun):
    monkeypatch.setattr(connection, "HEAD", 0.5)
    client, _ = served()
    with dial(client, begun) as first, dial(client, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n") as second:
        status, content = heard(first)
        assert status == 408 and "in time" in content["error"]["message"]
        while b"ok" not in (piece := second.recv(65536)):
            assert piece  # it has not hung up
        second.sendall(b"GET /hea")  # the head of a second request is not waited for either
        assert heard(second)[0] == 408


def test_idle_connections_give_way(served, monkeypatch):
    monkeypatch.setattr(connection, "HEAD", 60)
    client, _ = served(connections=8)
    idle = [dial(client, begun) for begun in [b"", b"POST /v1/completions HTTP/1.1\r\nX-Slow: "] * 20]
    soon(lambda: client.get("/health").status_code == 200)
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200
    for connected in idle:
        connected.close()


def test_more_connections_than_may_be_are_told_so(served, monkeypatch):
    monkeypatch.setattr(connection, "GRACE", 60)
    monkeypatch.setattr(connection, "SPARE", 20)
    client, engine = served(connections=6, model=FakeModel(delay=0.01, ctx_size=8192))
    with ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True, "max_tokens": 5000}))
        refused = client.get("/health")
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_busy" and refused.headers["retry-after"]
        far = [dial(client) for _ in range(connection.SPARE + 6)]
        assert heard(far[-1]) == (0, None)
        for connected in far:
            connected.close()
    soon(lambda: not engine.status()["running"])
    assert client.get("/health").status_code == 200


def test_what_is_no_http_is_told_so(served):
    client, _ = served()
    for content in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n",
                    b"GET / HTTP/1.1\r\nX: " + b"x" * 50_000):
        with dial(client, content) as connected:
            status, told = heard(connected)
            assert status == 400 and "no HTTP request" in told["error"]["message"]


def test_a_body_that_breaks_off_into_nonsense_is_told_so(served, caplog):
    client, engine = served()
    with dial(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n") as connected:
        time.sleep(0.1)
        connected.sendall(b"no length\r\n")
        assert heard(connected)[0] == 400
    assert client.get("/health").status_code == 200 and not caplog.records and not engine.status()["requests"]


def test_a_server_ends_while_it_hangs_up_on_who_asked_nothing():
    async def end():
        ours, theirs = socket.socketpair()
        with theirs:
            settings = connection.config(lambda scope: None, 8)
            settings.load()
            transport, protocol = await asyncio.get_running_loop().create_connection(
                lambda: connection.Connection(settings, ServerState(), {}), sock=ours)
            transport.close()
            protocol.shutdown()
            await asyncio.sleep(0)
            assert not protocol.connections
    asyncio.run(end())


# ---- after it ------------------------------------------------------------------------------------------------------
def test_a_reader_who_falls_far_behind_is_left(served, monkeypatch):
    monkeypatch.setattr(answers, "BEHIND", 20_000)
    client, engine = served(model=FakeModel(ctx_size=1 << 15))
    content = json.dumps({**ASK, "stream": True, "max_tokens": 30_000, "logprobs": True, "top_logprobs": 20}).encode()
    with socket.socket() as connected:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connected.connect((client.base_url.host, client.base_url.port))
        connected.sendall(HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
        soon(lambda: engine.status()["requests"].get("cancelled") == 1)
        said = b""
        while b"has ended" not in said[-1000:]:
            said += (piece := connected.recv(1 << 16))
            assert piece
    assert client.post("/v1/chat/completions", json=ASK).status_code == 200


def test_more_log_probabilities_than_memory_holds_are_refused(served):
    client, _ = served(model=FakeModel(ctx_size=1 << 17))
    many = {**ASK, "max_tokens": 100_000, "n": 4, "logprobs": True, "top_logprobs": 20}
    refused = client.post("/v1/chat/completions", json=many)
    assert refused.status_code == 400 and "log probabilities" in refused.json()["error"]["message"]


def test_a_server_whose_thread_has_ended_says_so(served):
    client, engine = served()
    engine.close()
    assert client.get("/health").status_code == client.post("/v1/chat/completions", json=ASK).status_code == 503
