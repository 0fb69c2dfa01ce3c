"""Errors in the shape of OpenAI's API, in plain ASCII, so that no text a client sent can break them."""
import json
from http import HTTPStatus

from starlette.responses import Response

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "invalid_request_error",
         408: "timeout_error", 500: "server_error", 503: "overloaded_error", 504: "timeout_error", 507: "server_error"}


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.body = status, body(status, message, code, param)

    def response(self) -> Response:
        return _response(self.status, self.body)


def body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict:
    return {"error": {"message": message, "type": TYPES.get(status, "invalid_request_error"), "param": param, "code": code}}


def response(status: int, message: str | None = None, code: str | None = None, param: str | None = None) -> Response:
    return _response(status, body(status, message or HTTPStatus(status).phrase, code, param))


def _response(status, content):
    headers = {"Retry-After": "5"} if status == 503 else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Response(json.dumps(content), status, headers, "application/json")
