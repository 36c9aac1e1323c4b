"""Requests on their way: the ticket a caller holds, and the bounded first-in first-out queue.

A request keeps the tokens that were generated for it, so that another worker can go on where a
paused or dead one stopped.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Self

from kvserve.core.plan import Task
from kvserve.dialects.form import Form
from kvserve.errors import KvserveError
from kvserve.ipc.messages import Generate, Grammar, Prompt, Sampling, TokenLogprobs


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """What a caller wants generated; the fields are those of `ipc.messages.Generate`.

    `min_ctx` is the least context in tokens that may serve it; `task` sets a floor for the KV
    types."""

    prompt: Prompt
    sampling: Sampling
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_ctx: int = 0
    task: Task | None = None
    cache_salt: str = ""
    n_logprobs: int | None = None
    grammar: Grammar | None = None
    echo: bool = False


@dataclass(frozen=True, slots=True)
class Served:
    """The worker took the request up: the prompt's length, and the plan that serves it. `warning`
    says what the request wanted of the plan and does not get; `form` how the answer writes
    reasoning and calls, where it is not plain text."""

    n_prompt_tokens: int
    n_ctx: int
    cache_type: str
    fingerprint: str
    warning: str | None = None
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class Echoed:
    """The prompt of a request with `echo`: the bytes of its tokens, and the likelihoods of all but
    the first where the request has `n_logprobs`."""

    pieces: tuple[bytes, ...]
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """New text, never cut inside a character or inside a stop string.

    `logprobs` are those of `tokens`, of all drawn since the last event: their text may still be
    held back, and `text` may be empty.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The answer is complete; `reason` is the OpenAI `finish_reason`."""

    reason: str
    n_prompt_tokens: int
    n_generated_tokens: int
    n_cached_tokens: int
    stop_text: str | None


TicketEvent = Served | Echoed | Text | Done


class Ticket:
    """The caller's hold on one request: iterate for its events, `cancel` to give it up.

    The events are one `Served`, one `Echoed` where the request has `echo`, any number of `Text`,
    one `Done`; iteration ends after `Done` and raises the request's KvserveError where it failed.
    Leaving `async with` cancels what still runs.
    """

    def __init__(self, request_id: int, cancel: Callable[[int], None]) -> None:
        self.id = request_id
        self._cancel = cancel
        self._events: asyncio.Queue[TicketEvent | KvserveError] = asyncio.Queue()
        self._over = False

    def put(self, event: TicketEvent | KvserveError) -> None:
        """For the supervisor: deliver one event."""
        self._events.put_nowait(event)

    def cancel(self) -> None:
        """Give the request up; its place and its KV cells become free. Safe to call twice."""
        if not self._over:
            self._over = True
            self._cancel(self.id)

    async def __aiter__(self) -> AsyncIterator[TicketEvent]:
        while not self._over:
            event = await self._events.get()
            if isinstance(event, KvserveError):
                self._over = True
                raise event
            if isinstance(event, Done):
                self._over = True
            yield event

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.cancel()


class Stage(Enum):
    """How far a worker is with a request: it has it, it has read it and lets it wait, or decodes
    it."""

    SENT = auto()
    WAITING = auto()
    DECODING = auto()


@dataclass(slots=True)
class Job:
    """The supervisor's record of one request. `tokens` are all ids generated so far; `needs_ctx`
    is the context that it cannot do without, as far as is known. One that is `settled` makes do
    with the context there is: no larger one can be had for the rest of its answer. `below_floor`
    says why it makes do with KV types that are too poor for its task. `token_at` is when its last
    token came, in the clock's seconds; `n_interrupted` how many tokens it had when a worker that
    had begun it was replaced; `stage` how far the present worker is with it."""

    id: int
    spec: GenerationSpec
    ticket: Ticket
    submitted_at: float
    deadline: float | None
    tokens: list[int] = field(default_factory=list)
    needs_ctx: int = 0
    n_crashes: int = 0
    n_before_crash: int = 0
    announced: bool = False
    n_prompt: int = 0
    settled: bool = False
    below_floor: str | None = None
    token_at: float | None = None
    n_interrupted: int | None = None
    echoed: bool = False
    stage: Stage = Stage.SENT

    def note_interruption(self) -> None:
        """The worker that had it is being replaced."""
        if self.announced:
            self.n_interrupted = len(self.tokens)

    def to_message(self, *, may_grow: bool = False) -> Generate:
        """The frame that starts, or goes on with, this request."""
        return Generate(
            id=self.id,
            prompt=self.spec.prompt,
            sampling=self.spec.sampling,
            max_tokens=self.spec.max_tokens,
            min_tokens=self.spec.min_tokens,
            stop=self.spec.stop,
            ignore_eos=self.spec.ignore_eos,
            resume=tuple(self.tokens),
            may_grow=may_grow and not self.settled,
            cache_salt=self.spec.cache_salt,
            n_logprobs=self.spec.n_logprobs,
            grammar=self.spec.grammar,
            echo=self.spec.echo and not self.echoed,
        )


class WaitingLine:
    """First in, first out, bounded. Requests that ran before come back to the front."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._jobs: deque[Job] = deque()

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs)

    def append(self, job: Job) -> None:
        """Put a new request at the end."""
        self._jobs.append(job)

    def put_back(self, jobs: list[Job]) -> None:
        """Return requests that a worker already had, oldest first, to the front; never refused."""
        self._jobs.extendleft(sorted(jobs, key=lambda job: job.id, reverse=True))

    def pop(self) -> Job:
        """The request whose turn it is."""
        return self._jobs.popleft()

    def remove(self, request_id: int) -> Job | None:
        """Take one request out of the line, wherever it stands."""
        for job in self._jobs:
            if job.id == request_id:
                self._jobs.remove(job)
                return job
        return None

    def drain(self) -> list[Job]:
        """Take all requests out."""
        jobs = list(self._jobs)
        self._jobs.clear()
        return jobs
