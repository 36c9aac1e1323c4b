"""Keeps the service manager told: ready, reloading, alive; as long as the event loop turns."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from kvserve.api.documents import describe_phase
from kvserve.core.lifecycle import Phase
from kvserve.notify import Notifier
from kvserve.supervisor.service import Service
from kvserve.supervisor.status import Status

_LOOK_SECONDS = 1.0
_ENDING = frozenset({Phase.STOPPING, Phase.STOPPED})


class Heartbeat:
    """Compares the daemon's state with what was told last, at each `beat`."""

    def __init__(self, service: Service, notifier: Notifier) -> None:
        self._service = service
        self._notifier = notifier
        self._told: tuple[str, str] | None = None
        self._was_ready = False

    @property
    def seconds(self) -> float:
        """Time from one beat to the next: half of what the watchdog allows, a second at most."""
        allowed = self._notifier.watchdog_seconds
        return _LOOK_SECONDS if allowed is None else min(_LOOK_SECONDS, allowed / 2)

    def beat(self) -> None:
        """Tell what changed, and that the daemon lives."""
        self._notifier.alive()
        status = self._service.status()
        if status.phase in _ENDING:
            return
        text = _describe(status)
        # Not `ready`: a reload is one for systemd also where requests are answered meanwhile.
        serving = status.phase is Phase.SERVING
        state = "ready" if serving else "reloading" if self._was_ready else "starting"
        if (state, text) == self._told:
            return
        before = None if self._told is None else self._told[0]
        if state in (before, "starting"):
            sent = self._notifier.status(text)
        elif state == "ready":
            self._was_ready = True
            sent = self._notifier.ready(text)
        else:
            sent = self._notifier.reloading(text)
        if sent:
            self._told = (state, text)


@contextlib.asynccontextmanager
async def beating(service: Service, notifier: Notifier) -> AsyncIterator[Heartbeat]:
    """Beat until the block ends; without anybody who listens, do nothing."""
    heart = Heartbeat(service, notifier)
    if not notifier.connected:
        yield heart
        return

    async def go_on() -> None:
        while True:
            heart.beat()
            await asyncio.sleep(heart.seconds)

    task = asyncio.create_task(go_on())
    try:
        yield heart
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _describe(status: Status) -> str:
    if status.phase is Phase.SERVING and status.plan is not None:
        launch = status.plan.chosen.launch
        return f"serving {launch.n_ctx} tokens of {launch.pair}"
    text = describe_phase(status.phase, status.load_fraction)
    return f"{text}: {status.error}" if status.error else text
