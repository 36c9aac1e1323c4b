"""The limit on a request body, kept also where no length is announced."""

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.units import format_bytes


class BodyLimitMiddleware:
    """Refuses a body of more than `max_bytes` with 413: by its announced length before a byte is
    read, else at the chunk that goes over."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        too_long = announced.isdecimal() and int(announced[:20]) > self._max_bytes
        n_bytes = 0

        async def limited_receive() -> Message:
            nonlocal n_bytes
            if too_long:
                raise self._refusal()
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self._max_bytes:
                raise self._refusal()
            return message

        await self._app(scope, limited_receive, send)

    def _refusal(self) -> HTTPException:
        # FastAPI lets only its own HTTPException through while it reads a body. The connection
        # is closed so that the rest of the body need not be read.
        return HTTPException(
            413,
            f"the body is more than {format_bytes(self._max_bytes)}",
            headers={"connection": "close"},
        )
