"""A response of server-sent events that never falls silent.

Clients and proxies give up on a connection without traffic, and a reload or a long prefill can
take longer than they wait. So a comment, which every SSE parser skips, goes out whenever nothing
was sent for `ping_seconds`; where the response has not begun by then, the comment begins it.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import Self

from starlette.datastructures import MutableHeaders
from starlette.types import Send

PING = b": waiting\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # nginx would hold the events back otherwise.
    "x-accel-buffering": "no",
}


class EventStream:
    """One SSE response. Within `async with` it is kept alive; `close` completes it.

    `early_headers` gives the headers of a response that a ping begins, where `begin` did not come
    first. Once `begun` is true, an error can no longer be an HTTP status.
    """

    def __init__(
        self, send: Send, *, ping_seconds: float, early_headers: Callable[[], Mapping[str, str]]
    ) -> None:
        self.begun = False
        self._send = send
        self._ping_seconds = ping_seconds
        self._early_headers = early_headers
        self._writing = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._last_sent_at = self._loop.time()

    async def __aenter__(self) -> Self:
        self._pinger = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._pinger.cancel()
        await asyncio.gather(self._pinger, return_exceptions=True)

    async def begin(self, headers: Mapping[str, str]) -> None:
        """Send status 200 and the headers, unless a ping already has."""
        async with self._writing:
            await self._begin(headers)

    async def event(self, data: str) -> None:
        """Send one event; `data` is one line of ASCII."""
        async with self._writing:
            await self._write(f"data: {data}\n\n".encode("ascii"))

    async def close(self) -> None:
        """Complete the response; nothing can be sent after."""
        async with self._writing:
            self._pinger.cancel()
            await self._write(b"", more_body=False)

    async def _keep_alive(self) -> None:
        while True:
            idle = self._loop.time() - self._last_sent_at
            if idle < self._ping_seconds:
                await asyncio.sleep(self._ping_seconds - idle)
                continue
            async with self._writing:
                await self._begin(self._early_headers())
                await self._write(PING)

    async def _begin(self, headers: Mapping[str, str]) -> None:
        if self.begun:
            return
        self.begun = True
        all_headers = MutableHeaders(headers={**_HEADERS, **headers})
        await self._send({"type": "http.response.start", "status": 200, "headers": all_headers.raw})

    async def _write(self, body: bytes, *, more_body: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more_body})
        self._last_sent_at = self._loop.time()
