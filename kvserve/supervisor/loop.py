"""The supervisor: one task that owns the state, and tells workers and callers what follows.

Everybody else posts events. Slow work (spawning, planning, reading devices) runs beside the loop
and comes back as an event.
"""

import asyncio
from dataclasses import replace

import structlog

from kvserve.core.lifecycle import Event
from kvserve.errors import NotReady
from kvserve.ipc.messages import (
    CopiedAhead,
    Failed,
    FromWorker,
    Hello,
    Loaded,
    LoadFailed,
    NeedsContext,
    Paused,
    Progress,
    Shutdown,
    Started,
    Step,
    TakenIn,
    Tokenized,
)
from kvserve.supervisor.admission import Job
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.launching import fingerprint
from kvserve.supervisor.recovery import (
    Failure,
)
from kvserve.supervisor.reloading import DID_NOT_PAUSE, Reloads
from kvserve.supervisor.states import (
    Attempt,
    Cancelled,
    ChangeAsked,
    ChangePlanned,
    Draining,
    Ended,
    Failing,
    Handover,
    Heard,
    Idle,
    Leaving,
    Loading,
    NotSpawned,
    Overlapping,
    Serving,
    Spawned,
    SpawnedAhead,
    StopAsked,
    Stopped,
    Stopping,
    Submitted,
    SupervisorEvent,
    Tick,
    TranscodedAhead,
    Weighed,
    Worker,
    attempt_of,
    successor_of,
    worker_of,
)

log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
STOP_GRACE_SECONDS = 5.0
STOP_KILL_SECONDS = 7.5


class Supervisor(Reloads):
    """Owns the state. Create it inside the event loop, then await `run()` in a task of its own."""

    async def run(self) -> None:
        """Handle events until stopped. Whatever happens, no worker and no waiting caller stays."""
        ticking = asyncio.create_task(self._tick())
        try:
            while not isinstance(self._state, Stopped):
                self.handle(await self._events.get())
        finally:
            ticking.cancel()
            for task in self._tasks:
                task.cancel()
            for worker in (worker_of(self._state), successor_of(self._state), *self._leaving):
                if worker is not None:
                    worker.kill()
            if (attempt := attempt_of(self._state)) is not None:
                _close_files(attempt)
            self._requests.fail_all(NotReady("the server is shutting down"))
            self._news.tell(None)
            await self._spawner.close()
            if not self.stopped.done():
                self.stopped.set_result(None)
            self._refuse_the_rest()

    def _refuse_the_rest(self) -> None:
        """Whoever came while the loop ended is answered too."""
        error = NotReady("the server is shutting down")
        while not self._events.empty():
            match self._events.get_nowait():
                case Submitted(job):
                    job.ticket.put(error)
                case ChangeAsked(_, answer) if not answer.done():
                    answer.set_exception(error)
                case _:
                    pass

    def handle(self, event: SupervisorEvent) -> None:
        """Take one event to its consequences; events of a worker that was replaced are void."""
        match event:
            case Submitted(job):
                self._on_submitted(job)
            case Cancelled(request_id):
                self._requests.cancel(request_id, self._answering_worker())
            case ChangeAsked(n_ctx, answer):
                self._on_change_asked(n_ctx, answer)
            case ChangePlanned(change, result, beside_bytes):
                self._on_change_planned(change, result, beside_bytes)
            case StopAsked():
                self._on_stop_asked()
            case Spawned() | NotSpawned() | Heard() | Ended() | Weighed():
                self._on_worker_event(event)
            case SpawnedAhead():
                self._on_spawned_ahead()
            case TranscodedAhead():
                self._on_dealt_with()
            case Tick():
                pass
        self._look_at_clock(self._clock())

    def _on_worker_event(self, event: Spawned | NotSpawned | Heard | Ended | Weighed) -> None:
        match event:
            case Spawned(worker, plan):
                self._on_spawned(worker, plan)
            case NotSpawned(error):
                if isinstance(self._state, Idle):
                    self._on_attempt_failed(self._state.attempt, Failure(error.message, error))
                elif isinstance(self._state, Overlapping):
                    self._reload_in_order(self._state, error.message)
            case Heard(worker, message) if worker is worker_of(self._state):
                self._on_heard(worker, message)
            case Ended(worker, exit_) if worker is worker_of(self._state):
                self._on_ended(exit_)
            case Heard(worker, message) if worker is successor_of(self._state):
                self._on_successor_heard(worker, message)
            case Ended(worker, exit_) if worker is successor_of(self._state):
                self._on_successor_lost(exit_)
            case Ended(worker, _):
                self._leaving.pop(worker, None)
            case Weighed(worker, measured) if worker is worker_of(self._state):
                self._measured = measured
            case _:
                pass

    async def _tick(self) -> None:
        while True:
            self.post(Tick())
            await asyncio.sleep(TICK_SECONDS)

    def _look_at_clock(self, now: float) -> None:
        """Whatever is due: deadlines, timeouts, and the next requests for an answering worker."""
        self._requests.expire(now, self._answering_worker())
        for overdue in [worker for worker, kill_at in self._leaving.items() if now >= kill_at]:
            overdue.kill()
        match self._state:
            case Idle(attempt, start_at=float(start_at)) as idle if now >= start_at:
                self._update(replace(idle, start_at=None))
                self._history.spawning()
                self._beside(self._spawn(attempt))
            case Loading(worker, heard_at=heard_at):
                self._kill_if_stuck(worker, now - heard_at)
            case Serving() as serving:
                self._answer(serving, now)
                self._adapt(serving, now)
            case Overlapping() as overlapping:
                self._answer(overlapping, now)
                self._kill_if_stuck(overlapping.successor, now - overlapping.heard_at)
                self._overlapped_till(overlapping, now)
            case Handover(worker, since=since):
                self._kill_if_stuck(worker, now - since)
            case Leaving(worker, kill_at=kill_at) if now >= kill_at:
                worker.kill()
            case Failing(attempt, retry_at=retry_at) if now >= retry_at:
                self._move(Event.RETRY, Idle(attempt, start_at=now))
                self._look_at_clock(now)
            case Stopping() as stopping:
                self._finish_stopping(stopping, now)
            case _:
                pass
        if isinstance(self._state, Draining):
            self._drain(self._state, now)

    def _answer(self, state: Serving | Overlapping, now: float) -> None:
        """Hand the next requests to the worker, and see that it works."""
        if not self._requests.running:
            self._heard_at = now
        self._dispatch(state)
        self._kill_if_hung(state.worker, now)

    def _on_submitted(self, job: Job) -> None:
        state = self._state
        if isinstance(state, Failing):
            wait = max(1.0, state.retry_at - self._clock())
            job.ticket.put(NotReady(f"no worker: {state.error.message}", retry_after=wait))
        elif isinstance(state, Stopping | Stopped):
            job.ticket.put(NotReady("the server is shutting down"))
        else:
            self._requests.admit(job)

    def _on_heard(self, worker: Worker, message: FromWorker) -> None:
        self._heard_at = self._clock()
        match message, self._state:
            case Hello(), _:
                self._history.engine = f"{message.engine} {message.engine_version}"
            case Progress() | Loaded() | LoadFailed() | TakenIn(), _:
                self._on_load_heard(worker, message)
            case Started(), Serving(attempt=attempt, loaded=loaded) | Overlapping(
                attempt=attempt, loaded=loaded
            ) | Draining(attempt=attempt, loaded=loaded):
                cache_type = str(attempt.plan.chosen.launch.pair)
                mark = fingerprint(attempt.plan, self._policy)
                self._requests.started(message, loaded.n_ctx, cache_type, mark)
            case Tokenized(), _:
                self._requests.tokenized(message)
            case NeedsContext(), _:
                self._requests.park(message)
            case Step(), _:
                self._requests.step(message)
                self._adapting.note(message, self._heard_at)
            case Failed(), _:
                self._requests.refused(message)
            case CopiedAhead(), _:
                self._on_copied_ahead(message)
            case Paused(), Draining() as state:
                self._on_paused(state, message)
            case Paused(), Stopping() as state:
                self._update(replace(state, shutdown_at=self._clock()))
            case _:
                log.debug("frame out of place", frame=type(message).__name__)

    def _on_ended(self, exit_: Exit) -> None:
        match self._state:
            case Loading() as state:
                self._on_load_lost(state, exit_)
            case Serving(attempt=attempt):
                self._history.worker_died(exit_.cause)
                log.error("worker died", cause=exit_.cause, last_words=exit_.last_words[-500:])
                if self._requests.n_answered > self._answered_at_load:
                    self._streak = 0
                self._requests.worker_died(exit_.cause)
                failure = Failure(f"the worker died: {exit_.cause}")
                self._on_attempt_failed(replace(attempt, fallback=None, change=None), failure)
            case Overlapping() | Draining() as state:
                self._history.worker_died(exit_.cause)
                if exit_.killed_for == DID_NOT_PAUSE:
                    # Slow, and no fault of a request.
                    self._requests.worker_paused()
                else:
                    self._requests.worker_died(exit_.cause)
                self._on_predecessor_lost(state)
            case Handover(attempt=attempt):
                # What it was to take in is kept for one more try, in the ordinary order.
                why = f"the worker died while it took conversations over: {exit_.cause}"
                self._observer.worker_died(f"handover: {exit_.cause}")
                log.error("handover failed", cause=exit_.cause)
                again = replace(attempt, beside_bytes=None, in_order_because=why)
                self._move(Event.LOST, Idle(again, start_at=self._clock()))
            case Leaving(following=following):
                self._move(Event.LOST, Idle(following, start_at=self._clock()))
            case Stopping():
                self._move(Event.LOST, Stopped())
            case _:
                pass

    def _on_stop_asked(self) -> None:
        state = self._state
        now = self._clock()
        if (attempt := attempt_of(state)) is not None:
            if attempt.change is not None:
                self._finish(attempt.change, NotReady("the server is shutting down"))
            _close_files(attempt)
        if (successor := successor_of(state)) is not None:
            successor.kill()
        if isinstance(state, Idle | Failing):
            self._move(Event.STOP, Stopped())
        elif isinstance(state, Serving | Overlapping | Draining):
            self._requests.fail_waiting(NotReady("the server is shutting down"))
            shutdown_at = now + STOP_GRACE_SECONDS
            self._move(
                Event.STOP, Stopping(state.worker, shutdown_at, kill_at=now + STOP_KILL_SECONDS)
            )
        elif isinstance(state, Loading | Handover | Leaving):
            state.worker.kill()
            self._move(Event.STOP, Stopping(state.worker, None, kill_at=now + STOP_KILL_SECONDS))

    def _finish_stopping(self, state: Stopping, now: float) -> None:
        if state.shutdown_at is not None and (
            now >= state.shutdown_at or not self._requests.running
        ):
            self._requests.fail_all(NotReady("the server is shutting down"))
            state.worker.send(Shutdown())
            self._update(replace(state, shutdown_at=None))
        elif now >= state.kill_at:
            state.worker.kill()


def _close_files(attempt: Attempt) -> None:
    """Nobody will take in what an attempt holds."""
    attempt.carried.close()
    if attempt.copied is not None:
        attempt.copied.close()
