"""One worker follows another: beside it where both fit in memory, else after it."""

from dataclasses import replace

import structlog

from kvserve.core.lifecycle import Event
from kvserve.core.plan import Plan
from kvserve.errors import KvserveError, NotReady
from kvserve.ipc.messages import (
    FromWorker,
    Hello,
    Loaded,
    LoadFailed,
    Pause,
    Paused,
    Progress,
    ShareCores,
    Shutdown,
    TakeIn,
    TakenAhead,
    Transcode,
)
from kvserve.supervisor.carry import Carried, adopt
from kvserve.supervisor.copying import SLOWEST_EXPORT, Copying
from kvserve.supervisor.exits import Exit
from kvserve.supervisor.news import WeightsLoaded
from kvserve.supervisor.states import (
    Attempt,
    Change,
    Draining,
    Failing,
    Handover,
    Idle,
    Leaving,
    Loading,
    Overlapping,
    Serving,
    SpawnedAhead,
    Successor,
    Worker,
    successor_of,
)

log = structlog.get_logger(__name__)

LEAVE_SECONDS = 10.0
AHEAD_SECONDS = 10.0
"""How long a pause is put off for the next worker to import its modules."""
DID_NOT_PAUSE = "it did not pause for a reload"


class Reloads(Copying):
    """From a planned change to the next worker, whichever of the two may die."""

    def _on_change_planned(
        self, change: Change, result: Plan | KvserveError, beside_bytes: int | None
    ) -> None:
        self._planning = False
        state = self._state
        if isinstance(result, KvserveError):
            self._finish(change, result)
        elif isinstance(state, Serving):
            attempt = state.attempt
            if result.chosen.launch == attempt.plan.chosen.launch:
                self._update(replace(state, attempt=replace(attempt, plan=result)))
                self._finish(change, result)
                return
            following = Attempt(
                plan=result,
                reason=change.reason,
                extra_buffers=attempt.extra_buffers,
                fallback=attempt.plan,
                change=change,
                beside_bytes=beside_bytes,
            )
            if beside_bytes is None:
                self._reload_in_order(
                    Overlapping(state.worker, attempt, state.loaded, following, None, 0, 0)
                )
            else:
                self._overlap(state, following)
        elif isinstance(state, Failing):
            attempt = replace(state.attempt, plan=result, replan=False, change=change)
            self._move(Event.RETRY, Idle(attempt, start_at=self._clock()))
        else:
            self._finish(change, NotReady("the worker was lost meanwhile; try again"))

    def _overlap(self, state: Serving, following: Attempt) -> None:
        """Both workers fit: the next one loads while the present one answers."""
        now = self._clock()
        state.worker.send(ShareCores(shared=True))
        self._history.spawning()
        self._move(
            Event.OVERLAP,
            Overlapping(
                state.worker, state.attempt, state.loaded, following, None, since=now, heard_at=now
            ),
        )
        self._beside(self._start(following.plan))

    def _reload_in_order(self, state: Overlapping, why: str | None = None) -> None:
        """The present worker leaves first; `why` an overlapped start failed, where it was tried."""
        following = replace(state.following, beside_bytes=None, in_order_because=why)
        if why is not None:
            log.warning("the next worker has to wait for the present one's memory", reason=why)
            state.worker.send(ShareCores(shared=False))
        self._beside(self._spawn_ahead(following))
        self._begin_drain(state, following, waits_until=self._clock() + AHEAD_SECONDS)

    def _begin_drain(
        self,
        state: Overlapping,
        following: Attempt,
        *,
        waits_until: float = 0.0,
        successor: Successor | None = None,
    ) -> None:
        self._move(
            Event.RELOAD,
            Draining(
                state.worker,
                state.attempt,
                state.loaded,
                following,
                pause_at=self._clock() + self._policy.drain_timeout,
                waits_until=waits_until,
                successor=successor,
            ),
        )

    async def _spawn_ahead(self, following: Attempt) -> None:
        await self._spawner.spawn_ahead(following.plan.chosen.launch)
        self.post(SpawnedAhead())

    def _on_successor_heard(self, worker: Worker, message: FromWorker) -> None:
        now = self._clock()
        match message, self._state:
            case Hello(), Overlapping() as state:
                self._update(replace(state, heard_at=now))
            case Progress(), Overlapping() as state:
                self._update(replace(state, fraction=message.fraction, heard_at=now))
                self._news.tell(WeightsLoaded(message.fraction))
            case LoadFailed(), Overlapping() as state:
                self._update(replace(state, failed=message))
                worker.kill()
            case Loaded(), Overlapping() as state:
                self._update(self._passed_on(self._asked_to_copy(replace(state, answered=message))))
            case TakenAhead(), Overlapping():
                self._on_dealt_with()
            case _:
                log.debug("frame out of place", frame=type(message).__name__)

    def _overlapped_till(self, state: Overlapping, now: float) -> None:
        """Pause the present worker when the next one waits for nothing more."""
        successor, answered = state.successor, state.answered
        if successor is not None and answered is not None and now >= state.waits_until:
            self._begin_drain(state, state.following, successor=Successor(successor, answered))

    def _on_successor_lost(self, exit_: Exit) -> None:
        """The present worker still answers: the same reload goes on in the ordinary order."""
        self._observer.worker_died(f"overlapping: {exit_.cause}")
        match self._state:
            case Overlapping(failed=failed) as state:
                why = f"died while loading beside it: {exit_.cause}"
                self._reload_in_order(state, failed.message if failed else why)
            case Draining() as state:
                why = f"died before it took over: {exit_.cause}"
                following = replace(state.following, beside_bytes=None, in_order_because=why)
                self._update(replace(state, following=following, successor=None))
                state.worker.send(ShareCores(shared=False))
                self._beside(self._spawn_ahead(following))
            case _:
                pass

    def _on_predecessor_lost(self, state: Overlapping | Draining) -> None:
        """A worker that was to be replaced died: the next one goes on alone, or is spawned."""
        now = self._clock()
        successor = successor_of(state)
        was_told = state.following.copied is not None
        following = self._without_copies(state.following)
        if isinstance(state, Overlapping) and successor is None:
            self._move(Event.LOST, Idle(following, start_at=None))  # it is being spawned
            return
        if successor is None:
            self._move(Event.LOST, Idle(following, start_at=now))
            return
        self._move(Event.LOST, Idle(following, start_at=None))
        self._measured = None
        loading = Loading(successor, following, since=now, heard_at=now)
        answered: Loaded | None = None
        match state:
            case Overlapping(answered=answered):
                loading = replace(loading, fraction=state.fraction, failed=state.failed)
            case Draining(successor=Successor(loaded=answered)):
                pass
        self._move(Event.SPAWN, loading)
        if answered is None:
            return
        if was_told:  # it has no use for what it took ahead
            pair = following.plan.chosen.launch.pair
            successor.send(TakeIn((), pair.k, pair.v))
        self._on_loaded(loading, answered)

    def _drain(self, state: Draining, now: float) -> None:
        idle = not self._requests.running
        if state.kill_at is None and (idle or now >= max(state.pause_at, state.waits_until)):
            state.worker.send(Pause(export_bytes=self._export_limit(state)))
            self._update(replace(state, kill_at=self._patience(state, SLOWEST_EXPORT)))
        elif state.kill_at is not None and now >= state.kill_at:
            state.worker.kill(DID_NOT_PAUSE)
        else:
            if state.kill_at is None and now >= state.pause_at:
                # What it waits for may take seconds: others are answered meanwhile.
                self._dispatch(state)
            self._kill_if_hung(state.worker, now)

    def _on_paused(self, state: Draining, message: Paused) -> None:
        if self._requests.running:  # they stand still since the export began
            paused_at = self._clock() - message.export_seconds
            state = replace(state, following=replace(state.following, paused_at=paused_at))
        self._requests.worker_paused()
        carried = adopt(state.worker.pid, message, state.following.copied)
        state = replace(state, following=replace(state.following, copied=None))
        if state.successor is None:
            self._leave(state, carried)
        else:
            self._hand_over(state, state.successor, carried)

    def _hand_over(self, state: Draining, successor: Successor, carried: Carried) -> None:
        now = self._clock()
        state.worker.send(Shutdown())
        self._leaving[state.worker] = now + LEAVE_SECONDS
        attempt = replace(state.following, carried=carried)
        self._measured = None
        self._move(
            Event.HAND_OVER, Handover(successor.worker, attempt, successor.loaded, since=now)
        )
        pair = attempt.plan.chosen.launch.pair
        successor.worker.send(TakeIn(carried.paths, pair.k, pair.v))

    def _leave(self, state: Draining, carried: Carried) -> None:
        state.worker.send(Shutdown())
        kill_at = self._clock() + LEAVE_SECONDS
        following = replace(state.following, carried=carried)
        if carried.paths:
            pair = following.plan.chosen.launch.pair
            self._spawner.tell_ahead(Transcode(carried.paths, pair.k, pair.v))
        self._move(Event.DRAINED, Leaving(state.worker, following, kill_at=kill_at))
