"""Tools: shown to templates that know them and to those that do not, and calls found in whatever pieces an answer comes."""
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from server_model import TOKENIZER

from edgeattn.apps.server.schema import ChatRequest
from edgeattn.apps.server.tools import CallReader, prepare

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
TEXTS = {CALL: ("", 1), f"Let me see.\n{CALL}\n{CALL}": ("Let me see.", 2), '{"name": "add", "parameters": {"a": 1}}': ("", 1),
         "1 < 2, and <tool is no call": ("1 < 2, and <tool is no call", 0), '{"a": 1}': ('{"a": 1}', 0),
         "<tool_call>\nadd(1)\n</tool_call> so": ("\nadd(1)\n so", 0)}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(TEXTS)), st.lists(st.integers(1, 9), min_size=1, max_size=80))
def test_calls_are_found_however_the_text_is_cut(text, lengths):
    reader, shown, calls, start = CallReader(), "", [], 0
    pieces = []
    for length in lengths:
        pieces.append(text[start:start + length])
        start += length
    for piece in [*pieces, text[start:]]:
        new, found = reader.add(piece)
        shown, calls = shown + new, calls + found
    new, found = reader.end()
    expected, count = TEXTS[text]
    assert (shown + new).strip("\n") == expected.strip("\n") and len(calls + found) == count
    assert all(json.loads(call["function"]["arguments"]) == {"a": 1} for call in calls + found)


def request(**more):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "1 + 1?"}], "tools": [TOOL], **more})


def test_a_template_without_tools_gets_them_in_words():
    prompt = prepare(request(), TOKENIZER)
    assert '"name": "add"' in prompt.text and prompt.calls and prompt.schema is None
    assert prompt.text.index("add") < prompt.text.index("1 + 1?")
    assert "add" not in prepare(request(tool_choice="none"), TOKENIZER).text


def test_results_of_calls_reach_a_template_without_tools():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}, {
        "role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "tool_call_id": "x", "content": "2"}]
    text = prepare(request(messages=messages), TOKENIZER).text
    assert '{"name": "add", "arguments": {"a": 1}}' in text and "<tool_response>\n2\n</tool_response>" in text
    assert text.count("system") == 1 and text.index("Be brief.") < text.index('"add"')


class Knowing:
    """A template that shows tools itself."""

    def render(self, messages, tools=None):
        return f"{json.dumps(tools)} {json.dumps(messages)}<tool_call>" if tools else json.dumps(messages)


def test_a_template_with_tools_gets_them_as_they_are():
    prompt = prepare(request(tool_choice="required"), Knowing())
    assert prompt.text.startswith('[{"type": "function", "function": {"name": "add"') and prompt.text.endswith("<tool_call>\n")
    assert prompt.schema["properties"]["name"] == {"const": "add"}


def test_definitions_of_tools_stand_at_the_root_and_may_not_differ():
    def tool(name, kind):
        return {"type": "function", "function": {"name": name, "parameters": {"$ref": "#/$defs/x", "$defs": {"x": {"type": kind}}}}}
    schema = prepare(request(tools=[tool("a", "string"), tool("b", "string")], tool_choice="required"), TOKENIZER).schema
    assert schema["$defs"] == {"x": {"type": "string"}} and len(schema["anyOf"]) == 2
    with pytest.raises(ValueError, match="two tools define 'x' differently"):
        prepare(request(tools=[tool("a", "string"), tool("b", "integer")], tool_choice="required"), TOKENIZER)
