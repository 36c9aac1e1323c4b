"""All requests between callers and worker: who waits, who runs, who is told what.

Every request ends in exactly one `Done` or one error on its ticket. What a dead or paused worker
had generated is kept, and the next worker goes on from there.
"""

from kvserve.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    KvserveError,
    Overloaded,
    WorkerFailed,
    revive,
)
from kvserve.ipc.messages import Cancel, End, Failed, NeedsContext, Started, Step
from kvserve.supervisor.admission import Done, Job, Served, Text, WaitingLine
from kvserve.supervisor.states import Worker

MAX_CRASHES = 2
"""A request that was running in this many dying workers is not given to another one."""


class Requests:
    """The waiting line and the running requests. Times are the clock's seconds."""

    def __init__(self, queue_limit: int) -> None:
        self.line = WaitingLine(queue_limit)
        self.running: dict[int, Job] = {}
        self.n_answered = 0
        self.n_failed = 0
        self.n_cells_used = 0

    def admit(self, job: Job) -> None:
        """Put a new request in line, or refuse it where the line is full."""
        if self.line.full:
            self._fail(
                job,
                Overloaded(
                    f"{self.line.limit} requests wait already; try again later", retry_after=2
                ),
            )
        else:
            self.line.append(job)

    def dispatch(self, worker: Worker, limit: int) -> None:
        """Hand waiting requests to the worker until it has `limit`."""
        while len(self.line) and len(self.running) < limit:
            job = self.line.pop()
            self.running[job.id] = job
            worker.send(job.to_message())

    def cancel(self, request_id: int, worker: Worker | None) -> None:
        """Forget a request that its caller gave up."""
        if self.line.remove(request_id) is not None:
            self.n_failed += 1
        elif self.running.pop(request_id, None) is not None:
            self.n_failed += 1
            if worker is not None:
                worker.send(Cancel(id=request_id))

    def expire(self, now: float, worker: Worker | None) -> None:
        """Fail the requests whose time is up."""
        everyone = [*self.line, *self.running.values()]
        for job in [j for j in everyone if j.deadline is not None and j.deadline <= now]:
            waited = now - job.submitted_at
            self.cancel(job.id, worker)
            job.ticket.put(DeadlineExceeded(f"the request took longer than {waited:.0f} s"))

    def started(self, message: Started, n_ctx: int, cache_type: str, fingerprint: str) -> None:
        """Tell the caller which plan serves it; once, however many workers follow."""
        job = self.running.get(message.id)
        if job is not None and not job.announced:
            job.announced = True
            job.ticket.put(
                Served(
                    n_prompt_tokens=message.n_prompt_tokens,
                    n_ctx=n_ctx,
                    cache_type=cache_type,
                    fingerprint=fingerprint,
                )
            )

    def step(self, message: Step) -> None:
        """Deliver one decode step."""
        self.n_cells_used = message.n_cells_used
        for delta in message.deltas:
            job = self.running.get(delta.id)
            if job is None:
                continue
            job.tokens.extend(delta.tokens)
            if delta.text:
                job.ticket.put(Text(text=delta.text, tokens=delta.tokens))
        for end in message.ends:
            self._complete(end)

    def refused(self, message: Failed) -> None:
        """The worker cannot answer this one."""
        job = self.running.pop(message.id, None)
        if job is not None:
            self._fail(job, revive(message.code, message.message, param=message.param))

    def too_long(self, message: NeedsContext, n_ctx: int, n_ctx_train: int) -> None:
        """A prompt that the context cannot hold."""
        job = self.running.pop(message.id, None)
        if job is None:
            return
        remedy = "use a shorter prompt"
        if message.n_tokens < n_ctx_train:
            remedy = f"shorten it, or `kvserve reload --ctx {message.n_tokens + 256}`"
        self._fail(
            job,
            ContextLengthExceeded(
                f"This model's maximum context length is {n_ctx} tokens, and the prompt has "
                f"{message.n_tokens}: {remedy}",
                param="messages",
            ),
        )

    def worker_paused(self) -> None:
        """Everything that ran goes back to the front of the line."""
        self.line.put_back(list(self.running.values()))
        self.running.clear()

    def worker_died(self, cause: str) -> None:
        """What ran goes back to the line, unless it may be what kills the workers."""
        survivors = []
        for job in self.running.values():
            job.n_crashes += 1
            if job.n_crashes >= MAX_CRASHES:
                self._fail(job, WorkerFailed(f"the worker died twice with this request: {cause}"))
            else:
                survivors.append(job)
        self.running.clear()
        self.line.put_back(survivors)

    def fail_all(self, error: KvserveError) -> None:
        """Nothing can be answered any more."""
        for job in [*self.line.drain(), *self.running.values()]:
            self._fail(job, error)
        self.running.clear()

    def _complete(self, end: End) -> None:
        job = self.running.pop(end.id, None)
        if job is None:
            return
        self.n_answered += 1
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
        self.n_failed += 1
        job.ticket.put(error)
