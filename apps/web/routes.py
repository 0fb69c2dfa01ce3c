"""Routes of the chat page: its files, conversations, answers, settings. Conversations live in the store; the page sends all of a
conversation with each question, so that it goes on also where nothing can be saved."""
import argparse
import asyncio
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from pydantic import Field

from edgeattn.apps import options
from edgeattn.apps.cli import one_line
from edgeattn.apps.markdown import to_html
from edgeattn.apps.server.admission import prepared
from edgeattn.apps.server.answers import address
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.errors import Refusal
from edgeattn.apps.server.events import EventStream, respond
from edgeattn.apps.server.queue import Busy
from edgeattn.apps.server.schema import Body, Number
from edgeattn.apps.server.settings import Settings
from edgeattn.apps.store import Missing, Store
from edgeattn.apps.web import memory
from edgeattn.apps.web.answering import Answering
from edgeattn.memory_estimate import estimate

PAGE = Path(__file__).parent / "page"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}  # Windows may know others
FILES = {path.name: path for path in PAGE.iterdir() if path.suffix in TYPES}  # nothing else is ever sent
Text = Annotated[str, Field(max_length=1 << 22)]
Whole = Annotated[int, Field(ge=0, lt=1 << 62)]


class Attached(Body):
    """A text file that was dropped: the first `length` characters of a question are its."""
    name: Annotated[str, Field(max_length=200)]
    length: Whole


class Facts(Body):
    """What the page tells beside a message: the files of a question, the figures of an answer."""
    files: Annotated[list[Attached], Field(max_length=1000, fail_fast=True)] = []
    prompt_tokens: Whole = 0
    cached_tokens: Whole = 0
    tokens: Whole = 0
    finish: Annotated[str, Field(max_length=40)] = ""
    ttft_s: Number | None = None
    sparse_share: Number | None = None
    tokens_per_second: Number | None = None


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text
    facts: Facts = Facts()


class Talk(Body):
    """A conversation up to a question; `conversation` and `revision` say where it is kept, if it is."""
    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    title: Annotated[str, Field(max_length=200)] | None = None  # of a new one
    conversation: Whole | None = None
    revision: Whole | None = None
    temperature: Annotated[Number, Field(ge=0, le=5)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


class Title(Body):
    title: Annotated[str, Field(min_length=1, max_length=200)]


class Changes(Body):
    """Of the cache and of sparse attention; what is left out stays."""
    cache_type: Literal[options.KV_TYPES] | None = None
    kv_budget: Annotated[str, Field(max_length=20)] | None = None  # "10M"; "" is none
    kv_eviction: Annotated[str, Field(max_length=40)] | None = None
    sparse_attention: Annotated[str, Field(max_length=40)] | None = None

    def flags(self) -> dict:
        """As Engine.reload takes them. ValueError: no size."""
        found = {name: value for name in ("kv_eviction", "sparse_attention") if (value := getattr(self, name)) is not None}
        if self.cache_type:
            found |= {"cache_type_k": self.cache_type, "cache_type_v": self.cache_type, "kv_bits": None}
        if self.sparse_attention:
            found |= {"sparse_budget": None}
        if self.kv_budget is not None:
            try:
                found["kv_budget"] = options.size(self.kv_budget) if self.kv_budget.strip() else None
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"the budget {error}") from None
        return found


def make_router(engine: Engine, store: Store | None, settings: Settings, unkept: str = "",
                asked: memory.Asked = memory.Asked()) -> APIRouter:
    """store: None where conversations are not kept; unkept: why, for the page to tell."""
    router, answering = APIRouter(), Answering(engine, store, settings)
    runtime = estimate(engine.model).runtime  # now, since nothing has been computed yet

    def facts():
        return engine.status() | {"unkept": unkept, **memory.present(engine.model, runtime)}

    async def kept(method, *arguments):
        if store is None:
            raise Refusal(404, "conversations are not kept")
        try:
            return await answering.in_store(method, store, *arguments)
        except Missing as error:
            raise Refusal(404, str(error)) from None
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        except OSError as error:
            raise Refusal(507, one_line(error), "not_kept") from None

    @router.get("/", summary="The chat page", include_in_schema=False)
    async def page():
        return FileResponse(FILES["index.html"], media_type=TYPES[".html"])

    @router.get("/static/{name}", summary="A file of the chat page", include_in_schema=False)
    async def file(name: str):
        if name not in FILES:
            raise Refusal(404, "no such file")
        return FileResponse(FILES[name], media_type=TYPES[FILES[name].suffix])

    @router.get("/api/status", summary="What the server is doing, and its settings")
    async def status():
        return respond(await asyncio.to_thread(facts))

    # ---- answers ------------------------------------------------------------------------------------------------
    @router.post("/api/answer", summary="Answer a conversation, as server-sent events, and keep it")
    async def answer(talk: Talk, request: Request):
        return EventStream(*await answering.start(talk, address(request)))

    @router.post("/api/stop/{answer}", summary="End an answer; what was said stays")
    async def stop(answer: str):
        return respond({"stopped": answering.stop(answer)})

    @router.post("/api/count", summary="How many tokens a conversation has")
    async def count(talk: Talk):
        return respond({"tokens": len(await answering.encode(talk)), "ctx_size": engine.model.ctx_size})

    # ---- conversations ------------------------------------------------------------------------------------------
    @router.get("/api/conversations", summary="What is kept, the newest first")
    async def conversations():
        return respond({"conversations": await kept(Store.conversations) if store else []})

    @router.get("/api/conversations/{number}", summary="A conversation; answers also as HTML")
    async def conversation(number: Whole):
        found = await kept(Store.load, number)
        for message in found["messages"]:
            if message["role"] == "assistant":
                message["html"] = await asyncio.to_thread(to_html, message["content"])
        return respond(found)

    @router.patch("/api/conversations/{number}", summary="Give a conversation another title")
    async def rename(number: Whole, body: Title):
        await kept(Store.rename, number, body.title)
        return respond({"id": number})

    @router.delete("/api/conversations/{number}", summary="Delete a conversation")
    async def remove(number: Whole):
        await kept(Store.remove, number)
        return respond({"id": number})

    # ---- settings -----------------------------------------------------------------------------------------------
    @router.post("/api/predict", summary="The memory that other settings would take")
    async def predict(changes: Changes):
        return respond(await _refusing(memory.predict, engine.model, asked, lambda: engine.changes | changes.flags(), runtime))

    @router.post("/api/settings", summary="Load the model with other settings")
    async def change(changes: Changes, request: Request):
        prepared(request)  # others need not wait for the model to be loaded
        await _refusing(lambda: engine.reload(changes.flags()))
        return respond(await asyncio.to_thread(facts))
    return router


async def _refusing(call, *arguments):
    try:
        return await asyncio.to_thread(call, *arguments)
    except Busy as error:
        raise Refusal(503, str(error), "server_busy") from None
    except (ValueError, OSError, MemoryError, OverflowError) as error:
        raise Refusal(400, one_line(error)) from None
