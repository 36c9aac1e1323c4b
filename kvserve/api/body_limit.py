"""The limits on a request body: its size, also where no length is announced, and its time."""

import asyncio
import time

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvserve.units import format_bytes

_DRAINED = 4
"""Times the limit that is read and thrown away before the refusal: a client that is still sending
when the connection closes sees a reset instead of the answer."""

_MOST_PAUSES = 20


class BodyLimitMiddleware:
    """Refuses a body of more than `max_bytes` with 413, by its announced length or at the chunk
    that goes over. None of it is kept. One that does not come for `pause_seconds`, or is not there
    after `_MOST_PAUSES` times that, is refused with 408, and the connection closed."""

    def __init__(self, app: ASGIApp, max_bytes: int, pause_seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._pause_seconds = pause_seconds

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
        complete = False
        ends_at = time.monotonic() + _MOST_PAUSES * self._pause_seconds

        async def timed_receive() -> Message:
            nonlocal complete
            if complete:  # what comes now is the client's leaving, whenever it does
                return await receive()
            try:
                left = ends_at - time.monotonic()
                message = await asyncio.wait_for(receive(), min(self._pause_seconds, left))
            except TimeoutError:
                raise HTTPException(
                    408, "the body did not come in time", headers={"connection": "close"}
                ) from None
            complete = not message.get("more_body", False)
            return message

        async def limited_receive() -> Message:
            nonlocal n_bytes
            if hopeless:
                raise self._refusal()
            message = await timed_receive()
            n_bytes += len(message.get("body", b""))
            if too_long or n_bytes > self._max_bytes:
                while message.get("more_body", False) and n_bytes <= _DRAINED * self._max_bytes:
                    message = await timed_receive()
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
