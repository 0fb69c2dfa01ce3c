"""Tools: how they are shown to a model, and calls found in what it says.

A call is JSON, {"name": ..., "arguments": {...}}, between <tool_call> and </tool_call> as Qwen's and Hermes' models write it, or alone as
Llama's do ("parameters" there). A template that knows no tools gets them as a system message in the first form.
"""
import json
import secrets
from dataclasses import dataclass

from edgeattn.apps.server.schema import ChatRequest, Tool, ToolChoice
from edgeattn.generation import StopStrings

OPEN, CLOSE = "<tool_call>", "</tool_call>"
ABOUT = f"""You may call these functions, one JSON schema a line:
{{tools}}
To call one, answer with its name and arguments and nothing else:
{OPEN}
{{{{"name": "...", "arguments": {{{{...}}}}}}}}
{CLOSE}"""


@dataclass(frozen=True)
class Prompt:
    """A conversation ready for a model. text: what the template made of it, and how the answer begins; schema: what the answer must be, or
    None; calls: whether tool calls are looked for in it."""
    text: str
    schema: dict | None
    calls: bool


def prepare(body: ChatRequest, tokenizer) -> Prompt:
    """ValueError: a tool that there is not, or a template that refuses."""
    tools = [] if body.tool_choice == "none" else body.tools or []
    chosen = _chosen(body, tools)
    messages = [_message(message) for message in body.messages]
    given = [tool.model_dump(exclude_none=True) for tool in tools]
    uses = bool(tools) or any(message.tool_calls or message.role == "tool" for message in body.messages)
    if uses and not _shows_tools(tokenizer):
        messages, given = _as_text(messages, given), []
    text = tokenizer.render(messages, tools=given or None)
    if not chosen:
        return Prompt(text, _format(body), bool(tools))
    return Prompt(text + OPEN + "\n" if OPEN in text else text, _call_schema(chosen), True)


def _shows_tools(tokenizer):
    """Whether the template does something with tools."""
    probe = {"type": "function", "function": {"name": "probe", "description": "", "parameters": {"type": "object", "properties": {}}}}
    question = [{"role": "user", "content": "?"}]
    return tokenizer.render(question, tools=[probe]) != tokenizer.render(question)


def _chosen(body, tools):
    """The tools of which one must be called, or none."""
    if body.tool_choice == "required":
        if not tools:
            raise ValueError("tool_choice is required, but there are no tools")
        return tools
    if isinstance(body.tool_choice, ToolChoice):
        name = body.tool_choice.function.name
        if found := [tool for tool in tools if tool.function.name == name]:
            return found
        raise ValueError(f"tool_choice names {name!r}, and tools has only {', '.join(tool.function.name for tool in tools) or 'none'}")
    return []


def _message(message):
    """As templates want it: arguments of calls as objects."""
    found = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        found["tool_calls"] = [{"id": call.id or "", "type": "function", "function": {
            "name": call.function.name, "arguments": _object(call.function.arguments)}} for call in message.tool_calls]
    if message.role == "tool":
        found |= {"tool_call_id": message.tool_call_id or "", "name": message.name or ""}
    return found


def _object(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_text(messages, tools):
    """Calls and their results as text, for a template without tools."""
    found = [{"role": "system", "content": ABOUT.format(tools="\n".join(map(json.dumps, tools)))}] if tools else []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            content += f"\n{OPEN}\n{json.dumps(call['function'])}\n{CLOSE}"
        if found and found[0]["role"] == message["role"] == "system":
            found[0] = {"role": "system", "content": f"{content}\n\n{found[0]['content']}"}
        elif message["role"] == "tool":
            found.append({"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"})
        else:
            found.append({"role": message["role"], "content": content.strip("\n") if "tool_calls" in message else content})
    return found


def _format(body):
    """The JSON schema that the answer has to follow, or None."""
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.json_schema is None:
        raise ValueError("response_format of type json_schema needs json_schema.schema")
    return wanted.json_schema.json_schema


def _call_schema(tools: list[Tool]):
    options, definitions = [], {}
    for tool in tools:
        parameters = dict(tool.function.parameters or {"type": "object"})
        for place in ("$defs", "definitions"):
            for name, value in dict(parameters.pop(place, {})).items():  # references start at the root
                if definitions.setdefault(place, {}).setdefault(name, value) != value:
                    raise ValueError(f"two tools define {name!r} differently in {place}: rename one")
        options.append({"type": "object", "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                        "required": ["name", "arguments"], "additionalProperties": False})
    return (options[0] if len(options) == 1 else {"anyOf": options}) | definitions


def read_call(text: str) -> dict | None:
    """A tool call of OpenAI's shape; None: the text is none."""
    try:
        found = json.loads(text)
        arguments = found.get("arguments", found.get("parameters", {}))
        if not isinstance(found["name"], str) or not isinstance(arguments, dict):
            return None
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
        return None
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": found["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}}


class CallReader:
    """Text in pieces -> (text to show, calls). What may become a call is held back until it is one, or is not."""

    def __init__(self):
        self._marks, self._held, self._inside, self._begun = StopStrings((OPEN,)), "", False, False

    def add(self, text: str) -> tuple[str, list[dict]]:
        shown, calls = "", []
        if not self._begun:
            self._held += text
            if not self._held.strip():
                return "", []
            self._begun, text, self._held = True, self._held, ""
            if text.lstrip().startswith("{"):  # perhaps a call without marks, or with ours before it
                self._inside = True
        while text:
            if self._inside:
                self._held += text
                body, end, rest = self._held.partition(CLOSE)
                if not end:
                    break
                calls, shown, text = calls + self._read(body), shown + self._plain(body), rest.lstrip("\n")
                self._inside, self._held = False, ""
            else:
                before = self._marks.held + text
                shown += self._marks.add(text)
                text = ""
                if self._marks.hit:
                    text = before[before.find(OPEN) + len(OPEN):]
                    self._inside, self._marks = True, StopStrings((OPEN,))
                    shown = shown.rstrip("\n")
        return shown, calls

    def _read(self, body):
        call = read_call(body)
        return [call] if call else []

    def _plain(self, body):
        return "" if read_call(body) else body

    def end(self) -> tuple[str, list[dict]]:
        """What was still held back."""
        body, self._held = self._held, ""
        return self._plain(body) + self._marks.flush(), self._read(body) if self._inside else []
