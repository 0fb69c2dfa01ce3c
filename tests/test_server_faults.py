"""Bad requests, bad clients and too many of them."""
import asyncio
import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from described import statuses
from pydantic import ValidationError
from schemathesis import GenerationMode
from schemathesis.openapi import from_asgi
from server_model import TOKENIZER, FakeModel, serving

from edgeattn.apps.server.app import make_app
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.schema import ChatRequest
from edgeattn.apps.server.settings import Settings

ASK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
LONG = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}


@pytest.fixture
def served():
    """A function: (settings, engine's options) -> (address, engine) of a server over a FakeModel."""
    from contextlib import ExitStack
    with ExitStack() as stack:
        def start(settings=Settings(), model=None, **options):
            engine = Engine(model or FakeModel(), TOKENIZER, **options).start()
            stack.callback(engine.close)
            return stack.enter_context(serving(make_app(engine, settings))), engine
        yield start


def quiet(engine, seconds=20):
    """Whether nothing runs or waits soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not engine.status()["running"] + engine.status()["waiting"]:
            return True
        time.sleep(0.02)
    return False


BODIES = {"empty": b"", "no JSON": b"{", "list": b"[]", "bytes": b"\xff\xfe\x00",
          "bad UTF-8": b'{"messages": [{"role": "user", "content": "\xff"}]}',
          "deep": b"[" * 100_000, "deep object": b'{"tools": ' + b'{"a": ' * 50_000, "not a number": b'{"prompt": "a", "temperature": NaN}',
          "infinite": b'{"prompt": "a", "temperature": 1e999}', "long number": b'{"prompt": "a", "seed": ' + b"9" * 10_000 + b"}",
          "wrong types": b'{"prompt": {"a": 1}, "messages": 5}', "nothing": b"null", "mixed ids": b'{"prompt": [1, "a"]}'}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_nonsense_is_answered_with_400(served, path):
    address, _ = served()
    with httpx.Client(base_url=address) as client:
        for name, body in BODIES.items():
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400 and answer.json()["error"]["message"], name
        assert client.post(path, content=b"a=1", headers={"Content-Type": "text/plain"}).status_code == 400
        assert client.post("/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("field, value", [("top_k", "5"), ("seed", 1.5), ("seed", True), ("n", "2"), ("temperature", "0.5"),
                                          ("stream", "yes"), ("max_tokens", 3.0), ("logprobs", 1), ("logit_bias", {"-1": 1}),
                                          ("logit_bias", {"5\n": 1}), ("logit_bias", {"5": "1"}), ("stop", [1]), ("user", 7)])
def test_a_value_of_another_type_is_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        ChatRequest.model_validate({**ASK, field: value})


@pytest.mark.parametrize("body", [{"messages": [0] * 5000}, {"messages": [{"role": "user", "content": [0] * 5000}]}, {"tools": [0] * 5000},
                                  {"messages": [{"role": "assistant", "tool_calls": [0] * 5000}]}, {"stop": [0] * 5000},
                                  {"logit_bias": {f"x{i}": "" for i in range(5000)}}], ids=lambda body: next(iter(body)))
def test_of_many_mistakes_few_are_told(body):
    """Each takes a kilobyte, and a body has room for millions."""
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({**ASK, **body})
    assert caught.value.error_count() < 10


def test_half_a_character_in_json_is_no_crash(served):
    address, _ = served()

    def post(path, **body):
        return httpx.post(f"{address}/v1/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"})
    half = "\ud800"
    for path, body in (("chat/completions", {**ASK, "messages": [{"role": "user", "content": half}]}), ("completions", {"prompt": half}),
                       ("chat/completions", {**ASK, "tool_choice": {"function": {"name": half}}})):
        assert post(path, **body).status_code == 400
    inside = {"type": "object", "properties": {half: {"description": half}}}
    tool = {"function": {"name": "f", "description": "\0", "parameters": inside}}
    assert post("chat/completions", **ASK, tools=[tool]).status_code == 200
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": inside}}
    assert post("chat/completions", **ASK, response_format=schema).status_code in (200, 400)
    assert post("completions", prompt="a\0b", echo=True, max_tokens=2).json()["choices"][0]["text"].startswith("a\0b")


def test_200_streams_at_once_all_finish(served):
    address, engine = served(model=FakeModel(delay=0.0005), parallel=8)

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            async def one(number):
                stream = await client.chat.completions.create(model="any", stream=True, max_tokens=5, temperature=0,
                                                              messages=[{"role": "user", "content": f"Number {number % 50}"}])
                return number % 50, "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return await asyncio.gather(*map(one, range(200)))
    found = asyncio.run(all_of_them())
    assert len(set(found)) == 50 and len({text for _, text in found}) == 50  # the same question, the same answer
    assert quiet(engine) and engine.status()["requests"] == {"length": 200} and engine.status()["kept_sequences"] <= 32


def test_what_does_not_fit_the_queue_is_refused_at_once(served):
    address, engine = served(model=FakeModel(delay=0.002), parallel=2, most_waiting=10)

    async def all_of_them():
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=100)) as client:
            return await asyncio.gather(*[client.post("/v1/chat/completions", json=ASK) for _ in range(60)])
    answers = asyncio.run(all_of_them())
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} == {503} and 12 <= 60 - len(refused) < 60
    assert all(answer.headers["retry-after"] and answer.json()["error"]["code"] == "server_busy" for answer in refused)
    assert quiet(engine)


def knock(address, body):
    """A connection that has asked for something, and read nothing."""
    url, content = urlsplit(address), json.dumps(body).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((url.hostname, url.port))
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                       b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_place(served, stream):
    address, engine = served(model=FakeModel(delay=0.01, ctx_size=8192), parallel=1)
    gone = [knock(address, {**LONG, "stream": stream}) for _ in range(3)]  # one is answered, two wait
    while engine.status()["running"] + engine.status()["waiting"] < 3:
        time.sleep(0.01)
    for connection in gone:
        connection.close()
    assert quiet(engine)


def test_a_client_that_does_not_read_is_left(served):
    address, engine = served(Settings(write_limit=0.5), FakeModel(ctx_size=1 << 17), parallel=2)
    with knock(address, {**LONG, "logprobs": True, "top_logprobs": 20}):
        assert httpx.post(f"{address}/v1/chat/completions", json=ASK, timeout=30).status_code == 200  # others go on
        assert quiet(engine, 60) and engine.status()["requests"]["cancelled"] == 1


def test_a_body_that_does_not_come_is_not_waited_for(served):
    address, _ = served(Settings(write_limit=0.5))
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_server_that_stops_tells_its_streams(served):
    address, engine = served(model=FakeModel(delay=0.01, ctx_size=8192))
    with httpx.stream("POST", f"{address}/v1/chat/completions", json=LONG, timeout=30) as stream:
        lines = stream.iter_lines()
        next(lines)
        engine.stop()
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is stopping"


@pytest.fixture(scope="module")
def description():
    """Our own OpenAPI document, with the server behind it."""
    engine = Engine(FakeModel(), TOKENIZER).start()
    yield from_asgi("/openapi.json", make_app(engine, Settings(max_tokens=3, max_choices=4, allowed_hosts=("testserver",))))
    engine.close()


@pytest.mark.parametrize("path, method", [("/v1/chat/completions", "POST"), ("/v1/completions", "POST"), ("/v1/models", "GET"),
                                          ("/v1/models/{name}", "GET"), ("/health", "GET"), ("/metrics", "GET")])
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_nothing_that_the_description_allows_or_forbids_breaks_the_server(description, path, method, mode):
    found = statuses(description, path, method, mode, 40 if method == "POST" else 5)
    assert method == "GET" or (200 in found) == (mode is GenerationMode.POSITIVE)
