"""The limit on a request body, kept also where no length is announced."""

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.units import format_bytes

_DRAINED = 4
"""Times the limit that is read and thrown away before the refusal: a client that is still sending
when the connection closes sees a reset instead of the answer."""


class BodyLimitMiddleware:
    """Refuses a body of more than `max_bytes` with 413, by its announced length or at the chunk
    that goes over. None of it is kept."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        n_announced = int(announced[:20]) if announced.isdecimal() else 0
        too_long = n_announced > self._max_bytes
        # What is read to its end gets an answer from every client; this much is not read.
        hopeless = n_announced > _DRAINED * self._max_bytes
        n_bytes = 0

        async def limited_receive() -> Message:
            nonlocal n_bytes
            if hopeless:
                raise self._refusal()
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if too_long or n_bytes > self._max_bytes:
                while message.get("more_body", False) and n_bytes <= _DRAINED * self._max_bytes:
                    message = await receive()
                    n_bytes += len(message.get("body", b""))
                raise self._refusal()
            return message

        await self._app(scope, limited_receive, send)

    def _refusal(self) -> HTTPException:
        # FastAPI lets only its own HTTPException through while it reads a body. The connection
        # is closed: what is left of the body is not read.
        return HTTPException(
            413,
            f"the body is more than {format_bytes(self._max_bytes)}",
            headers={"connection": "close"},
        )
