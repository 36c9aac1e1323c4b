"""What happened so far, for the status: loads and reloads, deaths, the engine."""

from collections.abc import Callable

from kvserve.ipc.messages import CarryReport
from kvserve.supervisor.news import News
from kvserve.supervisor.observing import Observer, Unobserved
from kvserve.supervisor.states import Attempt
from kvserve.supervisor.status import ReloadRecord

KEPT_RELOADS = 50


class History:
    """Counts and records. `wall_clock` gives seconds since the epoch."""

    def __init__(
        self,
        wall_clock: Callable[[], float],
        observer: Observer | None = None,
        news: News | None = None,
    ) -> None:
        self._observer = observer or Unobserved()
        self._news = news or News()
        self._wall_clock = wall_clock
        self._spawned_at = wall_clock()
        self.started_at = wall_clock()
        self.n_worker_deaths = 0
        self.engine: str | None = None
        self.reloads: tuple[ReloadRecord, ...] = ()

    def spawning(self) -> None:
        """A worker is about to be spawned."""
        self._spawned_at = self._wall_clock()

    def worker_died(self, cause: str) -> None:
        """A worker that served ended by itself."""
        self.n_worker_deaths += 1
        self._observer.worker_died(cause)

    def record(
        self,
        attempt: Attempt,
        outcome: str,
        detail: str | None = None,
        carry: CarryReport | None = None,
        pause_seconds: float | None = None,
    ) -> None:
        """An attempt came to its end; a change of context is timed from the asking."""
        change = attempt.change
        before = change.previous.chosen.launch if change else None
        launch = attempt.plan.chosen.launch
        began_at = change.started_at if change else self._spawned_at
        record = ReloadRecord(
            reason=attempt.reason,
            started_at=began_at,
            seconds=self._wall_clock() - began_at,
            outcome=outcome,
            from_cache_type=str(before.pair) if before else None,
            from_n_ctx=before.n_ctx if before else None,
            to_cache_type=str(launch.pair),
            to_n_ctx=launch.n_ctx,
            detail=detail or attempt.failure or attempt.in_order_because,
            carry=carry,
            overlapped=attempt.beside_bytes is not None,
            pause_seconds=pause_seconds,
        )
        self._observer.reloaded(record)
        self._news.tell(record)
        self.reloads = (*self.reloads, record)[-KEPT_RELOADS:]
