"""A few threads that share out short pieces of work many times a second.

Handing a piece to a `ThreadPoolExecutor` makes a future and a condition for it each time, which
takes several times as long.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

Work = Callable[..., None]
_Task = tuple[Work, tuple[Any, ...]]


class Team:
    """`n_threads` threads, the caller's among them."""

    def __init__(self, n_threads: int, name: str) -> None:
        self.n_threads = n_threads
        self._tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        for index in range(n_threads - 1):
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True).start()

    def share(self, work: Work, parts: Sequence[tuple[Any, ...]]) -> None:
        """Call `work` with each of `parts`, at once as far as there are threads; raises what one of
        the calls raised, when all are over. For one caller at a time."""
        for part in parts[1:]:
            self._tasks.put((work, part))
        failure: BaseException | None = None
        try:
            if parts:
                work(*parts[0])
        except BaseException as error:
            failure = error
        for _ in parts[1:]:
            failure = self._results.get() or failure
        if failure is not None:
            raise failure

    def _work(self) -> None:
        while True:
            work, part = self._tasks.get()
            try:
                work(*part)
            except BaseException as error:
                self._results.put(error)
            else:
                self._results.put(None)
