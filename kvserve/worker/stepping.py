"""One step after another: a batch is planned and decoded, tokens are drawn, answers go out.

Between two steps the device has nothing to do. So only what the next batch hangs on is done there:
the draws, and a plan where something changes. While all requests just go on, the batch is the last
one with the drawn tokens in it, and texts, messages and book-keeping follow while the device
computes.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvserve.ipc.messages import (
    Delta,
    Echo,
    End,
    Failed,
    NeedsContext,
    Started,
    Step,
    TokenLogprobs,
)
from kvserve.worker.batches import Batch as Plan
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.drawing import Drawn, Wish
from kvserve.worker.executor import Executor
from kvserve.worker.job import Job
from kvserve.worker.llama import CacheFull, Context, DecodeError
from kvserve.worker.outbox import Outbox
from kvserve.worker.pace import Pace
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.speculation.proposal import Ask
from kvserve.worker.speculation.speculator import Draft, Outcome, Speculator


@dataclass(frozen=True, slots=True)
class _Decoded:
    """A batch that was decoded, and what was drawn from it. `asked` are the requests that the
    speculator was asked about; decoding and drawing took `seconds`."""

    plan: Plan
    drawn: list[tuple[Wish, Drawn]]
    asked: set[int]
    seconds: float


class Stepper:
    """Decodes the requests of `scheduler` with `executor`, and sends what comes of them through
    `outbox`. `disturbed` tells of messages that wait: then a plan is made anew."""

    def __init__(
        self,
        context: Context,
        scheduler: Scheduler,
        cache: PrefixCache,
        cold: ColdTier,
        executor: Executor,
        outbox: Outbox,
        speculator: Speculator | None,
        disturbed: Callable[[], bool],
    ) -> None:
        self._context = context
        self._scheduler = scheduler
        self._cache = cache
        self._cold = cold
        self._executor = executor
        self._outbox = outbox
        self._speculator = speculator
        self._disturbed = disturbed
        self._may_draft = True
        self._pace = Pace(
            context.n_batch,
            on_gpu=context.asynchronous and context.model.wholly_on_gpu,
            tiles=context.tiles,
        )
        self._jobs: dict[int, Job] = {}
        self._drawn_at = 0.0
        self._foreseen: dict[int, Draft] = {}

    def __contains__(self, request: int) -> bool:
        return request in self._jobs

    def add(self, job: Job, salt: str) -> None:
        """Put a request at the end of the line."""
        generation, echo = job.generation, job.echo
        self._jobs[job.id] = job
        n_to_score = 0 if echo is None else echo.n_to_score
        self._scheduler.add(job.id, generation.buffer, generation.n_tokens, salt, n_to_score)

    def forget(self, request: int, *, broken: bool = False) -> None:
        """Drop a request, if there is one; its cells are kept, unless they are `broken`."""
        if self._jobs.pop(request, None) is not None:
            self._scheduler.remove(request, broken=broken)
            if self._speculator is not None:
                self._speculator.forget(request)

    def step(self) -> None:
        """Decode a batch, and more of them while nothing changes but the tokens."""
        scheduler = self._scheduler
        # What was drawn does not wait for copies, and for a plan that is new; nor now and then, or
        # the streams' gaps would be now longer and now shorter by what that takes.
        self._outbox.flush()
        self._cold.restore(scheduler, self._pace.seconds_beside(scheduler.n_decoding))
        asks = self._asks()
        drafts = self._propose(asks)
        n_prefill = self._pace.limit(
            scheduler.n_decoding,
            scheduler.n_unanswered,
            scheduler.n_unread,
            sum(map(len, drafts.values())),
        )
        plan = scheduler.plan(n_prefill, drafts, self._n_leaving())
        self._executor.change_memory(plan.operations)
        for request in plan.admitted:
            job = self._jobs[request]
            if not job.started:
                job.started = True
                self._outbox.send(Started(job.id, job.generation.n_prompt, job.form))
        begun = time.monotonic()
        try:
            self._executor.submit(plan, self._jobs)
        except (CacheFull, DecodeError) as error:
            self._recover(plan, error)
            return
        self._executor.wait()
        done: _Decoded | None = self._draw(plan, asks, begun)
        self._foreseen = {}
        while done is not None and self._goes_on(done):
            done = self._follow(done)
        if done is not None:
            self._finish(done)

    def _n_leaving(self) -> int:
        """Cells that may be stored in the next step."""
        scheduler = self._scheduler
        if self._cold.restoring and not scheduler.n_reading:
            return 0  # as many as could be were copied the other way
        n_waiting = max(scheduler.n_unanswered, 1)
        return self._cold.n_leaving(self._pace.seconds_beside(scheduler.n_decoding, n_waiting))

    def _draw(self, plan: Plan, asks: list[Ask], begun: float) -> _Decoded:
        decoded = time.monotonic()
        drawn = self._executor.draw(plan, self._jobs)
        last, self._drawn_at = self._drawn_at, time.monotonic()
        seconds = self._drawn_at - begun
        # What is drawn after a prompt (a first mask, scores) says nothing of its tokens.
        counted = decoded - begun if plan.n_prefill else seconds
        self._pace.observe(plan.n_prefill, plan.n_tokens, counted, self._drawn_at - last)
        if not plan.n_prefill:
            n_rows = plan.n_tokens + plan.n_pad
            self._scheduler.rows.observe(plan.n_tokens, n_rows, decoded - begun)
        return _Decoded(plan, drawn, {ask.id for ask in asks}, seconds)

    def _goes_on(self, done: _Decoded) -> bool:
        """Whether the next batch is the same with the tokens that were drawn: all that run go on,
        nobody else can, and nothing was drawn that makes a draft worth its place."""
        n_ctx, foreseen = self._context.n_ctx, self._foreseen
        if done.plan.n_prefill or done.plan.n_drafted or self._disturbed():
            return False
        if self._cold.restoring:
            return False
        if self._speculator is not None and not self._speculator.foresees:
            return False
        if not self._scheduler.may_repeat(len(done.plan.chunks), done.plan.n_pad):
            return False
        for wish, ((token, _),) in done.drawn:
            job = self._jobs[wish.id]
            if not job.goes_on or job.generation.n_tokens >= n_ctx:
                return False
            if foreseen.get(wish.id, ())[:1] == (token,):
                return False
        return True

    def _follow(self, done: _Decoded) -> _Decoded | None:
        """Decode the next tokens of the same requests. Where the device computes by itself, what
        came of the batch before is sent meanwhile."""
        begun = time.monotonic()
        ahead = self._context.asynchronous
        if not ahead:
            self._finish(done)
        error: Exception | None = None
        try:
            self._executor.submit_again()
        except (CacheFull, DecodeError) as failure:
            error = failure
        if ahead:
            self._finish(done)
        plan = done.plan.advanced()
        if error is not None:
            self._recover(plan, error)
            return None
        self._outbox.flush()
        asks = self._asks()
        self._foreseen = self._propose(asks)
        self._executor.wait()
        return self._draw(plan, asks, begun)

    def _finish(self, done: _Decoded) -> None:
        """Keep the books of a decoded batch, and send what came of it."""
        plan = done.plan
        self._scheduler.commit(plan)
        echoes, ends = self._take_echoes(plan)
        outcomes = self._settle(plan)
        if self._speculator is not None:
            decoded = {id_: one for id_, one in outcomes.items() if id_ in done.asked}
            self._speculator.observe(decoded, done.seconds, plan.n_prefill, plan.n_pad)
        self._deliver(plan, done.drawn, echoes, ends, outcomes)

    def _asks(self) -> list[Ask]:
        """The requests that generate, and how many tokens beside the next one each may get."""
        if self._speculator is None:
            return []
        n_ctx = self._context.n_ctx
        return [self._jobs[request].ask(n_ctx) for request in self._scheduler.decoding]

    def _propose(self, asks: list[Ask]) -> dict[int, Draft]:
        if self._speculator is None:
            return {}
        drafts = self._speculator.propose(asks)
        may_draft, self._may_draft = self._may_draft, True
        return drafts if may_draft else {}

    def _settle(self, plan: Plan) -> dict[int, Outcome]:
        """Keep the cells of accepted drafts, free the others; what came of each request that has
        drawn."""
        outcomes = {}
        for chunk in plan.chunks:
            job = self._jobs.get(chunk.id)
            if job is None:
                continue
            if chunk.draft:
                # Of what was drawn, all but the last token were drafted, and are in the cache.
                self._scheduler.settle(chunk, max(len(job.tokens) - 1, 0))
            if job.tokens:
                outcomes[chunk.id] = Outcome(tuple(job.tokens), len(chunk.draft))
        self._executor.change_memory(self._cache.take_operations())
        return outcomes

    def _deliver(
        self,
        plan: Plan,
        drawn: list[tuple[Wish, Drawn]],
        echoes: tuple[Echo, ...],
        ends: list[End],
        outcomes: dict[int, Outcome],
    ) -> None:
        deltas, logprobs = [], []
        outgrown: list[Job] = []
        refused: list[Job] = []
        for wish, draws in drawn:
            job = self._jobs[wish.id]
            job.read(self._context.vocab)
            n_tokens = len(job.tokens)
            if n_tokens:
                deltas.append(job.take_delta())
                logprobs += [one for _, one in draws[:n_tokens] if one is not None]
            if job.broken:
                refused.append(job)
            elif job.generation.finish is None:
                self._scheduler.grow(job.id, n_tokens)
                if job.generation.n_tokens >= self._context.n_ctx:
                    outgrown.append(job)
            else:
                ends.append(job.end(self._scheduler.n_cached(job.id)))
                self.forget(job.id)
        n_accepted = sum(len(one.drawn) - 1 for one in outcomes.values())
        self.send_step(
            tuple(deltas),
            tuple(ends),
            plan.n_prefill,
            tuple(logprobs),
            echoes,
            n_drafted=plan.n_drafted,
            n_accepted=n_accepted,
        )
        for job in refused:
            self._refuse(job)
        for job in outgrown:
            self._outbox.send(NeedsContext(job.id, job.generation.n_tokens))
            self.forget(job.id)

    def _take_echoes(self, plan: Plan) -> tuple[tuple[Echo, ...], list[End]]:
        """The prompts that are ready to be sent back, and the ends of requests that wanted no
        more than that."""
        echoes, ends = [], []
        for chunk in plan.chunks:
            job = self._jobs[chunk.id]
            if job.echo is None or not job.echo.complete or not (chunk.last or chunk.scored):
                continue
            echoes.append(job.echo.message())
            job.echo = None
            if job.generation.finish is not None:
                ends.append(job.end(self._scheduler.n_cached(job.id)))
                self.forget(job.id)
        return tuple(echoes), ends

    def _recover(self, plan: Plan, error: Exception) -> None:
        """Go on after a batch that could not be decoded."""
        if not isinstance(error, CacheFull):
            self._fail(plan, str(error))
        elif plan.n_drafted:
            self._may_draft = False
        elif self._scheduler.relieve():
            print("KV cache fuller than expected: made room", file=sys.stderr, flush=True)
        else:
            self._fail(plan, "the KV cache is full")

    def _fail(self, plan: Plan, reason: str) -> None:
        for chunk in plan.chunks:
            self.forget(chunk.id, broken=True)
            self._outbox.send(Failed(chunk.id, "internal_error", f"decoding failed: {reason}"))

    def _refuse(self, job: Job) -> None:
        assert job.constraint is not None
        self.forget(job.id)
        message = (
            "what the answer must look like became too complex to follow "
            f"({job.constraint.error}): simplify the schema, expression or grammar"
        )
        self._outbox.send(Failed(job.id, "invalid_request", message, job.constrained_by))

    def send_step(
        self,
        deltas: tuple[Delta, ...],
        ends: tuple[End, ...],
        n_prefilled: int = 0,
        logprobs: tuple[TokenLogprobs, ...] = (),
        echoes: tuple[Echo, ...] = (),
        *,
        n_drafted: int = 0,
        n_accepted: int = 0,
    ) -> None:
        """Send what came of a step."""
        self._outbox.send_step(
            Step(
                deltas,
                ends,
                n_prefilled,
                self._cache.n_pinned,
                self._cache.n_kept,
                logprobs,
                echoes,
                n_drafted,
                n_accepted,
            )
        )
