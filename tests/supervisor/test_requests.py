"""What of a step reaches the caller, and what a worker is asked for."""

import asyncio
from dataclasses import dataclass, field

from kvserve.ipc.messages import (
    Delta,
    Echo,
    End,
    Generate,
    Grammar,
    Likelihood,
    Sampling,
    Started,
    Step,
    TextPrompt,
    Tokenized,
    TokenLogprobs,
)
from kvserve.supervisor.admission import Done, Echoed, GenerationSpec, Job, Text, Ticket
from kvserve.supervisor.requests import Requests, Terms

TERMS = Terms(n_ctx=512, may_grow=False, allows=lambda _task: True)


@dataclass
class Worker:
    sent: list[Generate] = field(default_factory=list)

    def send(self, message: Generate) -> None:
        self.sent.append(message)


def token(request: int, piece: bytes) -> TokenLogprobs:
    return TokenLogprobs(request, Likelihood(5, piece, -1.0), ())


def start(requests: Requests, worker: Worker, request: int = 1, **fields: object) -> Ticket:
    spec = GenerationSpec(prompt=TextPrompt("hi"), sampling=Sampling(), **fields)
    ticket = Ticket(request, lambda _: None)
    requests.admit(Job(request, spec, ticket, 0.0, None))
    requests.dispatch(worker, 4, TERMS)
    return ticket


async def events(ticket: Ticket) -> list[object]:
    return [event async for event in ticket]


def test_the_worker_is_asked_for_all_that_the_caller_wants() -> None:
    worker, requests = Worker(), Requests(8)
    wishes = {
        "cache_salt": "s",
        "n_logprobs": 2,
        "grammar": Grammar("regex", "a"),
        "echo": True,
    }
    start(requests, worker, **wishes)
    assert {name: getattr(worker.sent[0], name) for name in wishes} == wishes


def test_each_caller_gets_its_own_likelihoods_in_order() -> None:
    requests = Requests(8)
    tickets = [start(requests, Worker(), n, n_logprobs=0) for n in (1, 2)]
    logprobs = (token(2, b"b"), token(1, b"a"), token(2, b"c"))
    requests.step(
        Step(
            deltas=(Delta(1, "", (5,)), Delta(2, "bc", (5, 5))),
            ends=(End(1, "stop", 1, 1), End(2, "stop", 1, 2)),
            logprobs=logprobs,
        )
    )
    first, second = (asyncio.run(events(ticket)) for ticket in tickets)
    assert first[0] == Text("", (5,), (logprobs[1],))
    assert second[0] == Text("bc", (5, 5), (logprobs[0], logprobs[2]))


def test_tokens_without_text_or_likelihoods_are_no_event() -> None:
    requests = Requests(8)
    ticket = start(requests, Worker())
    requests.step(Step(deltas=(Delta(1, "", (5,)),), ends=(End(1, "stop", 1, 1),)))
    (done,) = asyncio.run(events(ticket))
    assert isinstance(done, Done)


def test_an_echo_comes_first_and_only_once() -> None:
    """The next worker is not asked for what was delivered already."""
    worker, requests = Worker(), Requests(8)
    ticket = start(requests, worker, echo=True)
    requests.step(Step(deltas=(Delta(1, "x", (5,)),), echoes=(Echo(1, (b"h", b"i")),)))
    requests.worker_paused()
    requests.dispatch(worker, 4, TERMS)
    assert [message.echo for message in worker.sent] == [True, False]
    requests.step(Step(ends=(End(1, "stop", 2, 1),)))
    told = asyncio.run(events(ticket))
    assert told[:2] == [Echoed((b"h", b"i"), ()), Text("x", (5,))]


def test_an_echo_that_never_came_is_asked_for_again() -> None:
    worker, requests = Worker(), Requests(8)
    start(requests, worker, echo=True)
    requests.worker_paused()
    requests.dispatch(worker, 4, TERMS)
    assert [message.echo for message in worker.sent] == [True, True]


def crash(requests: Requests, worker: Worker, *stages: str) -> list[bool]:
    """A worker dies with requests at these stages, twice; which of them fail."""
    tickets = [start(requests, worker, n) for n in range(1, len(stages) + 1)]
    for _ in range(2):
        requests.dispatch(worker, len(stages), TERMS)
        for request, stage in enumerate(stages, 1):
            if stage != "sent":
                requests.tokenized(Tokenized(request))
            if stage == "decoded":
                requests.started(Started(request, 3), 512, "f16", "mark")
        requests.worker_died("SIGSEGV")
    waiting = {job.id for job in requests.line}
    return [ticket.id not in waiting for ticket in tickets]


def test_requests_that_only_waited_in_dying_workers_are_not_blamed() -> None:
    def stages(*names: str) -> list[bool]:
        return crash(Requests(8), Worker(), *names)

    assert stages("decoded", "decoded", "waits") == [True, True, False]
    # One is read at a time; what is behind it is not.
    assert stages("decoded", "waits", "sent", "sent") == [True, False, True, False]
    assert stages("waits", "waits") == [False, False]
