"""Changes of context: asked for by somebody or by the requests, planned, and brought to an end."""

import asyncio
from functools import partial

import structlog

from kvserve.core.growth import Adapt, costs_no_more, grown
from kvserve.core.plan import Plan, Task
from kvserve.errors import DoesNotFit, KvserveError, NotReady, ReloadInProgress, WorkerFailed
from kvserve.supervisor.callers import Callers
from kvserve.supervisor.requests import Terms
from kvserve.supervisor.states import (
    Change,
    ChangePlanned,
    Draining,
    Failing,
    Handover,
    Leaving,
    Overlapping,
    Serving,
    Stopped,
    Stopping,
    Tick,
)
from kvserve.supervisor.status import ReloadOutcome

log = structlog.get_logger(__name__)


class Changes(Callers):
    """Plans changes, and tells whoever waits for one."""

    def _on_change_asked(self, n_ctx: int | None, answer: asyncio.Future[ReloadOutcome]) -> None:
        state = self._state
        if self._planning or isinstance(state, Overlapping | Draining | Handover | Leaving):
            error: KvserveError = ReloadInProgress(
                "a reload is under way; try again", retry_after=5
            )
        elif isinstance(state, Serving | Failing):
            self._planning = True
            change = Change(answer, self._wall_clock(), previous=state.attempt.plan)
            self._beside(self._plan_change(n_ctx, change))
            return
        elif isinstance(state, Stopping | Stopped):
            error = NotReady("the server is shutting down")
        else:
            error = NotReady("the model is loading; try again", retry_after=5)
        answer.set_exception(error)

    async def _plan_change(
        self,
        n_ctx: int | None,
        change: Change,
        task: Task | None = None,
        roomier: int | None = None,
    ) -> None:
        beside_bytes = None
        try:
            plan = await self._planner.plan(
                n_ctx, task=task, returning_bytes=self._returning_bytes()
            )
            if roomier is not None:
                plan = await self._roomier(plan, roomier)
            result: Plan | KvserveError = plan
            beside_bytes = await self._planner.room_beside(plan)
        except KvserveError as error:
            result = error
        except Exception as error:
            log.exception("planning failed")
            result = WorkerFailed(f"planning failed: {error!r}")
        self.post(ChangePlanned(change, result, beside_bytes))

    async def _roomier(self, plan: Plan, n_ctx: int) -> Plan:
        """A plan for more context, where that costs no more than `plan`."""
        try:
            wider = await self._planner.plan(n_ctx, returning_bytes=self._returning_bytes())
        except DoesNotFit:
            return plan
        return wider if costs_no_more(plan.chosen.launch, wider.chosen.launch) else plan

    def _finish(self, change: Change, result: Plan | KvserveError) -> None:
        """A change came to its end: tell whoever asked for it, or the requests that needed it."""
        if isinstance(result, Plan) and change.reason == "context":
            self._adapting.asked(result.chosen.launch.n_ctx)
        if isinstance(result, NotReady) and change.reason != "context":
            return  # the parked requests are looked at again when a worker serves
        if isinstance(result, KvserveError) and change.reason == "grow":
            for job in self._adapting.in_vain(list(self._requests.parked.values()), change.n_ctx):
                self._requests.refuse(job, self._adapting.n_ctx, result.message)
        if change.reason == "task":
            if isinstance(result, KvserveError):
                self._settle_tasks(result.message, change.previous)
            elif result.chosen.launch == change.previous.chosen.launch:
                self._settle_tasks(f"{result.chosen.launch.pair} stays the best", result)
        if change.answer is None or change.answer.done():  # nobody asked, or they hung up
            return
        if isinstance(result, KvserveError):
            change.answer.set_exception(result)
            return
        changed = result.chosen.launch != change.previous.chosen.launch
        seconds = self._wall_clock() - change.started_at
        change.answer.set_result(ReloadOutcome(result, changed=changed, seconds=seconds))

    def _terms(self, plan: Plan, n_ctx: int) -> Terms:
        return Terms(
            n_ctx=n_ctx,
            may_grow=grown(n_ctx + 1, self._policy.growth) is not None,
            allows=partial(self._planner.allows, plan),
        )

    def _dispatch(self, state: Serving | Overlapping | Draining) -> None:
        """Hand the next requests to the worker."""
        plan = state.attempt.plan
        terms = self._terms(plan, state.loaded.n_ctx)
        self._requests.dispatch(state.worker, plan.chosen.launch.n_parallel, terms)

    def _settle_tasks(self, why: str, plan: Plan) -> None:
        terms = self._terms(plan, self._adapting.n_ctx)
        may_serve = self._policy.serves_below_floor
        if self._requests.settle_tasks(why, terms, may_serve=may_serve):
            self.post(Tick())  # they are in line again

    def _adapt(self, state: Serving, now: float) -> None:
        """Move the context or the KV type unasked, as the requests need it."""
        if self._planning:
            return
        requests, adapting = self._requests, self._adapting
        for lost in adapting.hopeless(list(requests.parked.values())):
            requests.refuse(lost.job, lost.n_ctx, lost.remedy)
        if self._policy.growth.adapt is Adapt.OFF:
            self._settle_tasks("nothing is changed unasked (adapt is off)", state.attempt.plan)
        idle = not requests.running and not len(requests.line)
        allows = partial(self._planner.allows, state.attempt.plan)
        move = adapting.move(
            requests.parked.values(), allows, now, idle=idle, running=requests.running.values()
        )
        if move is None:
            return
        log.info("context moves", reason=move.reason, task=move.task, to_n_ctx=move.n_ctx)
        self._planning = True
        change = Change(None, self._wall_clock(), state.attempt.plan, move.reason, move.n_ctx)
        self._beside(self._plan_change(move.n_ctx, change, move.task, move.roomier))
