"""What leaves the cache and comes back in parts, with real memory: when, and how much."""

import errno
import itertools
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvserve.worker import cold_tier
from kvserve.worker.batches import Batch as Plan
from kvserve.worker.carry import memory_file, parts
from kvserve.worker.carry.parts import ArrivingSequence, LeavingSequence
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.cell_rules import Cut, Operation, Store
from kvserve.worker.cold_store import ColdStore, Stored
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

    def __init__(
        self,
        context: Context,
        cold: Context,
        limit_bytes: int = PLENTY,
        n_spare: int | None = None,
        tolerance: float = 0.05,
    ) -> None:
        context.clear()
        self.tolerance = tolerance
        self.context = context
        self.cold = cold
        self.rows: dict[int, np.ndarray] = {}
        rules = context.reuse_rules
        if n_spare is not None:
            rules = replace(rules, n_spare=n_spare)
        self.cache = PrefixCache(N_CELLS, N_SLOTS, rules, context.first_position, stores=True)
        self.executor = Executor(
            context,
            None,
            lambda operation: self.tier.keep(operation),  # noqa: PLW0108 - not there yet
        )
        self.tier = ColdTier(context, self.cache, limit_bytes, self.change)
        self.scheduler = Scheduler(N_CELLS, N_SLOTS, N_BATCH, self.cache)
        self.operations: list[Operation] = []
        self.plan = Plan(())
        self.texts: dict[int, np.ndarray] = {}
        self.n_known: dict[int, int] = {}
        self.n_cached: dict[int, int] = {}
        self.ids = itertools.count()

    def change(self, operations: tuple[Operation, ...]) -> None:
        self.operations += operations
        self.executor.change_memory(operations)

    def ask(self, text: np.ndarray, n_prompt: int | None = None, salt: str = "") -> int:
        request = next(self.ids)
        # Room for what is drawn after it.
        self.texts[request] = np.concatenate([text, random_tokens(50, seed=request)])
        self.n_known[request] = len(text) if n_prompt is None else n_prompt
        self.scheduler.add(request, text, self.n_known[request], salt)
        return request

    def step(self, seconds: float = 1.0) -> None:
        self.tier.restore(self.scheduler, seconds)
        self.plan = plan = self.scheduler.plan(N_BATCH, None, self.tier.n_leaving(seconds))
        self.change(plan.operations)
        batch = Batch(N_BATCH)
        for chunk in plan.chunks:
            text = self.texts[chunk.id][chunk.start : chunk.start + chunk.count]
            batch.add(text, chunk.start, chunk.slot, last=chunk.last)
        self.context.decode(batch)
        outputs = [chunk.id for chunk in plan.chunks if chunk.last]
        if outputs:
            rows = self.context.logits(len(outputs)).copy()
            self.rows = dict(zip(outputs, rows, strict=True))
        self.scheduler.commit(plan)
        for request in outputs:
            self.n_cached.setdefault(request, self.scheduler.n_cached(request))
            self.scheduler.grow(request)
            self.n_known[request] += 1
        self.audit()

    def audit(self) -> None:
        """llama.cpp has what the books say, and no more host memory is taken than is allowed."""
        for sequence in self.scheduler.sequences:
            assert self.context.n_cached(sequence.slot) == sequence.n_cells
        store = self.tier.store
        assert store.n_bytes + store.reserved_bytes <= store.limit_bytes
        n_leaving = sum(leaving.n_bytes for leaving in self.tier._leaving.values())
        arriving = self.tier._arriving
        n_arriving = arriving.n_bytes if arriving is not None else 0
        assert store.reserved_bytes == n_leaving + n_arriving
        assert (self.scheduler.held is not None) == self.tier.restoring

    def finish(self, request: int, seconds: float = 1.0) -> int:
        """Decode until it has its first token; how much of it was cached."""
        n_known = self.n_known[request]
        while self.n_known[request] == n_known:
            self.step(seconds)
        n_cached = self.scheduler.n_cached(request)
        if n_cached:
            self.compare(request, n_known)
        self.scheduler.remove(request)
        return n_cached

    def compare(self, request: int, n_known: int) -> None:
        """What is said next is what a context says that has read all of it."""
        self.cold.clear()
        text = self.texts[request][:n_known]
        batch = Batch(N_BATCH)
        for begin in range(0, n_known, N_BATCH):
            batch.clear()
            batch.add(text[begin : begin + N_BATCH], begin, 0, last=True)
            self.cold.decode(batch)
        assert abs(self.cold.logits(1)[-1] - self.rows[request]).max() < self.tolerance

    def finish_all(self, requests: list[int], seconds: float) -> None:
        """The same for requests of which any may be the first."""
        while any(request not in self.n_cached for request in requests):
            self.step(seconds)

    def empty(self) -> None:
        """Store all that is kept."""
        self.cache._worth._share = 0.25
        self.cache.make_room(N_CELLS)
        self.change(self.cache.take_operations())

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


@pytest.fixture(scope="module")
def cold(backend: Backend, small_model: Callable[..., Path]) -> Context:
    return backend.context(small_model("llama"), n_ctx=N_CELLS)


@pytest.fixture
def house(context: Context, cold: Context) -> House:
    return House(context, cold)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The parts that came back."""
    found: list[tuple[int, int]] = []
    take = ArrivingSequence.take

    def recording(self: ArrivingSequence, slot: int, through: int, begin: int, end: int) -> None:
        take(self, slot, through, begin, end)
        found.append((begin, end))

    monkeypatch.setattr(ArrivingSequence, "take", recording)
    return found


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each part had that left."""
    found: list[int] = []
    add = LeavingSequence.add

    def recording(self: LeavingSequence, slot: int, n_left: int, through: int | None) -> None:
        found.append(self.n_missing - n_left)
        add(self, slot, n_left, through)

    monkeypatch.setattr(LeavingSequence, "add", recording)
    return found


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


def test_beside_a_stream_a_step_copies_or_reads(house: House) -> None:
    house.read(random_tokens(LONG, seed=1))
    streaming = house.stream()
    request = house.ask(random_tokens(LONG, seed=2))
    n_copied, n_read, n_before = 0, 0, house.n_known[streaming]
    while request not in house.n_cached:
        house.operations.clear()
        house.step(1.0)
        stores = any(isinstance(one, Store) for one in house.operations)
        assert stores != bool(house.plan.n_prefill)
        n_copied, n_read = n_copied + stores, n_read + (not stores)
    assert 1 < n_copied < n_read < 2 * LONG // N_BATCH + 2
    assert house.n_known[streaming] - n_before == n_copied + n_read


@pytest.mark.parametrize("refused", ["too large", "broken", "covered"])
def test_what_is_not_copied_takes_no_step_of_its_own(
    context: Context, cold: Context, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    house = House(context, cold, limit_bytes=1000 if refused == "too large" else PLENTY)
    if refused == "broken":

        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "full")

        monkeypatch.setattr(LeavingSequence, "add", fail)
    if refused == "covered":
        monkeypatch.setattr(ColdStore, "covers", lambda *_: True)
    house.read(random_tokens(LONG, seed=1))
    house.stream()
    request = house.ask(random_tokens(LONG, seed=2))
    n_alone = 0
    while request not in house.n_cached:
        house.step(0.001)
        n_alone += not house.plan.n_prefill
    assert n_alone == 1, "the one that found it out"


@pytest.mark.parametrize("on_gpu", [False, True])
def test_parts_go_through_memory_that_a_gpu_can_reach(
    context: Context, cold: Context, monkeypatch: pytest.MonkeyPatch, on_gpu: bool
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(parts, "page_locked", asked.append)
    monkeypatch.setattr(type(context), "asynchronous", on_gpu)
    house = House(context, cold)
    first = pushed_out(house)
    assert len(asked) == on_gpu, "on the way out"
    house.stream()
    asked.clear()
    assert house.finish(house.ask(first)) == LONG
    assert len(asked) == on_gpu, "and in"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> "Clock":
    clock = Clock()
    monkeypatch.setattr(cold_tier, "time", clock)
    return clock


class Clock:
    """Time that passes with the cells that are copied, and with each copy."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_as_much_leaves_as_the_time_allows(
    house: House, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LeavingSequence.add

    seconds_per_cell = 1.0

    def slow(self: LeavingSequence, slot: int, n_left: int, through: int | None) -> None:
        clock.now += 0.001 + seconds_per_cell * (self.n_missing - n_left)
        add(self, slot, n_left, through)

    monkeypatch.setattr(LeavingSequence, "add", slow)

    def leave(n_cells: int) -> int:
        """What may leave in the next step, after so many cells have left."""
        house.cache.make_room(house.cache.n_free + n_cells, n_cells)
        house.change(house.cache.take_operations())
        return house.tier.n_leaving(0.01)

    assert house.tier.n_leaving(0.01) == 32, "before anything is known"
    for seed in range(2):
        house.read(random_tokens(450, seed=seed))
    house.cache._worth._share = 0.25
    assert leave(20) == 32, "the first part says nothing"
    seconds_per_cell = 0.0002
    assert leave(20) == 40
    seconds_per_cell = 0.0001
    assert 40 < leave(20) < 66
    for _ in range(12):
        n_leaving = leave(20)
    assert 60 < n_leaving <= 67
    assert house.tier.n_leaving(1e-6) == 16
    assert house.tier.n_leaving(60.0) == 512
    n_here = next(iter(house.cache._kept)).n_cells
    assert leave(n_here) == 32, "of the next one nothing is known"
    assert house.tier._speeds_out == {}


def test_no_part_takes_more_memory_than_is_there_for_one(
    house: House,
    taken: list[tuple[int, int]],
    left: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house.read(random_tokens(LONG, seed=1))
    n_bytes = house.context.state_bytes(house.cache.kept[0].slot)
    monkeypatch.setattr(cold_tier, "PART_BYTES", n_bytes // 6)
    for seed in (2, 3):
        house.cache._worth._share = 0.25
        house.read(random_tokens(LONG, seed=seed))
    assert len(house.tier.store) == 1
    assert LONG // 8 < max(left) <= LONG // 6
    assert LONG // 8 < house.tier.n_leaving(60.0) <= LONG // 6
    streaming = house.stream()
    house.tier._most_cells = 512
    request = house.ask(random_tokens(LONG, seed=1))
    for _ in range(5):
        house.step(60.0)
    house.scheduler.remove(streaming)
    assert house.finish(request, 60.0) == LONG - 1
    assert taken[0][1] < taken[-1][0]
    assert max(end - begin for begin, end in taken) <= LONG // 6


def test_cells_that_are_larger_than_a_part_go_a_few_at_a_time(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_tier, "PART_BYTES", 1)
    first = pushed_out(house)
    assert house.tier.n_leaving(60.0) == 16
    assert house.read(first) == LONG


def pushed_out(house: House) -> np.ndarray:
    """A conversation that two others have pushed out, with more of it than is stored."""
    first = random_tokens(LONG + 40, seed=1)
    for text in (first[:LONG], random_tokens(LONG, seed=2), random_tokens(LONG, seed=3)):
        house.read(text)
    return first


def with_room_for(context: Context, cold: Context, share: float, n_tokens: int) -> House:
    """Host memory for so many conversations of `n_tokens`."""
    house = House(context, cold)
    house.read(random_tokens(n_tokens, seed=1))
    n_bytes = context.state_bytes(house.cache.kept[0].slot)
    return House(context, cold, int(share * n_bytes))


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
    assert [begin for begin, _ in taken[1:]] == [end for _, end in taken[:-1]]
    assert (taken[0][0] > 0) == (n_others == 1), "of what had not left nothing is copied"
    assert taken[-1][1] == LONG
    assert max(end - begin for begin, end in taken) <= 64
    assert house.n_known[streaming] - n_before >= n_parts, "a token of the stream for each"
    house.scheduler.remove(streaming)
    assert house.cache.n_pinned == 0


def test_a_beginning_that_is_there_twice_is_stored_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[list[int]] = []
    store = ColdStore.put

    def recording(self: ColdStore, stored: Stored) -> bool:
        put.append(stored.tokens.tolist())
        return store(self, stored)

    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    house.read(random_tokens(LONG, seed=2))
    house.stream()
    assert house.finish(house.ask(first), seconds=1e-9) == LONG
    monkeypatch.setattr(ColdStore, "put", recording)
    house.cache._worth._share = 0.25
    while house.cache.evict_oldest():
        house.change(house.cache.take_operations())
    assert [len(one) for one in put if one == first[: len(one)].tolist()] == [LONG + 40]


def test_conversations_with_a_common_beginning_leave_in_parts(house: House) -> None:
    """Of the first one to leave others hold the beginning, which is copied before they need it."""
    texts = [
        np.concatenate([random_tokens(400, seed=1), random_tokens(n, seed=2 + n), [7] * 40])
        for n in (100, 200)
    ]
    for text in texts:
        house.read(text[:-40])
    streaming = house.stream()
    steps = []
    for seed in range(4):
        house.cache._worth._share = 0.25
        request = house.ask(random_tokens(250, seed=20 + seed))
        while request not in house.n_cached:
            house.operations.clear()
            house.step(1e-9)
            stores = [one for one in house.operations if isinstance(one, Store)]
            steps.append(sum(len(one.tokens) - one.n_left for one in stores))
        house.scheduler.remove(request)
    assert 0 < max(steps) < 400
    house.scheduler.remove(streaming)
    for text in texts:
        assert house.read(text) >= 400


def test_what_has_to_begin_to_leave_once_more_does_so_in_parts(
    house: House, left: list[int]
) -> None:
    for n in (20, 300):
        house.read(np.concatenate([random_tokens(400, seed=1), random_tokens(n, seed=2 + n)]))
    house.cache._worth._share = 0.25

    def leave() -> int:
        house.operations.clear()
        house.cache.make_room(house.cache.n_free + 30, 40)
        house.change(house.cache.take_operations())
        stores = [one for one in house.operations if isinstance(one, Store)]
        return stores[-1 if len(stores) == 1 else 0].n_left

    lefts = [leave() for _ in range(5)]
    first = house.cache.kept[-1]
    assert 0 < first.n_uncopied == lefts[-1] < 400
    house.tier._forget(first.leaving)
    left.clear()
    assert leave() == 380
    assert max(left) <= 30


def test_the_parts_grow_with_the_time_there_is(house: House, taken: list[tuple[int, int]]) -> None:
    first = pushed_out(house)
    house.stream()
    house.finish(house.ask(first), seconds=60.0)
    assert taken == [(0, 64), (64, 128), (128, LONG)]


def test_without_streams_it_comes_back_at_once(house: House, taken: list[tuple[int, int]]) -> None:
    first = pushed_out(house)
    assert house.read(first) == LONG
    assert taken == []


def test_when_the_streams_end_the_rest_comes_at_once(
    house: House, taken: list[tuple[int, int]]
) -> None:
    first = pushed_out(house)
    streaming = house.stream()
    request = house.ask(first)
    for _ in range(3):
        house.step(1e-9)
    assert house.tier.restoring
    house.scheduler.remove(streaming)
    assert house.finish(request, 1e-9) == LONG
    assert taken[-1][1] == LONG
    assert [end - begin for begin, end in taken] == [64, 64, LONG - 128]


def test_a_request_behind_the_one_that_is_held_waits_too(house: House) -> None:
    first = pushed_out(house)
    house.stream()
    held, behind = house.ask(first), house.ask(random_tokens(30, seed=7))
    house.step(1e-9)
    house.step(1e-9)
    assert house.scheduler.held == held
    assert house.scheduler.n_decoding == 1
    assert house.finish(held, 1e-9) == LONG
    assert house.finish(behind) == 0


def two_stored(house: House) -> list[np.ndarray]:
    """Two conversations in host memory, and one token more of each than is there."""
    texts = [random_tokens(300 + 40, seed=seed) for seed in (1, 2)]
    for text in texts:
        house.read(text[:300])
    house.empty()
    assert [len(one.tokens) for one in house.tier.store.latest] == [300, 300]
    return texts


def test_a_request_that_is_cancelled_while_it_is_held_makes_way_for_the_next(house: House) -> None:
    first, second = two_stored(house)
    house.stream()
    request = house.ask(first)
    house.step(1e-9)
    house.step(1e-9)
    assert house.tier.restoring
    house.scheduler.remove(request)
    assert house.finish(house.ask(second), 1e-9) == 300
    assert house.read(first) == 300


@pytest.mark.parametrize("streams", [False, True])
def test_several_that_come_back_are_all_restored(house: House, streams: bool) -> None:
    texts = two_stored(house)
    if streams:
        house.stream()
    requests = [house.ask(text) for text in texts]
    house.finish_all(requests, 1e-3)
    assert [house.n_cached[request] for request in requests] == [300, 300]


def test_where_the_running_ones_need_the_room_it_is_read_instead(
    house: House, taken: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold_tier, "_LEAST_CELLS", 1)
    first = pushed_out(house)
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
    assert house.finish(request) == LONG, "the state is still there"
    assert house.cache.n_pinned == 0


@pytest.mark.parametrize("way", ["leaves", "arrives"])
def test_what_cannot_be_copied_is_lost_and_nothing_else(
    house: House, monkeypatch: pytest.MonkeyPatch, way: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise CannotCarry(Reason.EXPORT, "not today")

    if way == "leaves":
        monkeypatch.setattr(LeavingSequence, "add", refuse)
    else:
        monkeypatch.setattr(ArrivingSequence, "take", refuse)
    first = pushed_out(house)
    house.stream()
    assert house.finish(house.ask(first)) == 0
    assert not house.tier.restoring
    assert first.tolist()[:LONG] not in [one.tokens.tolist() for one in house.tier.store.latest]
    assert len(capfd.readouterr().err.splitlines()) <= 3, "told once for each conversation"


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
    assert house.tier.store.reserved_bytes == sum(
        leaving.n_bytes for leaving in house.tier._leaving.values()
    )


def test_ids_that_are_taken_do_not_empty_what_is_kept_under_them(
    context: Context, cold: Context
) -> None:
    """All ids are taken, and what comes back needs room and an id at once."""
    house = House(context, cold, n_spare=6)
    first = random_tokens(320, seed=1)
    house.read(first[:300])
    house.empty()
    for n in (300, *[17] * 9):
        house.cache._worth._share = 0.25
        house.read(random_tokens(n, seed=100 + len(house.texts)))
    house.read(random_tokens(300, seed=3))
    house.cache._worth._share = 0.25
    assert len(house.cache.free_ids) <= 1
    assert house.read(first) == 300
    for sequence in house.cache.kept:
        text = np.concatenate([sequence.tokens[: sequence.n_cells], random_tokens(5, seed=9)])
        house.read(text)


def test_of_a_conversation_that_has_lost_a_few_cells_only_those_are_read_again(
    house: House, left: list[int]
) -> None:
    first = random_tokens(880 + 40, seed=1)
    house.read(first[:880])
    house.stream()
    house.cache._worth._share = 0.25
    house.read(random_tokens(140, seed=2))
    n_here = max(sequence.n_cells for sequence in house.cache.kept)
    assert 820 < n_here < 880
    left.clear()
    assert house.finish(house.ask(first[:900]), seconds=1e-9) == n_here
    assert max(left, default=0) <= N_BATCH


def test_what_can_never_be_whole_does_not_keep_memory_from_others(
    context: Context, cold: Context
) -> None:
    house = with_room_for(context, cold, 1.6, LONG)
    house.read(random_tokens(LONG, seed=1))
    house.read(random_tokens(LONG, seed=2))
    assert len(house.tier._leaving) == 1
    house.cache._worth._share = 0.0
    house.cache.make_room(N_CELLS)
    house.change(house.cache.take_operations())
    assert not house.cache.kept
    house.read(random_tokens(LONG, seed=3))
    assert house.tier.store.reserved_bytes == 0
    house.cache._worth._share = 0.25
    while house.cache.evict_oldest():
        house.change(house.cache.take_operations())
    assert [len(one.tokens) for one in house.tier.store.latest] == [LONG]


def test_a_whole_conversation_goes_before_a_part(context: Context, cold: Context) -> None:
    house = with_room_for(context, cold, 1.7, 300)
    for seed in (1, 2, 3):
        house.cache._worth._share = 0.25
        house.read(random_tokens(300, seed=seed))
    house.cache._worth._share = 0.25
    house.read(random_tokens(200, seed=4))
    assert len(house.tier._leaving) == 1
    second = house.cache.kept[-2]
    house.cache._touch(house.cache.kept[-1])
    assert house.cache.evict_oldest()
    house.change(house.cache.take_operations())
    assert [one.tokens.tolist() for one in house.tier.store.latest] == [
        second.tokens[:300].tolist()
    ]


def test_what_arrives_counts_and_is_still_there_afterwards(context: Context, cold: Context) -> None:
    """`audit` looks at the bytes after every step."""
    house = with_room_for(context, cold, 1.3, LONG)
    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    house.empty()
    house.read(random_tokens(LONG, seed=5))
    house.stream()
    house.cache._worth._share = 0.25
    assert house.finish(house.ask(first), 1e-9) == LONG
    kept = [len(one.tokens) for one in house.tier.store.latest]
    stored = [one.n_stored for one in house.scheduler.sequences if one.n_cells >= LONG]
    assert (LONG in kept) == (LONG in stored)


def test_the_memory_for_copies_is_given_back_where_it_is_much(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = parts.Scratch()
    monkeypatch.setattr(parts, "_MOST_SCRATCH_BYTES", 1000)
    assert len(scratch.take(5000)) == 5000
    assert len(scratch.take(800)) == 800
    assert len(scratch._memory) == 800


def fail_at(n: int, error: BaseException) -> Callable[..., int]:
    """os.pwrite that fails once."""
    calls, write = itertools.count(), os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if next(calls) == n:
            raise error
        return write(fd, data[: max(len(data) // 2, 1)], offset)

    return pwrite


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), MemoryError()])
@pytest.mark.parametrize("n", [3, 10_000])
def test_a_state_with_holes_is_never_kept(
    house: House, monkeypatch: pytest.MonkeyPatch, error: BaseException, n: int
) -> None:
    """Writes that take only half of what they are given do no harm."""
    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    monkeypatch.setattr(os, "pwrite", fail_at(n, error))
    house.read(random_tokens(LONG, seed=2))
    house.read(random_tokens(LONG, seed=3))
    there = [one.tokens.tolist() for one in house.tier.store.latest]
    assert (first[:LONG].tolist() in there) == (n > 3)
    assert house.read(first) == (LONG if n > 3 else 0)


def test_the_last_part_that_fails_is_noticed_too(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows = LeavingSequence._write_rows

    def failing(self: LeavingSequence, *arguments: object) -> None:
        write_rows(self, *arguments)
        if self.n_missing < 40:
            self._failure = OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(LeavingSequence, "_write_rows", failing)
    for seed in range(2, 6):
        house.cache._worth._share = 0.25
        house.read(random_tokens(LONG, seed=seed))
    assert len(house.tier.store) == 0
    assert len(house.tier._leaving) == 1, "the last but one has only begun to leave"


def test_the_buffer_is_not_written_over_while_it_is_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finish` compares what is said after it came back."""
    write_rows = LeavingSequence._write_rows

    def slow(self: LeavingSequence, *arguments: object) -> None:
        time.sleep(0.05)
        write_rows(self, *arguments)

    monkeypatch.setattr(LeavingSequence, "_write_rows", slow)
    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    house.read(random_tokens(LONG, seed=2))
    house.read(random_tokens(LONG, seed=3))
    assert house.read(first) == LONG


@pytest.mark.parametrize("broken", ["finish", "view", "arriving"])
def test_where_the_kernel_gives_no_memory_nothing_is_closed_twice(
    house: House, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    files: set[int] = set()
    create, close = os.memfd_create, os.close

    def created(*arguments: object) -> int:
        files.add(fd := create(*arguments))
        return fd

    def closed(fd: int) -> None:
        files.remove(fd)
        close(fd)

    monkeypatch.setattr(os, "memfd_create", created)
    monkeypatch.setattr(os, "close", closed)
    first = random_tokens(LONG + 40, seed=1)
    house.read(first[:LONG])
    house.read(random_tokens(LONG, seed=2))
    if broken == "finish":
        monkeypatch.setattr(memory_file.Blank, "take", no_memory)
    if broken == "arriving":
        monkeypatch.setattr(memory_file.Blank, "view", no_memory)
        house.stream()
        assert house.finish(house.ask(first)) < LONG
        return
    house.read(random_tokens(LONG, seed=3))
    if broken == "view":
        monkeypatch.setattr(memory_file.ExportedState, "view", no_memory)
    house.stream()
    assert house.finish(house.ask(first)) == 0
    n_there = len(house.tier.store) + len(house.tier._leaving)
    assert len(files) == n_there


def test_while_a_prompt_is_read_nothing_comes_back(
    house: House, taken: list[tuple[int, int]]
) -> None:
    """The two together would make a step too long."""
    first, _ = two_stored(house)
    house.stream()
    house.ask(random_tokens(400, seed=8))
    request = house.ask(first)
    while request not in house.n_cached:
        n_taken, reading = len(taken), house.scheduler.n_reading
        house.step(1e-3)
        assert not reading or len(taken) == n_taken
    assert house.n_cached[request] == 300


def test_tenants_that_say_the_same_are_stored_apart(house: House) -> None:
    text = random_tokens(300 + 20, seed=1)
    for salt in ("mine", "yours"):
        request = house.ask(text, 300, salt)
        house.finish(request)
    house.empty()
    assert sorted(one.salt for one in house.tier.store.latest) == ["mine", "yours"]


def test_one_thread_writes_whatever_leaves(house: House) -> None:
    before = set(threading.enumerate())
    for seed in range(5):
        house.read(random_tokens(LONG, seed=seed))
    new = set(threading.enumerate()) - before
    assert sum(thread.name.startswith("writer") for thread in new) == 1


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_what_is_cached_is_what_was_said(
    context: Context, cold: Context, seed: int
) -> None:
    """Conversations that branch and go on, streams, cancels, few ids and little memory."""
    rng = random.Random(seed)
    limit_bytes = rng.choice([PLENTY, 900_000, 400_000, 200_000])
    live_through(rng, House(context, cold, limit_bytes, rng.choice([None, 0, 1, 3])), seed)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pair", ["q4_0", "q8_0:q4_0"])
def test_so_it_is_in_quantized_caches(
    backend: Backend, small_model: Callable[..., Path], pair: str, seed: int
) -> None:
    """Batches of other sizes round otherwise, and quantizing makes more of it."""
    model = small_model("llama")
    context, cold = (backend.context(model, pair, n_ctx=N_CELLS) for _ in range(2))
    house = House(context, cold, 400_000, 3, tolerance=0.5)
    live_through(random.Random(seed), house, seed)


def live_through(rng: random.Random, house: House, seed: int) -> None:
    texts = [random_tokens(rng.choice([40, 300, 500, 800]), seed=100 * seed + n) for n in range(4)]
    left: dict[int, int] = {}

    def step() -> None:
        house.cache._worth._share = rng.choice([0.25, 0.25, 0.0])
        house.step(rng.choice([1e-9, 1e-4, 1.0]))
        for request in house.rows:
            if request in left:
                if rng.random() < 0.1:
                    house.compare(request, house.n_known[request] - 1)
                left[request] -= 1
                if not left[request]:
                    del left[request]
                    house.scheduler.remove(request)

    for _ in range(40):
        if rng.random() < 0.6 and len(left) < 6:
            begin = rng.choice(texts)[: rng.randint(20, 800)]
            text = np.concatenate([begin, random_tokens(70, seed=rng.randint(0, 10**6))])
            n_prompt = len(begin) + rng.randint(1, 10)
            texts[rng.randrange(4)] = text[:n_prompt]
            left[house.ask(text, n_prompt)] = rng.choice([1, 1, 5, 50])
        elif left and rng.random() < 0.3:
            request = rng.choice(list(left))
            del left[request]
            house.scheduler.remove(request)
        for _ in range(rng.randint(1, 4)):
            if house.scheduler.has_work:
                step()
    for _ in range(3000):
        if not house.scheduler.has_work:
            break
        step()
    assert not house.scheduler.has_work
