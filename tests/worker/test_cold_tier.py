"""What leaves the cache and comes back in parts, with real memory: when, and how much."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kvserve.worker import cold_tier
from kvserve.worker.carry.parts import ArrivingSequence, LeavingSequence
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.cell_rules import Cut, Operation, Store
from kvserve.worker.cold_tier import ColdTier
from kvserve.worker.executor import Executor
from kvserve.worker.llama import Batch, Context
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.scheduler import Scheduler
from tests.worker.carry.conftest import Backend, random_tokens

N_CELLS = 1024
N_SLOTS = 4
N_BATCH = 256
LONG = 600
PLENTY = 2**30

pytest.importorskip("gguf")


class House:
    """A scheduler, its cache and the tier over a real context. Every request draws one token."""

    def __init__(self, context: Context, limit_bytes: int = PLENTY) -> None:
        context.clear()
        self.context = context
        self.cache = PrefixCache(
            N_CELLS, N_SLOTS, context.reuse_rules, context.first_position, stores=True
        )
        self.executor = Executor(
            context,
            None,
            lambda operation: self.tier.keep(operation),  # noqa: PLW0108 - not there yet
        )
        self.tier = ColdTier(context, self.cache, limit_bytes, self.change)
        self.scheduler = Scheduler(N_CELLS, N_SLOTS, N_BATCH, self.cache)
        self.operations: list[Operation] = []
        self.texts: dict[int, np.ndarray] = {}
        self.n_known: dict[int, int] = {}
        self.ids = itertools.count()

    def change(self, operations: tuple[Operation, ...]) -> None:
        self.operations += operations
        self.executor.change_memory(operations)

    def ask(self, text: np.ndarray, n_prompt: int | None = None) -> int:
        request = next(self.ids)
        self.texts[request] = text
        self.n_known[request] = len(text) if n_prompt is None else n_prompt
        self.scheduler.add(request, text, self.n_known[request])
        return request

    def step(self, seconds: float = 1.0) -> None:
        self.tier.restore(self.scheduler, seconds)
        plan = self.scheduler.plan(N_BATCH)
        self.change(plan.operations)
        batch = Batch(N_BATCH)
        for chunk in plan.chunks:
            text = self.texts[chunk.id][chunk.start : chunk.start + chunk.count]
            batch.add(text, chunk.start, chunk.slot, last=chunk.last)
        self.context.decode(batch)
        self.scheduler.commit(plan)
        for chunk in plan.chunks:
            if chunk.last:
                self.scheduler.grow(chunk.id)
                self.n_known[chunk.id] += 1

    def finish(self, request: int, seconds: float = 1.0) -> int:
        """Decode until it has its first token; how much of it was cached."""
        n_known = self.n_known[request]
        while self.n_known[request] == n_known:
            self.step(seconds)
        n_cached = self.scheduler.n_cached(request)
        self.scheduler.remove(request)
        return n_cached

    def read(self, text: np.ndarray) -> int:
        return self.finish(self.ask(text))

    def stream(self) -> int:
        """A request that goes on."""
        text = np.concatenate([random_tokens(20, seed=99), random_tokens(400, seed=98)])
        request = self.ask(text, 20)
        while self.n_known[request] == 20:
            self.step()
        return request


@pytest.fixture(scope="module")
def context(backend: Backend, small_model: Callable[..., Path]) -> Context:
    return backend.context(small_model("llama"), n_ctx=N_CELLS)


@pytest.fixture
def house(context: Context) -> House:
    return House(context)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The parts that came back."""
    parts: list[tuple[int, int]] = []
    take = ArrivingSequence.take

    def recording(self: ArrivingSequence, slot: int, through: int, begin: int, end: int) -> None:
        take(self, slot, through, begin, end)
        parts.append((begin, end))

    monkeypatch.setattr(ArrivingSequence, "take", recording)
    return parts


def test_what_a_step_needs_is_stored_just_before_it(house: House) -> None:
    first = random_tokens(LONG, seed=1)
    house.read(first)
    house.stream()
    house.operations.clear()
    house.read(random_tokens(LONG, seed=2))
    stores = [one for one in house.operations if isinstance(one, Store)]
    assert sum(len(store.tokens) - store.n_left for store in stores) < 300
    assert max(len(store.tokens) - store.n_left for store in stores) <= N_BATCH
    assert len(house.tier.store) == 0, "its beginning is still in the cache"
    assert house.tier.store.reserved_bytes > 0
    house.read(random_tokens(LONG, seed=3))
    assert [len(one.tokens) for one in house.tier.store.latest] == [LONG]


@pytest.mark.parametrize("n_others", [1, 2])
def test_beside_a_stream_it_comes_back_in_parts(
    house: House, taken: list[tuple[int, int]], n_others: int
) -> None:
    """With one conversation after it only its end has left; with two all of it."""
    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    for seed in range(n_others):
        house.read(random_tokens(LONG, seed=2 + seed))
    streaming = house.stream()
    n_before = house.n_known[streaming]
    assert house.finish(house.ask(first), seconds=1e-9) == LONG
    n_parts = len(taken)
    assert [begin for begin, _ in taken] == [0, *(end for _, end in taken[:-1])]
    assert taken[-1][1] == LONG
    assert max(end - begin for begin, end in taken) <= 64
    assert house.n_known[streaming] - n_before >= n_parts, "a token of the stream for each"
    house.scheduler.remove(streaming)
    assert house.scheduler.held is None
    assert house.cache.n_pinned == 0


def test_the_parts_grow_with_the_time_there_is(house: House, taken: list[tuple[int, int]]) -> None:
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    house.stream()
    house.finish(house.ask(first), seconds=60.0)
    assert taken == [(0, 64), (64, LONG)]


def test_without_streams_it_comes_back_at_once(house: House, taken: list[tuple[int, int]]) -> None:
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    assert house.read(first) == LONG
    assert taken == []


def test_when_the_streams_end_the_rest_comes_at_once(
    house: House, taken: list[tuple[int, int]]
) -> None:
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    streaming = house.stream()
    request = house.ask(first)
    for _ in range(3):
        house.step(1e-9)
    assert house.tier.restoring
    house.scheduler.remove(streaming)
    assert house.finish(request, 1e-9) == LONG
    assert taken[-1][1] == LONG
    assert taken[-1][1] - taken[-1][0] > 400


def test_a_request_behind_the_one_that_is_held_waits_too(house: House) -> None:
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    house.stream()
    held, behind = house.ask(first), house.ask(random_tokens(30, seed=7))
    house.step(1e-9)
    house.step(1e-9)
    assert house.scheduler.held == held
    assert house.scheduler.n_decoding == 1
    assert house.finish(held, 1e-9) == LONG
    assert house.finish(behind) == 0


def test_a_request_that_is_cancelled_while_it_is_held_leaves_a_kept_sequence(
    house: House,
) -> None:
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    house.stream()
    request = house.ask(first)
    house.step(1e-9)
    house.step(1e-9)
    house.scheduler.remove(request)
    assert house.read(random_tokens(30, seed=7)) == 0
    while house.tier.restoring:
        house.step(1e-9)
    assert house.read(first) == LONG


def test_where_the_running_ones_need_the_room_it_is_read_instead(
    house: House, taken: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_tier, "_LEAST_CELLS", 1)
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    streaming = house.stream()
    request = house.ask(first)
    house.step(1e-9)
    house.step(1e-9)
    assert house.tier.restoring
    for _ in range(395):
        house.step(0.0)
        if not house.tier.restoring:
            break
    else:
        pytest.fail("the room was not needed")
    assert taken[-1][1] < LONG
    house.scheduler.remove(streaming)
    assert house.finish(request) in (0, LONG)
    assert house.cache.n_pinned == 0


@pytest.mark.parametrize("way", ["leaves", "arrives"])
def test_what_cannot_be_copied_is_lost_and_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def refuse(*_: object) -> None:
        raise CannotCarry(Reason.EXPORT, "not today")

    if way == "leaves":
        monkeypatch.setattr(LeavingSequence, "add", refuse)
    else:
        monkeypatch.setattr(ArrivingSequence, "take", refuse)
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    house.stream()
    assert house.finish(house.ask(first)) == 0
    assert house.tier.store.reserved_bytes == 0 or way == "arrives"
    assert not house.tier.restoring


def test_where_all_ids_are_taken_it_is_stored_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PrefixCache, "free_ids", ())
    house.read(random_tokens(LONG, seed=1))
    house.read(random_tokens(LONG, seed=2))
    assert [len(one.tokens) for one in house.tier.store.latest] == [LONG]
    assert house.tier.store.reserved_bytes == 0
    house.read(random_tokens(LONG, seed=3))
    assert [len(one.tokens) for one in house.tier.store.latest][:2] == [LONG, LONG]


def test_only_so_many_are_left_unfinished(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold_tier, "_MOST_LEAVING", 1)
    texts = [random_tokens(280, seed=n) for n in range(3)]
    for text in texts:
        house.read(text)
    # The first loses its end, then another request begins like it, so that the second is next.
    house.read(random_tokens(250, seed=5))
    assert any(isinstance(one, Cut) for one in house.operations)
    house.read(np.concatenate([texts[0][:100], random_tokens(400, seed=6)]))
    assert len(house.tier._leaving) <= 1
    house.read(random_tokens(1000, seed=7))
    assert house.tier.store.reserved_bytes == sum(house.tier._leaving.values())
