"""The ASGI application: routes, the guard before them, and errors in one shape."""
import re
import time

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import edgeattn
from edgeattn.apps.server import chat, completions, errors
from edgeattn.apps.server.admission import Admission
from edgeattn.apps.server.engine import Engine
from edgeattn.apps.server.events import respond
from edgeattn.apps.server.guard import Guard
from edgeattn.apps.server.settings import Settings

FIELD = re.compile("(?!body$|str$|int$)[a-z_]+|[0-9]+")  # and not the kind that pydantic tried there


def make_app(engine: Engine, settings: Settings = Settings(), routers: tuple[APIRouter, ...] = ()) -> FastAPI:
    """engine: started. routers: further routes, under the same guard; of theirs `/` and `/static/` need no key."""
    app = FastAPI(title="edgeattn", version=edgeattn.__version__, docs_url=None, redoc_url=None)  # their pages load scripts from afar
    for router in (_about(engine), chat.make_router(engine, settings), completions.make_router(engine, settings), *routers):
        app.include_router(router)
    app.add_middleware(Admission, settings=settings)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:  # outermost: a preflight request carries no key
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["GET", "POST"],
                           allow_headers=["Authorization", "Content-Type"])

    @app.exception_handler(errors.Refusal)
    async def refused(request, error):
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error):
        found = max(error.errors(), key=lambda one: len(one["loc"]))  # of several forms that were tried, the one that came furthest
        where = ".".join(str(part) for part in found["loc"] if FIELD.fullmatch(str(part)))
        return errors.response(400, f"{where}: {found['msg']}" if where else found["msg"], param=where or None)

    @app.exception_handler(HTTPException)
    async def http(request, error):
        return errors.response(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(request, error):
        return errors.response(500, "internal error; the server's log says more")
    return app


def _about(engine):
    router, started = APIRouter(), int(time.time())

    def model():
        return {"id": engine.name, "object": "model", "created": started, "owned_by": "edgeattn", "ctx_size": engine.model.ctx_size}

    @router.get("/health", summary="Whether the server answers")
    async def health():
        if not engine.alive:
            raise errors.Refusal(503, "the model's thread has ended: start the server again")
        return respond({"status": "ok"})

    @router.get("/v1/models", summary="The model")
    async def models():
        return respond({"object": "list", "data": [model()]})

    @router.get("/v1/models/{name:path}", summary="The model, by name")
    async def named(name: str):
        if name != engine.name:
            raise errors.Refusal(404, f"there is no model of this name, only {engine.name}", "model_not_found", "model")
        return respond(model())

    @router.get("/metrics", summary="Figures for Prometheus")
    async def metrics():
        return Response(engine.figures.prometheus(engine.status()), media_type="text/plain; version=0.0.4; charset=utf-8")
    return router
