"""`/admin/events`: what a listener reads, and when the stream ends."""

import asyncio
import json

from kvserve.api.app import create_app
from kvserve.core.lifecycle import Phase
from kvserve.supervisor.news import MOST_UNREAD, News, PhaseEntered, WeightsLoaded
from tests.api.scripted import CONFIG, NOW, SERVING, ScriptedService


class Stream:
    """A client of the events, without a network."""

    def __init__(self, service: ScriptedService) -> None:
        self.body = b""
        self.status = 0
        self.ended = False
        self._gone = asyncio.Event()
        self._asked = False
        scope = {
            "type": "http", "method": "GET", "path": "/admin/events", "raw_path": b"/admin/events",
            "query_string": b"", "headers": [(b"host", b"localhost")], "http_version": "1.1",
            "scheme": "http", "server": ("localhost", 8000), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.task = asyncio.create_task(
            create_app(service, CONFIG)(scope, self._receive, self._send)
        )

    async def _receive(self) -> dict[str, object]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message["body"]
            self.ended = not message.get("more_body", False)

    def hang_up(self) -> None:
        self._gone.set()

    async def events(self, n: int) -> list[dict]:
        async with asyncio.timeout(5):
            while self.body.count(b"data: ") < n:  # noqa: ASYNC110 - the app writes it
                await asyncio.sleep(0.001)
        lines = self.body.decode().split("\n\n")
        return [json.loads(line.removeprefix("data: ")) for line in lines if line]


def test_it_begins_with_the_status_and_tells_what_happens() -> None:
    async def story() -> None:
        service = ScriptedService()
        stream = Stream(service)
        (first,) = await stream.events(1)
        assert (stream.status, first["event"], first["phase"]) == (200, "status", "serving")
        service.news.tell(PhaseEntered(Phase.DRAINING, Phase.SERVING, 60.0))
        service.news.tell(WeightsLoaded(0.5))
        service.news.tell(SERVING.reloads[0])
        _, phase, load, reload = await stream.events(4)
        assert phase == {
            "event": "phase",
            "phase": "draining",
            "previous": "serving",
            "seconds": 60.0,
            "at": NOW,
        }
        assert load == {"event": "load", "load_fraction": 0.5, "at": NOW}
        assert (reload["event"], reload["outcome"]) == ("reload", "done")
        service.news.tell(None)
        await stream.task
        assert stream.ended

    asyncio.run(story())


def test_a_client_that_hangs_up_is_told_no_more() -> None:
    async def story() -> None:
        service = ScriptedService()
        stream = Stream(service)
        await stream.events(1)
        stream.hang_up()
        await asyncio.wait_for(stream.task, 5)
        service.news.tell(WeightsLoaded(0.5))
        assert stream.body.count(b"data: ") == 1

    asyncio.run(story())


def test_a_listener_that_does_not_read_is_dropped_at_a_bound() -> None:
    async def story() -> None:
        news = News()
        with news.listen() as slow, news.listen() as quick:
            for n in range(MOST_UNREAD + 10):
                news.tell(WeightsLoaded(n / 1000))
                assert await quick.get() is not None
            assert slow.qsize() == MOST_UNREAD + 1
            for _ in range(MOST_UNREAD):
                assert slow.get_nowait() is not None
            assert slow.get_nowait() is None

    asyncio.run(story())
