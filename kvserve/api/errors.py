"""Failures as OpenAI error objects: the one place where an exception becomes an HTTP answer.

Validation failures answer 400, not FastAPI's 422, because that is what OpenAI's own API does and
what its clients turn into `BadRequestError`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from kvserve.api.request_id import request_id_of
from kvserve.errors import DoesNotFit, InvalidRequest, KvserveError, Unauthorized

_LONGEST_ECHO = 200
_HTTP_CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "request_too_large",
}


class AsciiJSONResponse(JSONResponse):
    """JSON with every other character escaped: an echoed lone surrogate has no UTF-8 form."""

    def render(self, content: Any) -> bytes:
        """The body's bytes. Raises ValueError for NaN and infinities."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(error: KvserveError) -> dict[str, Any]:
    """The `{"error": …}` object, as a response body or as an event of a stream."""
    body: dict[str, Any] = {
        "message": error.message,
        "type": error.error_type,
        "param": error.param,
        "code": error.code,
    }
    if isinstance(error, DoesNotFit):
        body["needed_bytes"] = error.needed_bytes
        body["free_bytes"] = error.free_bytes
        body["options"] = list(error.options)
    return {"error": body}


def error_response(error: KvserveError, details: Mapping[str, Any] | None = None) -> Response:
    """The HTTP answer to a failure; `details` are put beside the message."""
    body = error_body(error)
    body["error"].update(details or {})
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return AsciiJSONResponse(body, error.http_status, headers)


def internal_error(request_id: str) -> KvserveError:
    """What a caller is told of a bug: where the log has more, and nothing of the inside."""
    return KvserveError(f"the server failed on this request; its log has it as {request_id}")


def param_of(location: Sequence[int | str]) -> str | None:
    """Write a pydantic location as `messages[0].content`, without where FastAPI found it."""
    path = ""
    for step in location[1:]:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")[:_LONGEST_ECHO] or None


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception of the app in the OpenAI form."""
    app.add_exception_handler(KvserveError, _on_kvserve_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)


def _on_kvserve_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, KvserveError)
    return error_response(error)


def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    location, message = first["loc"], first["msg"]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return error_response(
            InvalidRequest(f"the body is not JSON: {reason} at character {location[1]}")
        )
    if location == ("body",) and "json" not in request.headers.get("content-type", ""):
        return error_response(
            InvalidRequest("send a JSON object as the body, with Content-Type: application/json")
        )
    param = param_of(location)
    return error_response(InvalidRequest(f"{param or 'body'}: {message}", param=param))


def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    target = f"{request.method} {request.url.path}"[:_LONGEST_ECHO]
    message = f"there is no {target}" if error.status_code in (404, 405) else error.detail
    body = {
        "message": message,
        "type": "invalid_request_error" if error.status_code < 500 else "server_error",
        "param": None,
        "code": _HTTP_CODES.get(error.status_code, "invalid_request"),
    }
    return AsciiJSONResponse({"error": body}, error.status_code, error.headers)


def _on_bug(request: Request, _error: Exception) -> Response:
    request_id = request_id_of(request.scope)
    response = error_response(internal_error(request_id))
    # Starlette answers this one outside the middleware that sets the header elsewhere.
    response.headers["x-request-id"] = request_id
    return response
