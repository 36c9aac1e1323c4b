"""All requests between callers and worker: who waits, who runs, who is told what.

Every request ends in exactly one `Done` or one error on its ticket. What a dead or paused worker
had generated is kept, and the next worker goes on from there.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from kvserve.core.plan import Task
from kvserve.errors import (
    BelowFloor,
    ContextLengthExceeded,
    DeadlineExceeded,
    KvserveError,
    Overloaded,
    WorkerFailed,
    revive,
)
from kvserve.ipc.messages import (
    Cancel,
    ChatPrompt,
    End,
    Failed,
    NeedsContext,
    Started,
    Step,
    Tokenized,
    TokenLogprobs,
)
from kvserve.supervisor.admission import Done, Echoed, Job, Served, Stage, Text, WaitingLine
from kvserve.supervisor.observing import Observer, Unobserved
from kvserve.supervisor.states import Worker
from kvserve.supervisor.suspects import blamed


@dataclass(frozen=True, slots=True)
class Terms:
    """What the worker offers: its context in tokens, whether an answer that fills it is parked for
    a larger one, and which tasks its KV types are good enough for."""

    n_ctx: int
    may_grow: bool
    allows: Callable[[Task], bool]


class Requests:
    """The waiting line, the running requests, and those parked for a larger context.

    Times are the clock's seconds.
    """

    def __init__(
        self,
        queue_limit: int,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._observer = observer or Unobserved()
        self._clock = clock
        self.line = WaitingLine(queue_limit)
        self.running: dict[int, Job] = {}
        self.parked: dict[int, Job] = {}
        self.n_answered = 0
        self.n_failed = 0
        self.n_cells_used = 0
        self._n_places = 0
        self.n_drafted = 0
        self.n_accepted = 0

    def admit(self, job: Job) -> None:
        """Put a new request in line, or refuse it where the line is full."""
        if len(self.line) + self._n_ahead >= self.line.limit:
            self._fail(
                job,
                Overloaded(
                    f"{self.line.limit} requests wait already; try again later", retry_after=2
                ),
            )
        else:
            self.line.append(job)

    @property
    def n_waiting(self) -> int:
        """Requests without a place in a worker's batch."""
        return len(self.line) + len(self.parked) + self._n_ahead

    @property
    def n_running(self) -> int:
        """Requests with a place in the worker's batch."""
        return len(self.running) - self._n_ahead

    @property
    def _n_ahead(self) -> int:
        """Requests that the worker has beside those with a place."""
        return max(0, len(self.running) - self._n_places)

    def dispatch(self, worker: Worker, n_places: int, terms: Terms) -> None:
        """Hand waiting requests to a worker of `n_places`, twice as many: the next prompts are
        tokenized before a place is free. Park what asks for more than its `terms`."""
        self._n_places = n_places
        while len(self.line) and len(self.running) < 2 * n_places:
            job = self.line.pop()
            job.needs_ctx = max(job.needs_ctx, job.spec.min_ctx)
            task = None if job.below_floor is not None else job.spec.task
            too_long = job.needs_ctx > terms.n_ctx and not job.settled
            if too_long or not (task is None or terms.allows(task)):
                self.parked[job.id] = job
                continue
            job.stage = Stage.SENT
            self.running[job.id] = job
            worker.send(job.to_message(may_grow=terms.may_grow))

    def cancel(self, request_id: int, worker: Worker | None) -> None:
        """Forget a request that its caller gave up."""
        self._forget(request_id, worker, "cancelled")

    def _forget(self, request_id: int, worker: Worker | None, outcome: str) -> None:
        job = self.line.remove(request_id) or self.parked.pop(request_id, None)
        if job is None:
            job = self.running.pop(request_id, None)
            if job is not None and worker is not None:
                worker.send(Cancel(id=request_id))
        if job is not None:
            self._note_failure(job, outcome)

    def expire(self, now: float, worker: Worker | None) -> None:
        """Fail the requests whose time is up."""
        everyone = [*self.line, *self.parked.values(), *self.running.values()]
        for job in [j for j in everyone if j.deadline is not None and j.deadline <= now]:
            waited = now - job.submitted_at
            self._forget(job.id, worker, DeadlineExceeded.code)
            job.ticket.put(DeadlineExceeded(f"the request took longer than {waited:.0f} s"))

    def tokenized(self, message: Tokenized) -> None:
        """The worker has read a request, and lets it wait."""
        job = self.running.get(message.id)
        if job is not None and job.stage is Stage.SENT:
            job.stage = Stage.WAITING

    def started(self, message: Started, n_ctx: int, cache_type: str, fingerprint: str) -> None:
        """Tell the caller which plan serves it; once, however many workers follow."""
        job = self.running.get(message.id)
        if job is None:
            return
        job.stage = Stage.DECODING
        if not job.announced:
            job.announced = True
            job.n_prompt = message.n_prompt_tokens
            job.ticket.put(
                Served(
                    n_prompt_tokens=message.n_prompt_tokens,
                    n_ctx=n_ctx,
                    cache_type=cache_type,
                    fingerprint=fingerprint,
                    warning=job.below_floor,
                    form=message.form,
                )
            )

    def step(self, message: Step) -> None:
        """Deliver one decode step."""
        self.n_cells_used = message.n_cells_used
        self._observer.step(message.n_prefilled, sum(len(d.tokens) for d in message.deltas))
        if message.n_drafted:
            self.n_drafted += message.n_drafted
            self.n_accepted += message.n_accepted
            self._observer.drafted(message.n_drafted, message.n_accepted)
        for echo in message.echoes:
            job = self.running.get(echo.id)
            if job is not None:
                job.echoed = True
                job.ticket.put(Echoed(echo.pieces, echo.logprobs))
        logprobs: dict[int, list[TokenLogprobs]] = {}
        for one in message.logprobs:
            logprobs.setdefault(one.id, []).append(one)
        for delta in message.deltas:
            job = self.running.get(delta.id)
            if job is None:
                continue
            self._note_tokens(job, len(delta.tokens))
            job.tokens.extend(delta.tokens)
            likelihoods = tuple(logprobs.get(delta.id, ()))
            if delta.text or likelihoods:
                job.ticket.put(Text(delta.text, delta.tokens, likelihoods))
        for end in message.ends:
            self._complete(end)

    def refused(self, message: Failed) -> None:
        """The worker cannot answer this one."""
        job = self.running.pop(message.id, None)
        if job is not None:
            self._fail(job, revive(message.code, message.message, param=message.param))

    def park(self, message: NeedsContext) -> Job | None:
        """Set a request aside that the present context cannot hold, until another one can."""
        job = self.running.pop(message.id, None)
        if job is not None:
            job.needs_ctx = message.n_tokens + 1
            self.parked[job.id] = job
        return job

    def unpark(self, n_ctx: int) -> None:
        """Put back in line what a context of `n_ctx` tokens can hold."""
        ready = [job for job in self.parked.values() if job.needs_ctx <= n_ctx]
        for job in ready:
            del self.parked[job.id]
        self.line.put_back(ready)

    def refuse(self, job: Job, n_ctx: int, remedy: str) -> None:
        """Fail a parked request: no context that may be had can hold it. An answer that began
        ends where the context does instead, with the reason `length`."""
        self.parked.pop(job.id, None)
        if job.tokens and not job.settled:
            job.settled = True
            self.line.put_back([job])
            return
        if job.tokens:  # not even its prompt fits any more: what there is, is the answer
            self._complete_parked(job)
            return
        self._fail(
            job,
            ContextLengthExceeded(
                f"This model's maximum context length is {n_ctx} tokens, and the request needs "
                f"{job.needs_ctx}: {remedy}",
                param="messages" if isinstance(job.spec.prompt, ChatPrompt) else "prompt",
            ),
        )

    def _complete_parked(self, job: Job) -> None:
        self.running[job.id] = job
        self._complete(End(job.id, "length", job.n_prompt, len(job.tokens), 0))

    def settle_tasks(self, why: str, terms: Terms, *, may_serve: bool) -> bool:
        """No better KV types than those of `terms` can be had: the requests that were parked for
        their task alone are served with a warning, or fail. Returns whether any is in line again.
        """
        waiting = [
            job
            for job in self.parked.values()
            if job.needs_ctx <= terms.n_ctx
            and job.spec.task is not None
            and not terms.allows(job.spec.task)
        ]
        for job in waiting:
            del self.parked[job.id]
            reason = f"no plan has KV types good enough for the task {job.spec.task}: {why}"
            if may_serve:
                job.below_floor = reason
                self.line.put_back([job])
            else:
                self._fail(job, BelowFloor(reason, param="kvserve.task"))
        return may_serve and bool(waiting)

    def worker_paused(self) -> None:
        """Everything that ran goes back to the front of the line."""
        for job in self.running.values():
            job.note_interruption()
        self.line.put_back(list(self.running.values()))
        self.running.clear()

    def worker_died(self, cause: str) -> None:
        """What it had goes back to the line, unless it may be what kills the workers."""
        jobs = list(self.running.values())
        for job in jobs:
            job.note_interruption()
        guilty = blamed(jobs)
        for job in guilty:
            n = job.n_crashes
            self._fail(job, WorkerFailed(f"{n} workers died with this request: {cause}"))
        self.running.clear()
        self.line.put_back([job for job in jobs if job not in guilty])

    def fail_waiting(self, error: KvserveError) -> None:
        """Nothing new can be taken up any more."""
        for job in [*self.line.drain(), *self.parked.values()]:
            self._fail(job, error)
        self.parked.clear()

    def fail_all(self, error: KvserveError) -> None:
        """Nothing can be answered any more."""
        self.fail_waiting(error)
        for job in self.running.values():
            self._fail(job, error)
        self.running.clear()

    def _complete(self, end: End) -> None:
        job = self.running.pop(end.id, None)
        if job is None:
            return
        self.n_answered += 1
        self._observer.answered(end.n_prompt_tokens, end.n_cached_tokens, _again(job, end))
        self._observer.ended(end.reason, self._clock() - job.submitted_at)
        job.ticket.put(
            Done(
                reason=end.reason,
                n_prompt_tokens=end.n_prompt_tokens,
                n_generated_tokens=end.n_generated_tokens,
                n_cached_tokens=end.n_cached_tokens,
                stop_text=end.stop_text,
            )
        )

    def _fail(self, job: Job, error: KvserveError) -> None:
        self._note_failure(job, error.code)
        job.ticket.put(error)

    def _note_failure(self, job: Job, outcome: str) -> None:
        self.n_failed += 1
        self._observer.ended(outcome, self._clock() - job.submitted_at)

    def _note_tokens(self, job: Job, n_tokens: int) -> None:
        if not n_tokens:
            return
        now = self._clock()
        if job.token_at is None:
            self._observer.first_token(now - job.submitted_at)
            n_tokens -= 1
        if n_tokens:
            self._observer.next_tokens(n_tokens, now - (job.token_at or now))
        job.token_at = now


def _again(job: Job, end: End) -> int:
    """Tokens of an interrupted request that its last worker computed again. What was carried over
    to it covers the prompt too, so a prompt that was there whole means that all of it was."""
    if job.n_interrupted is None or end.n_cached_tokens >= end.n_prompt_tokens:
        return 0
    return end.n_prompt_tokens + job.n_interrupted - end.n_cached_tokens
