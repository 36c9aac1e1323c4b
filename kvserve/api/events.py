"""`/admin/events`: what happens to the daemon, as server-sent events."""

import json
from collections.abc import Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvserve.api.documents import news_document
from kvserve.api.hangup import while_connected
from kvserve.api.plan_documents import Document
from kvserve.api.sse import EventStream
from kvserve.supervisor.service import Service


class Events(Response):
    """A stream that begins with `first` and ends when the daemon stops or the client hangs up.

    `clock` gives seconds since the epoch.
    """

    def __init__(
        self,
        service: Service,
        first: Callable[[], Document],
        clock: Callable[[], float],
        ping_seconds: float,
    ) -> None:
        super().__init__()
        self._service = service
        self._first = first
        self._clock = clock
        self._ping_seconds = ping_seconds

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Stream."""
        await while_connected(receive, self._stream(send))

    async def _stream(self, send: Send) -> None:
        stream = EventStream(send, ping_seconds=self._ping_seconds, early_headers=dict)
        with self._service.listen() as listener:
            async with stream as out:
                await out.begin({})
                await out.event(json.dumps({"event": "status", **self._first()}))
                while (item := await listener.get()) is not None:
                    await out.event(json.dumps(news_document(item, self._clock())))
                await out.close()
