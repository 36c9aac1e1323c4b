"""When a reload follows from the requests alone: for more context, for a better type, or back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kvserve.core.growth import Adapt, GrowthPolicy, Reloads, grown, may_grow_now, roomier, shrunk
from kvserve.core.plan import Task
from kvserve.ipc.messages import Step
from kvserve.supervisor.admission import Job

ANSWER_TOKENS = 256
"""Room for an answer that a refusal adds to the context it recommends."""

Allows = Callable[[Task], bool]
"""Whether the plan in force is good enough for a task."""


@dataclass(frozen=True, slots=True)
class Move:
    """Reload for a context of `n_ctx`, and a pair that is good enough for `task`; for one of
    `roomier` tokens where that costs no more."""

    n_ctx: int
    reason: str
    task: Task | None = None
    roomier: int | None = None


@dataclass(frozen=True, slots=True)
class Hopeless:
    """No context that may be had can hold `job`: the longest has `n_ctx` tokens."""

    job: Job
    n_ctx: int
    remedy: str


class Adapting:
    """What the reloads so far and the parked requests ask for. Times are the clock's seconds."""

    def __init__(self, policy: GrowthPolicy, n_ctx: int, now: float) -> None:
        self._policy = policy
        self._facts = Reloads(
            asked_ctx=n_ctx, n_ctx=n_ctx, changed_at=now, went_down=False, needed_at=now
        )
        self._adapted = False

    @property
    def n_ctx(self) -> int:
        """The context in force."""
        return self._facts.n_ctx

    def asked(self, n_ctx: int) -> None:
        """The user asked for another context, and has it."""
        self._facts = replace(self._facts, asked_ctx=n_ctx, n_ctx=n_ctx)

    def loaded(self, n_ctx: int, now: float, *, adapted: bool) -> None:
        """A worker serves with `n_ctx`; `adapted` where the requests alone had asked for it."""
        went_down = n_ctx < self._facts.n_ctx
        self._facts = replace(self._facts, n_ctx=n_ctx, changed_at=now, went_down=went_down)
        self._adapted = adapted

    def note(self, step: Step, now: float) -> None:
        """Remember when a request last needed more than the context that was asked for."""
        longest = max(
            (end.n_prompt_tokens + end.n_generated_tokens for end in step.ends), default=0
        )
        if longest > self._facts.asked_ctx:
            self._facts = replace(self._facts, needed_at=now)

    def hopeless(self, parked: Iterable[Job]) -> list[Hopeless]:
        """The parked requests that no reload can help."""
        found = []
        for job in parked:
            if job.needs_ctx <= self._facts.n_ctx or self._target(job) is not None:
                continue
            if self._policy.adapt is not Adapt.OFF:
                found.append(Hopeless(job, self._policy.max_ctx, "use a shorter prompt"))
            else:
                remedy = f"shorten it, or `kvserve reload --ctx {job.needs_ctx + ANSWER_TOKENS}`"
                found.append(Hopeless(job, self._facts.n_ctx, remedy))
        return found

    def in_vain(self, parked: Iterable[Job], n_ctx: int | None) -> list[Job]:
        """The parked requests that wait for a context of `n_ctx` or more, which cannot be had."""
        return [
            job
            for job in parked
            if job.needs_ctx > self._facts.n_ctx
            and (n_ctx is None or (self._target(job) or n_ctx) >= n_ctx)
        ]

    def move(
        self,
        parked: Iterable[Job],
        allows: Allows,
        now: float,
        *,
        idle: bool,
        running: Iterable[Job] = (),
    ) -> Move | None:
        """The reload that is due: for the parked requests, else back after a time without need
        where the daemon is `idle`. `parked` holds no hopeless ones. A context for a parked request
        should have room for all of them beside the `running` ones."""
        waiting = list(parked)
        if not waiting:
            down = shrunk(now, self._facts, self._policy) if idle else None
            return None if down is None else Move(down, "shrink")
        targets = [target for job in waiting if (target := self._target(job)) is not None]
        if targets:
            due = may_grow_now(now, self._facts, self._policy)
            together = sum(job.needs_ctx for job in waiting) + sum(map(_comes_to, running))
            wider = roomier(max(targets), together, self._policy)
            return Move(max(targets), "grow", roomier=wider) if due else None
        tasks = [t for job in waiting if (t := job.spec.task) is not None and not allows(t)]
        # Not at once after the requests moved it, lest short and exact ones play with long ones.
        rested = now - self._facts.changed_at >= self._policy.min_interval
        if not tasks or not (rested or not self._adapted):
            return None
        n_ctx = max(self._facts.asked_ctx, *(job.needs_ctx for job in waiting))
        return Move(n_ctx, "task", tasks[0])

    def _target(self, job: Job) -> int | None:
        target = grown(job.needs_ctx, self._policy)
        return target if target is not None and target > self._facts.n_ctx else None


def _comes_to(job: Job) -> int:
    """The cells that a running request may come to need, as far as is known."""
    if not job.n_prompt:
        return 0
    n_more = ANSWER_TOKENS if job.spec.max_tokens is None else job.spec.max_tokens - len(job.tokens)
    return job.n_prompt + len(job.tokens) + max(0, n_more)
