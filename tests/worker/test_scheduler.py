"""The scheduler against a model that only counts cells."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker.pace import Pace
from kvserve.worker.scheduler import Batch, Scheduler


@dataclass(frozen=True)
class Ask:
    arrives: int
    n_prompt: int
    n_answer: int
    cancelled_after: int | None = None


@dataclass
class FakeModel:
    """Keeps the cells of each slot and checks every batch against them.

    `n_really` may be less than the scheduler believes: then decodes fail as llama.cpp's do.
    """

    scheduler: Scheduler
    n_really: int
    cells: dict[int, int] = field(default_factory=dict)
    owner: dict[int, int] = field(default_factory=dict)

    def decode(self, batch: Batch) -> bool:
        wanted = sum(self.cells.values()) + batch.n_tokens
        if wanted > self.n_really:
            return False
        for chunk in batch.chunks:
            assert chunk.start == self.cells.get(chunk.slot, 0)
            assert self.owner.setdefault(chunk.slot, chunk.id) == chunk.id
            assert 0 <= chunk.slot < self.scheduler.n_slots
            self.cells[chunk.slot] = chunk.start + chunk.count
        assert sum(self.cells.values()) <= self.scheduler.n_cells
        return True

    def clear(self, slot: int) -> None:
        self.cells.pop(slot, None)
        self.owner.pop(slot, None)


@dataclass
class Run:
    ended: Counter[int] = field(default_factory=Counter)
    admitted: list[int] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    n_preempted: int = 0
    n_steps: int = 0


def simulate(scheduler: Scheduler, asks: list[Ask], prefill: int, n_really: int) -> Run:
    run, model = Run(), FakeModel(scheduler, n_really)
    known = {n: ask.n_prompt for n, ask in enumerate(asks)}
    pending = sorted(range(len(asks)), key=lambda n: asks[n].arrives)
    live: list[int] = []
    while pending or live:
        run.n_steps += 1
        assert run.n_steps < 20_000, "livelock"
        while pending and (asks[pending[0]].arrives <= run.n_steps or not live):
            live.append(pending.pop(0))
            scheduler.add(live[-1], known[live[-1]])
        for n in [n for n in live if asks[n].cancelled_after == run.n_steps]:
            _drop(scheduler, model, live, n)
            run.cancelled.add(n)
        if not live:
            continue
        _step(scheduler, model, asks, known, live, run, prefill)
    return run


def _step(scheduler, model, asks, known, live, run, prefill) -> None:
    decoding_before = scheduler.n_decoding
    batch = scheduler.plan(prefill)
    for preempted in batch.preempted:
        model.clear(preempted.slot)
    run.n_preempted += len(batch.preempted)
    run.admitted += [n for n in batch.admitted if n not in run.admitted]
    assert batch.chunks
    assert 0 < batch.n_tokens <= scheduler.n_batch
    assert batch.n_prefill <= max(prefill, 1)
    assert live[0] in {chunk.id for chunk in batch.chunks}
    assert batch.n_tokens - batch.n_prefill >= decoding_before - len(batch.preempted)
    assert len({chunk.slot for chunk in batch.chunks}) == len(batch.chunks)
    assert sum(chunk.last for chunk in batch.chunks) <= scheduler.n_slots
    if not model.decode(batch):
        preempted = scheduler.preempt_youngest()
        if preempted is None:
            run.failed.add(live[0])
            _drop(scheduler, model, live, live[0])
        else:
            model.clear(preempted.slot)
            run.n_preempted += 1
        return
    scheduler.commit(batch)
    assert scheduler.n_cells_used == sum(model.cells.values())
    for chunk in batch.chunks:
        n = chunk.id
        assert chunk.last == (chunk.start + chunk.count == known[n])
        if not chunk.last:
            continue
        if known[n] - asks[n].n_prompt + 1 >= asks[n].n_answer:
            run.ended[n] += 1
            _drop(scheduler, model, live, n)
        else:
            known[n] += 1
            scheduler.grow(n)


def _drop(scheduler: Scheduler, model: FakeModel, live: list[int], n: int) -> None:
    live.remove(n)
    slot = scheduler.remove(n)
    if slot is not None:
        model.clear(slot)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Scheduler, list[Ask], int]:
    n_cells = draw(st.integers(8, 200))
    n_slots = draw(st.integers(1, 6))
    n_batch = draw(st.integers(n_slots, 64))
    asks = []
    for _ in range(draw(st.integers(1, 12))):
        n_prompt = draw(st.integers(1, n_cells - 1))
        asks.append(
            Ask(
                arrives=draw(st.integers(0, 40)),
                n_prompt=n_prompt,
                n_answer=draw(st.integers(1, n_cells - n_prompt)),
                cancelled_after=draw(st.none() | st.integers(1, 60)),
            )
        )
    return Scheduler(n_cells, n_slots, n_batch), asks, draw(st.integers(1, 64))


@given(workloads())
@settings(deadline=None)
def test_every_request_ends_exactly_once_and_starts_in_order(workload) -> None:
    scheduler, asks, prefill = workload
    run = simulate(scheduler, asks, prefill, scheduler.n_cells)
    for n in range(len(asks)):
        assert (run.ended[n], n in run.cancelled) in {(1, False), (0, True)}
    arrivals = [asks[n].arrives for n in run.admitted]
    assert arrivals == sorted(arrivals)
    assert not scheduler.has_work
    assert scheduler.n_cells_used == 0


@given(workloads(), st.integers(1, 100))
@settings(deadline=None)
def test_a_cache_that_is_fuller_than_it_seems_fails_only_what_cannot_fit_alone(
    workload, percent: int
) -> None:
    scheduler, asks, prefill = workload
    n_really = max(scheduler.n_cells * percent // 100, 1)
    run = simulate(scheduler, asks, prefill, n_really)
    for n, ask in enumerate(asks):
        assert run.ended[n] + (n in run.cancelled) + (n in run.failed) == 1
        if n in run.failed:
            assert ask.n_prompt + ask.n_answer > n_really


def test_a_short_prompt_passes_a_long_one() -> None:
    scheduler = Scheduler(n_cells=10_000, n_slots=4, n_batch=64)
    scheduler.add(1, 6400)
    scheduler.commit(scheduler.plan(64))
    scheduler.add(2, 32)
    batch = scheduler.plan(64)
    assert [(chunk.id, chunk.count, chunk.last) for chunk in batch.chunks] == [
        (1, 32, False),
        (2, 32, True),
    ]


def test_the_youngest_is_preempted_and_prefilled_again_with_all_its_tokens() -> None:
    scheduler = Scheduler(n_cells=64, n_slots=2, n_batch=64)
    scheduler.add(1, 10)
    scheduler.add(2, 10)
    slots: dict[int, int] = {}
    while not (batch := scheduler.plan(64)).preempted:
        slots |= {chunk.id: chunk.slot for chunk in batch.chunks}
        scheduler.commit(batch)
        for chunk in batch.chunks:
            scheduler.grow(chunk.id)
    assert [(taken.id, taken.slot) for taken in batch.preempted] == [(2, slots[2])]
    assert [chunk.id for chunk in batch.chunks] == [1]
    scheduler.commit(batch)
    scheduler.remove(1)
    again = scheduler.plan(64)
    assert again.admitted == (2,)
    assert [(chunk.start, chunk.count, chunk.last) for chunk in again.chunks] == [(0, 33, True)]


def test_refuses_what_can_never_fit() -> None:
    scheduler = Scheduler(n_cells=64, n_slots=2, n_batch=64)
    for n_tokens in (0, 65):
        with pytest.raises(ValueError, match="do not fit"):
            scheduler.add(1, n_tokens)


def test_pace_follows_the_machine() -> None:
    pace = Pace(n_batch=2048)
    assert pace.limit(0) == 128
    pace.observe(n_prefilled=128, n_tokens=128, seconds=0.128)
    assert pace.limit(n_decoding=1) == 150
    assert pace.limit(n_decoding=0) == 1000
    pace.observe(n_prefilled=3, n_tokens=4, seconds=9.0)
    assert pace.limit(n_decoding=0) == 1000
    for _ in range(50):
        pace.observe(n_prefilled=512, n_tokens=512, seconds=60.0)
    assert pace.limit(n_decoding=1) == 32
    for _ in range(50):
        pace.observe(n_prefilled=512, n_tokens=512, seconds=0.01)
    assert pace.limit(n_decoding=1) == 2048
