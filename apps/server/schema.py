"""The bodies of requests, as OpenAI's API has them; fields that are not known are ignored, and none is taken for another type.

Lists fail at their first wrong entry: telling of each of a million takes gigabytes.
"""
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Text = Annotated[str, Field(max_length=1 << 23)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(fail_fast=True)]
MOST_BIASED = 1024


def _few(bias):
    if isinstance(bias, dict) and len(bias) > MOST_BIASED:  # Field(max_length) looks only after all entries
        raise ValueError(f"at most {MOST_BIASED} tokens can have a bias")
    return bias


class Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class Part(Body):
    type: Literal["text"] = Field(description="text; images and sound cannot be read")
    text: Text


class FunctionCall(Body):
    name: Text
    arguments: Text = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())


class Function(Body):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"] = "function"
    function: ChosenFunction


class JsonSchema(Body):
    name: str = "answer"
    json_schema: dict | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class Generated(Body):
    """What both kinds of requests have."""
    model: str | None = Field(default=None, description="any name: the server has one model, which the answer names")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[Number, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]],
                          BeforeValidator(_few), Field(max_length=MOST_BIASED)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[str, Field(max_length=1000)] | Annotated[
        list[Annotated[str, Field(max_length=1000)]], Field(max_length=16, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    user: str | None = None
    session: Annotated[str, Field(max_length=200)] | None = Field(default=None, description="an edgeattn extension: the conversation "
                                                                  "whose KV cache is to be kept first")


class ChatRequest(Generated):
    messages: Annotated[list[Message], Field(min_length=1, max_length=10000, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(Generated):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1024, fail_fast=True)] | Ids | \
        Annotated[list[Ids], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: int | None = None
