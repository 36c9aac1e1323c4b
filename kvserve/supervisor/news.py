"""What happens to the daemon, told to whoever listens at the moment."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from kvserve.core.lifecycle import Phase
from kvserve.supervisor.status import ReloadRecord

MOST_UNREAD = 256


@dataclass(frozen=True, slots=True)
class PhaseEntered:
    """The daemon is in another phase, after `seconds` in `previous`."""

    phase: Phase
    previous: Phase
    seconds: float


@dataclass(frozen=True, slots=True)
class WeightsLoaded:
    """The share of the weights that a worker has loaded, 0 to 1."""

    fraction: float


Item = PhaseEntered | WeightsLoaded | ReloadRecord
Listener = asyncio.Queue[Item | None]
"""None is the end: the daemon stops, or the listener did not keep up."""


class News:
    """Hands each item to all who listen; for the event loop's thread."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()

    @contextlib.contextmanager
    def listen(self) -> Iterator[Listener]:
        """Listen from now on."""
        listener: Listener = asyncio.Queue()
        self._listeners.add(listener)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)

    def tell(self, item: Item | None) -> None:
        """Tell an item, or None for the end. Who has too many unread ones is told no more."""
        for listener in list(self._listeners):
            if item is None or listener.qsize() >= MOST_UNREAD:
                self._listeners.discard(listener)
                listener.put_nowait(None)
            else:
                listener.put_nowait(item)
