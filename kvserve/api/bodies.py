"""Request bodies from JSON to the supervisor's terms, without holding up the other clients."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from kvserve.errors import InvalidRequest

B = TypeVar("B", bound=BaseModel)
T = TypeVar("T")

INLINE_BYTES = 128 * 1024
"""A larger body is read on a thread: on the event loop 15 MiB of messages would stop all streams
for more than a second."""


async def read_body(request: Request, model: type[B], convert: Callable[[B], T]) -> tuple[B, T]:
    """The body as `model`, and what `convert` makes of it.

    Raises InvalidRequest, RequestValidationError, and what `convert` raises.
    """
    data = await request.body()
    if "json" not in request.headers.get("content-type", ""):
        raise InvalidRequest("send a JSON object as the body, with Content-Type: application/json")
    if len(data) <= INLINE_BYTES:
        return _read(data, model, convert)
    return await asyncio.to_thread(_read, data, model, convert)


def body_schema(model: type[BaseModel], **items: type[BaseModel]) -> dict[str, Any]:
    """What `/openapi.json` says of a route that reads its body here; `items` are the models of
    lists that are checked one by one."""
    schema = model.model_json_schema()
    for name, item in items.items():
        schema["properties"][name]["items"] = item.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _read(data: bytes, model: type[B], convert: Callable[[B], T]) -> tuple[B, T]:
    value = _decode(data)
    try:
        body = model.model_validate(value)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(errors, body=value) from None
    return body, convert(body)


def _decode(data: bytes) -> object:
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    # Python's own reader is slower, takes a little more, and says better what is wrong.
    try:
        value: object = json.loads(data)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"the body is not JSON: {error.msg} at character {error.pos}"
        ) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError:
        raise InvalidRequest("the body is not JSON: it is not UTF-8") from None
    return value
