"""What callers use of the supervisor: `service.Service`."""

import asyncio
from contextlib import AbstractContextManager

import structlog

from kvserve.core.plan import Plan
from kvserve.errors import NotReady
from kvserve.supervisor.admission import GenerationSpec, Job, Ticket
from kvserve.supervisor.news import Listener
from kvserve.supervisor.situation import Situation
from kvserve.supervisor.states import (
    Cancelled,
    ChangeAsked,
    Draining,
    Failing,
    Loading,
    Overlapping,
    Serving,
    StopAsked,
    Submitted,
    plan_of,
    worker_of,
)
from kvserve.supervisor.status import ReloadOutcome, Status

log = structlog.get_logger(__name__)


class Callers(Situation):
    """Puts requests and wishes in line as events, and shows the state."""

    @property
    def ready(self) -> bool:
        """Whether a worker serves, and new requests need not wait for a reload."""
        return isinstance(self._state, Serving | Overlapping)

    def submit(self, spec: GenerationSpec) -> Ticket:
        """Put a request in line."""
        ticket = Ticket(next(self._ids), lambda request_id: self.post(Cancelled(request_id)))
        now = self._clock()
        limit = self._policy.request_timeout
        deadline = None if limit is None else now + limit
        if self.stopped.done():
            ticket.put(NotReady("the server is shutting down"))
        else:
            job = Job(ticket.id, spec, ticket, submitted_at=now, deadline=deadline)
            self.post(Submitted(job))
        return ticket

    def listen(self) -> AbstractContextManager[Listener]:
        """Be told what happens from now on."""
        return self._news.listen()

    async def plan(self, n_ctx: int | None) -> Plan:
        """What would be chosen now; the running worker's memory counts as free."""
        return await self._planner.plan(n_ctx, returning_bytes=self._returning_bytes())

    async def change_context(self, n_ctx: int | None) -> ReloadOutcome:
        """Plan for another context, and reload where the plan differs."""
        if self.stopped.done():
            raise NotReady("the server is shutting down")
        answer: asyncio.Future[ReloadOutcome] = asyncio.get_running_loop().create_future()
        self.post(ChangeAsked(n_ctx, answer))
        return await answer

    async def stop(self) -> None:
        """End the worker and the loop."""
        self.post(StopAsked())
        await asyncio.shield(self.stopped)

    def status(self) -> Status:
        """The state at this moment."""
        state = self._state
        loaded = state.loaded if isinstance(state, Serving | Overlapping | Draining) else None
        failing = state if isinstance(state, Failing) else None
        worker = worker_of(state)
        return Status(
            phase=state.phase,
            plan=plan_of(state),
            measured=self._measured if loaded else None,
            load_fraction=state.fraction if isinstance(state, Loading | Overlapping) else None,
            template=loaded.template if loaded else None,
            engine=self._history.engine,
            worker_pid=worker.pid if worker else None,
            n_waiting=self._requests.n_waiting,
            n_running=self._requests.n_running,
            n_answered=self._requests.n_answered,
            n_failed=self._requests.n_failed,
            n_worker_deaths=self._history.n_worker_deaths,
            n_cells_used=self._requests.n_cells_used if self._requests.running else 0,
            speculation=loaded.speculation if loaded else None,
            n_drafted=self._requests.n_drafted,
            n_accepted=self._requests.n_accepted,
            error=failing.error.message if failing else None,
            retry_at=self._wall_clock() + failing.retry_at - self._clock() if failing else None,
            reloads=self._history.reloads,
            started_at=self._history.started_at,
        )
