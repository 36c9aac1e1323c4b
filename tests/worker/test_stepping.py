"""What comes of requests hangs neither on whether steps are repeated without a plan, nor on whether
answers are made while the device computes the next step."""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import SimpleNamespace

import pytest

from kvserve.ipc.messages import (
    Cancel,
    Failed,
    FromWorker,
    Generate,
    Grammar,
    NeedsContext,
    Sampling,
    ShareCores,
    Step,
    TextPrompt,
    Tokenized,
)
from kvserve.worker.batches import Batch as Plan
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.drawing import Drawn, Wish
from kvserve.worker.engine import Engine
from kvserve.worker.executor import Executor
from kvserve.worker.job import Job
from kvserve.worker.llama import Batch, Context
from kvserve.worker.pace import Pace
from kvserve.worker.scheduler import Scheduler
from kvserve.worker.speculation.lookup import LookupProposer
from kvserve.worker.speculation.proposal import Ask
from kvserve.worker.speculation.speculator import Speculator
from kvserve.worker.step_rows import StepRows
from kvserve.worker.stepping import Stepper
from kvserve.worker.templates import choose
from tests.models import write_model
from tests.worker.carry.conftest import Backend

Outcome = dict[int, tuple[str, tuple[int, ...], str]]


class AllOver(BaseException):
    """Ends the engine, which never returns."""


@dataclass
class Collector:
    """The daemon's end: what came for each request, until `n_wanted` are over."""

    inbox: "queue.SimpleQueue[object]"
    n_wanted: int
    cancels: dict[int, int] = field(default_factory=dict)
    texts: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    ends: dict[int, str] = field(default_factory=dict)
    n_steps: int = 0

    def send(self, message: FromWorker) -> None:
        match message:
            case Step():
                self.n_steps += 1
                for delta in message.deltas:
                    assert self.ends.get(delta.id, "cancelled") == "cancelled", (
                        "a token after the end"
                    )
                    self.texts[delta.id] = self.texts.get(delta.id, "") + delta.text
                    self.tokens.setdefault(delta.id, []).extend(delta.tokens)
                    if len(self.tokens[delta.id]) == self.cancels.get(delta.id):
                        self.inbox.put(Cancel(delta.id))
                        self.ends[delta.id] = "cancelled"
                for end in message.ends:
                    self.ends[end.id] = f"{end.reason} {end.n_generated_tokens} {end.stop_text}"
            case Failed(id=request) | NeedsContext(id=request):
                self.ends[request] = repr(message)
            case Tokenized():
                pass
        if len(self.ends) == self.n_wanted:
            raise AllOver

    @property
    def outcome(self) -> Outcome:
        return {
            request: (self.texts.get(request, ""), tuple(self.tokens.get(request, ())), how)
            for request, how in self.ends.items()
            if how != "cancelled"
        }


def asked(**fields: object) -> Callable[[int], Generate]:
    sampling = Sampling(seed=7, **fields.pop("sampling", {"temperature": 1.2, "top_k": 60}))
    prompt = fields.pop("prompt", "hello world")
    return lambda request: Generate(request, TextPrompt(prompt), sampling, **fields)


REQUESTS = (
    asked(max_tokens=40, ignore_eos=True),
    asked(max_tokens=1),
    asked(max_tokens=33, stop=("e", "the answer")),
    asked(max_tokens=30, sampling={"temperature": 0.0}),
    asked(max_tokens=37, sampling={"presence_penalty": 0.5, "repeat_penalty": 1.3}),
    asked(max_tokens=20, n_logprobs=2),
    asked(max_tokens=25, sampling={"top_p": 0.7, "top_k": 0}),
    asked(max_tokens=60, min_tokens=20, stop=("a",)),
    asked(max_tokens=40, grammar=Grammar("regex", "[a-c]{9}x*")),
    asked(max_tokens=22, prompt="the question and the answer and the question and the"),
    asked(max_tokens=400, prompt="world " * 30, may_grow=True, ignore_eos=True),
)


def run(context: Context, *, speculates: bool, cancels: dict[int, int]) -> Collector:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    collector = Collector(inbox, len(REQUESTS), cancels)
    template = choose("llama", None, context.vocab.has)
    speculator = Speculator(LookupProposer(), 4, 8) if speculates else None
    renderer = ChatRenderer(template, bos_text="", eos_text="")
    engine = Engine(
        context, collector, renderer, inbox, 4, speculator=speculator, n_draft=8 * speculates
    )
    for request, ask in enumerate(REQUESTS):
        inbox.put(ask(request))
    with pytest.raises(AllOver):
        engine.run()
    for slot in range(4 + context.reuse_rules.n_spare):
        context.clear_slot(slot)
    return collector


@pytest.fixture(scope="module")
def context(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Rounded as little as in `test_seeds`: no draw hangs on the company of its row."""
    path = tmp_path_factory.mktemp("model") / "f32.gguf"
    write_model(path, "llama", weight_type="F32")
    return backend.context(path, "f32", n_ctx=256, flash_attn=False, n_draft=8)


# llguidance's own call into llama_cpp.
@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_repeated_steps_answer_as_planned_ones_do(
    context: Context, monkeypatch: pytest.MonkeyPatch, asynchronous: bool, speculates: bool
) -> None:
    cancels = {0: 11}
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "may_repeat", lambda self, n, n_pad: False)
        planned = run(context, speculates=False, cancels=cancels)
    monkeypatch.setattr(type(context), "asynchronous", asynchronous)
    repeats = []
    may_repeat = Scheduler.may_repeat

    def counted(self: Scheduler, n: int, n_pad: int) -> bool:
        repeats.append(may_repeat(self, n, n_pad))
        return repeats[-1]

    monkeypatch.setattr(Scheduler, "may_repeat", counted)
    repeated = run(context, speculates=speculates, cancels=cancels)
    assert sum(repeats) > 20
    assert repeated.outcome == planned.outcome
    assert 11 <= len(repeated.tokens[0]) <= 13, "a cancelled request ends within a step or two"


@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
@pytest.mark.parametrize("n_outputs", [12, 4])
@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_rows_that_only_make_steps_quicker_leave_no_trace(
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
    speculates: bool,
    n_outputs: int,
    learned: bool,
) -> None:
    """Whether logits are computed for them or, where no more are allowed, not."""
    monkeypatch.setattr(context.model, "wholly_on_gpu", True)
    plain = run(context, speculates=speculates, cancels={})
    monkeypatch.setattr(context, "n_outputs", n_outputs)
    if learned:
        monkeypatch.setattr(context.model, "wholly_on_gpu", False)
        monkeypatch.setattr(Pace, "limit", lambda *_: 5)
        # One after another of all that may be tried, whatever they take here.
        n_seen: list[int] = []
        monkeypatch.setattr(StepRows, "observe", lambda self, n, *_: n_seen.append(n))
        monkeypatch.setattr(StepRows, "wanted", lambda self, n: n + len(n_seen) % 4)
    else:
        monkeypatch.setattr(context, "slower_rows", {2: 3, 3: 5, 4: 7})
    n_pads, n_more = [], []
    pad, want_more = Batch.pad, Batch.want_more

    def more(self: Batch, n: int) -> None:
        assert len(self.outputs) + n <= n_outputs
        want_more(self, n)
        n_more.append(n)

    monkeypatch.setattr(Batch, "want_more", more)

    def counted(self: Batch, n: int, *, wanted: bool) -> None:
        # More logits than the context was made for end the process.
        assert wanted == (len(self.outputs) + n <= n_outputs)
        pad(self, n, wanted=wanted)
        n_pads.append(n)

    monkeypatch.setattr(Batch, "pad", counted)
    padded = run(context, speculates=speculates, cancels={})
    assert {1, 2, 3} <= set(n_pads)
    assert bool(n_more) == learned
    assert padded.outcome == plain.outcome


@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
def test_a_draft_of_nothing_is_none(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = run(context, speculates=False, cancels={})
    monkeypatch.setattr(Speculator, "propose", lambda self, asks: {ask.id: () for ask in asks})
    assert run(context, speculates=True, cancels={}).outcome == planned.outcome


@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wholly_on_gpu", [False, True])
def test_the_pace_knows_what_computes_and_what_waits(
    context: Context, monkeypatch: pytest.MonkeyPatch, wholly_on_gpu: bool
) -> None:
    asked, told, observed, gaps = [], [], [], []

    class Recording(Pace):
        def observe(
            self, n_prefilled: int, n_tokens: int, seconds: float, gap: float | None = None
        ) -> None:
            observed.append((n_prefilled > 0, seconds))
            gaps.append((time.monotonic(), gap, seconds))
            super().observe(n_prefilled, n_tokens, seconds, gap)

        def limit(self, *counts: int) -> int:
            asked.append(counts)
            return super().limit(*counts)

    def recording(n_batch: int, *, on_gpu: bool, tiles: bool) -> Pace:
        told.append((n_batch, on_gpu, tiles))
        return Recording(n_batch, on_gpu=on_gpu, tiles=tiles)

    draw, restore, allowed = Executor.draw, ColdTier.restore, []

    def restoring(self: ColdTier, scheduler: Scheduler, seconds: float) -> None:
        allowed.append((scheduler.n_decoding, seconds))
        restore(self, scheduler, seconds)

    monkeypatch.setattr(ColdTier, "restore", restoring)
    leaving, stored, plan = [], [], Scheduler.plan

    def n_leaving(self: ColdTier, seconds: float) -> int:
        leaving.append(seconds)
        return len(leaving)

    def planning(self: Scheduler, n_prefill: int, drafts: object, n_stored: int = -1) -> Plan:
        stored.append(n_stored)
        return plan(self, n_prefill, drafts, n_stored)

    monkeypatch.setattr(ColdTier, "n_leaving", n_leaving)
    monkeypatch.setattr(Scheduler, "plan", planning)

    def slow(self: Executor, plan: Plan, jobs: dict[int, Job]) -> list[tuple[Wish, Drawn]]:
        time.sleep(0.02)
        return draw(self, plan, jobs)

    monkeypatch.setattr(Executor, "draw", slow)
    monkeypatch.setattr("kvserve.worker.stepping.Pace", recording)
    monkeypatch.setattr(type(context), "asynchronous", True)
    monkeypatch.setattr(context.model, "wholly_on_gpu", wholly_on_gpu)
    run(context, speculates=False, cancels={})
    assert told == [(context.n_batch, wholly_on_gpu, False)], "without flash attention no tiles"
    assert len(asked) > 20
    assert all(bool(n_unread) == bool(n_waiting) for _, n_waiting, n_unread, _ in asked)
    # What is drawn is a part of the streams' steps, not of what prompt tokens take.
    assert median(seconds for reads, seconds in observed if reads) < 0.02
    assert min(seconds for reads, seconds in observed if not reads) >= 0.02
    assert min(seconds for n_decoding, seconds in allowed if n_decoding) >= 0.8 * 0.02
    assert stored == list(range(1, len(leaving) + 1))
    assert min(leaving) >= 0.8 * 0.02
    assert all(gap >= seconds for _, gap, seconds in gaps)
    assert sum(gap for _, gap, _ in gaps[1:]) == pytest.approx(gaps[-1][0] - gaps[0][0], rel=0.05)


@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
def test_prompts_are_bounded_with_the_drafts_beside_them(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, plan, counted, batches = Pace.limit, Scheduler.plan, [], []

    def propose(self: Speculator, asks: list[Ask]) -> dict[int, tuple[int, ...]]:
        return {ask.id: (5, 6)[: ask.n_most] for ask in asks if ask.n_most > 0}

    monkeypatch.setattr(Speculator, "propose", propose)

    def limiting(self: Pace, n_decoding: int, *others: int) -> int:
        counted.append(others[2])
        return limit(self, n_decoding, *others)

    def planning(self: Scheduler, *asked: object) -> Plan:
        batches.append(plan(self, *asked))
        return batches[-1]

    monkeypatch.setattr(Pace, "limit", limiting)
    monkeypatch.setattr(Scheduler, "plan", planning)
    run(context, speculates=True, cancels={})
    assert len(counted) == len(batches)
    assert all(n >= batch.n_drafted for n, batch in zip(counted, batches, strict=True))
    assert any(batch.n_drafted and batch.n_prefill for batch in batches)


@pytest.mark.parametrize(
    ("restoring", "n_reading", "n_unanswered", "expected"),
    [(False, 0, 0, 41), (False, 1, 3, 43), (True, 1, 1, 41), (True, 0, 1, 0)],
)
def test_as_much_leaves_as_those_that_wait_may_take(
    restoring: bool, n_reading: int, n_unanswered: int, expected: int
) -> None:
    stepper = object.__new__(Stepper)
    stepper._scheduler = SimpleNamespace(
        n_decoding=4, n_reading=n_reading, n_unanswered=n_unanswered
    )
    stepper._pace = SimpleNamespace(seconds_beside=lambda n, n_waiting: 10 * n + n_waiting)
    stepper._cold = SimpleNamespace(restoring=restoring, n_leaving=lambda seconds: seconds)
    assert stepper._n_leaving() == expected


@pytest.mark.filterwarnings("ignore:llama_token_get_attr is deprecated:DeprecationWarning")
def test_while_a_conversation_comes_back_every_step_is_planned(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For its parts come in before the plan."""
    followed = []
    follow = Stepper._follow

    def counted(self: Stepper, *arguments: object) -> object:
        followed.append(1)
        return follow(self, *arguments)

    monkeypatch.setattr(Stepper, "_follow", counted)
    plain = run(context, speculates=False, cancels={})
    assert followed
    followed.clear()
    monkeypatch.setattr(ColdTier, "restoring", True)
    assert run(context, speculates=False, cancels={}).outcome == plain.outcome
    assert not followed


class Waits:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("brief")

    def end(self) -> None:
        self.calls.append("long")


@pytest.mark.parametrize(
    ("told", "calls"),
    [((), ["long"]), ((True,), ["brief"]), ((True, False), ["brief", "long"])],
)
def test_waits_are_brief_until_the_first_request_and_beside_another_worker(
    context: Context, told: tuple[bool, ...], calls: list[str]
) -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    renderer = ChatRenderer(choose("llama", None, context.vocab.has), bos_text="", eos_text="")
    waits = Waits()
    engine = Engine(context, Collector(inbox, 1, {}), renderer, inbox, 4, waits=waits)
    for shared in told:
        inbox.put(ShareCores(shared=shared))
    inbox.put(asked(max_tokens=8)(0))
    with pytest.raises(AllOver):
        engine.run()
    assert waits.calls == calls
    engine._handle(ShareCores(shared=True))
    engine._begin_work()
    assert waits.calls == [*calls, "brief"]
    for slot in range(4 + context.reuse_rules.n_spare):
        context.clear_slot(slot)
