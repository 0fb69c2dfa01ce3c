"""OpenAI's API: the official client against a real server with the bundled model."""
import json

import httpx
import numpy as np
import openai
import pytest
from server_model import serving

from edgeattn.apps.server.app import make_app
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.settings import Settings
from edgeattn.generation import SamplerOptions, generate
from edgeattn.runtime import Model
from edgeattn.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "Jonas Weber built the mill in 1873. Who built the mill?"}]
WEATHER = {"type": "function", "function": {"name": "weather", "description": "The weather of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city", "days"], "additionalProperties": False, "$defs": {"days": {"enum": [1, 2, 3]}}}}}
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [30, 40]}},
          "required": ["name", "age"], "additionalProperties": False}


@pytest.fixture(scope="module")
def engine(nano_int4):
    engine = Engine(Model.load(nano_int4, ctx_size=2048), Tokenizer(nano_int4)).start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def address(engine):
    with serving(make_app(engine, Settings(sampling=SamplerOptions(temperature=0)))) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def alone(engine, prompt, count):
    """Greedy text of a prompt, without the server."""
    model = Model.load(engine.model.folder, ctx_size=2048)
    run = generate(model, engine.tokenizer, model.new_sequence(), prompt, SamplerOptions(temperature=0), count)
    return "".join(event.text for event in run), run


def test_chat_answers_as_the_model_does(client, engine):
    text, run = alone(engine, engine.tokenizer.encode_chat(QUESTION), 30)
    answer = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=30)
    assert answer.choices[0].message.content == text and answer.choices[0].finish_reason == run.finish_reason
    assert answer.model == "nano-int4" and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == run.timings.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_is_the_same_text_and_ends_with_usage(client):
    whole = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=12)
    chunks = list(client.chat.completions.create(model="any", messages=QUESTION, max_tokens=12, stream=True,
                                                 stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    usage = chunks[-1].usage
    assert not chunks[-1].choices and usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1


def test_a_conversation_reuses_what_was_said(client):
    messages = [{"role": "user", "content": "Remember this: the old mill burned down in 1901, and nobody was hurt."}]
    first = client.chat.completions.create(model="any", messages=messages, max_tokens=20)
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "When did it burn?"}]
    second = client.chat.completions.create(model="any", messages=messages, max_tokens=5)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


def test_sampling_is_the_request_s(client):
    def say(**options):
        found = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=8, temperature=1.5, **options)
        return [choice.message.content for choice in found.choices]
    two = say(n=2, seed=7)
    assert two == say(n=2, seed=7) and two[0] != two[1] and say(seed=8) != two[:1]


def test_stop_and_bias_are_obeyed(client, engine):
    text = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=12).choices[0].message.content
    word = text.split()[1]
    stopped = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=12, stop=[word])
    assert stopped.choices[0].message.content == text[:text.index(word)] and stopped.choices[0].finish_reason == "stop"
    token = engine.tokenizer.encode(text, special=False)[0]
    other = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=1, logit_bias={str(token): -100})
    assert not text.startswith(other.choices[0].message.content)
    loud = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=3, logit_bias={str(token): 100})
    assert loud.choices[0].message.content == engine.tokenizer.decode([token] * 3)


def test_chat_log_probabilities(client, engine):
    answer = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=4, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 4 and all(entry.token == entry.top_logprobs[0].token for entry in entries)  # greedy
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 3 for entry in entries)


def test_completions_continue_text_and_ids(client, engine):
    ids = engine.tokenizer.encode("The old mill stood")
    text, _ = alone(engine, ids, 8)
    both = client.completions.create(model="any", prompt=["The old mill stood", "The old mill stood"], max_tokens=8, echo=True)
    assert [choice.text for choice in both.choices] == ["The old mill stood" + text] * 2
    assert client.completions.create(model="any", prompt=ids, max_tokens=8).choices[0].text == text
    assert [c.text for c in client.completions.create(model="any", prompt=[ids, ids], max_tokens=8).choices] == [text, text]
    special = [f"a{engine.tokenizer.backend.id_to_token(min(engine.special_tokens))}b", "c"]  # which decoding would drop
    echoed = client.completions.create(model="any", prompt=special, n=2, max_tokens=1, echo=True).choices
    assert all(choice.text.startswith(special[i // 2]) for i, choice in enumerate(echoed))
    streamed = list(client.completions.create(model="any", prompt=ids, max_tokens=8, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text


@pytest.mark.parametrize("new", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(client, engine, new):
    """What evaluation harnesses ask for: token ids in, each one's log probability out, and whether it was the likeliest."""
    ids = engine.tokenizer.encode("The old mill stood by the river, and nobody knew who had built it. " * 20)
    scored = client.completions.create(model="any", prompt=ids, max_tokens=new, echo=True, logprobs=1).choices[0].logprobs
    model = Model.load(engine.model.folder, ctx_size=2048)
    logits = model.forward([(model.new_sequence(), ids)], "all").astype(np.float64)
    expected = (logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True))
    assert len(scored.token_logprobs) == len(ids) + new and scored.token_logprobs[0] is None
    np.testing.assert_allclose(scored.token_logprobs[1:len(ids)], expected[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
    greedy = [max(top.values()) == value for top, value in zip(scored.top_logprobs[1:], scored.token_logprobs[1:])]
    assert greedy[:len(ids) - 1] == (logits[:-1].argmax(1) == ids[1:]).tolist()
    assert "".join(scored.tokens[:len(ids)]) == engine.tokenizer.decode(ids) and scored.text_offset[:2] == [0, len(scored.tokens[0])]


@pytest.mark.parametrize("stream", [False, True])
def test_a_required_tool_is_called_as_its_schema_says(client, stream):
    found = client.chat.completions.create(model="any", messages=QUESTION, tools=[WEATHER], tool_choice="required", max_tokens=100,
                                           stream=stream, temperature=1.0, seed=3)
    if stream:
        chunks = [chunk.choices[0] for chunk in found]
        calls, reason = [call for chunk in chunks for call in chunk.delta.tool_calls or ()], chunks[-1].finish_reason
        assert not "".join(chunk.delta.content or "" for chunk in chunks)
    else:
        calls, reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
        assert found.choices[0].message.content is None
    (call,) = calls
    arguments = json.loads(call.function.arguments)
    assert reason == "tool_calls" and call.function.name == "weather" and call.id.startswith("call_")
    assert set(arguments) == {"city", "days"} and arguments["days"] in (1, 2, 3) and len(arguments["city"]) <= 12


def test_a_schema_is_followed(client):
    answer = client.chat.completions.create(model="any", messages=QUESTION, max_tokens=100, temperature=1.0, seed=1, n=2, response_format={
        "type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}})
    for choice in answer.choices:
        person = json.loads(choice.message.content)
        assert set(person) == {"name", "age"} and person["age"] in (30, 40) and choice.finish_reason == "stop"


def test_parsed_answers_of_the_client_s_helper(client):
    from pydantic import BaseModel

    class Verdict(BaseModel):
        right: bool
    answer = client.chat.completions.parse(model="any", messages=QUESTION, response_format=Verdict, max_tokens=30)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_models_health_and_metrics(client, address, engine):
    assert [model.id for model in client.models.list()] == ["nano-int4"] and client.models.retrieve("nano-int4").id == "nano-int4"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}

    def figures():
        lines = httpx.get(f"{address}/metrics").text.splitlines()
        return lines, {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}
    (_, before), _, (lines, after) = figures(), client.completions.create(model="any", prompt=[400], max_tokens=3), figures()
    grown = {name: after[f"edgeattn_{name}_total"] - before[f"edgeattn_{name}_total"] for name in ("prompt_tokens", "completion_tokens")}
    assert grown["prompt_tokens"] == 1 and 1 <= grown["completion_tokens"] <= 3 and after["edgeattn_running"] == 0
    assert all(line.split()[2].startswith("edgeattn_") for line in lines if line.startswith("#"))


@pytest.mark.parametrize("wrong, message", [
    (dict(messages=[]), "messages"), (dict(temperature=-1), "temperature"), (dict(max_tokens=0), "max_tokens"), (dict(n=65), "65 answers"),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "text"),
    (dict(messages=[{"role": "user", "content": "word " * 3000}]), "context 2048"),
    (dict(logit_bias={"9000": 1}), "0 to 8191"), (dict(tool_choice="required"), "no tools"),
    (dict(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "wether"}}), "only weather"),
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}), "objekt"),
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x"}}), "needs json_schema.schema"),
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a" * 140_000]}}}),
     "131072 are the most")],
    ids=lambda value: value if isinstance(value, str) else "")
def test_mistakes_are_told_in_one_sentence(client, wrong, message):
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        client.chat.completions.create(**{"model": "any", "messages": QUESTION} | wrong)
    assert caught.value.body["type"] == "invalid_request_error" and "\n" not in caught.value.body["message"]
