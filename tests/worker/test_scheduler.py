"""The scheduler against a memory that knows the token of every cell."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker import prefix_cache
from kvserve.worker.batches import Batch, Chunk
from kvserve.worker.cell_rules import Rules, Store
from kvserve.worker.scheduler import Scheduler
from tests.worker.fake_memory import ALL_RULES, PLAIN, WINDOW, FakeMemory, fake_scheduler

TEXTS = ([1] * 200, [1] * 5 + [2] * 195, [1, 2] * 100, list(range(200)))


def following(text: list[int]) -> int:
    """The next token of a text."""
    return 3 + sum(text) % 2


@dataclass(frozen=True)
class Ask:
    arrives: int
    prompt: tuple[int, ...]
    n_answer: int
    cancelled_after: int | None = None
    salt: str = ""
    scored: bool = False

    @property
    def n_to_score(self) -> int:
        return len(self.prompt) - 1 if self.scored else 0


@dataclass
class Run:
    """One workload, played to its end."""

    scheduler: Scheduler
    memory: FakeMemory
    asks: list[Ask]
    prefill: int
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    known: dict[int, list[int]] = field(default_factory=dict)
    live: list[int] = field(default_factory=list)
    ended: Counter[int] = field(default_factory=Counter)
    admitted: list[int] = field(default_factory=list)
    cancelled: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    n_cached: dict[int, int] = field(default_factory=dict)
    n_scored: Counter[int] = field(default_factory=Counter)
    n_prefilled: int = 0
    n_steps: int = 0
    n_accepted: int = 0
    drafts: bool = True
    n_stored: int = 0
    copied: list[int] = field(default_factory=list)

    def play(self) -> "Run":
        pending = sorted(range(len(self.asks)), key=lambda n: self.asks[n].arrives)
        while pending or self.live:
            self.n_steps += 1
            assert self.n_steps < 20_000, "livelock"
            while pending and (self.asks[pending[0]].arrives <= self.n_steps or not self.live):
                self._add(pending.pop(0))
            for n in [n for n in self.live if self.asks[n].cancelled_after == self.n_steps]:
                self._drop(n)
                self.cancelled.add(n)
            if self.live:
                self._step()
        self.memory.change(self.scheduler.cache.take_operations())
        self._check_cells()
        return self

    def _add(self, n: int) -> None:
        ask = self.asks[n]
        self.tokens[n] = np.zeros(len(ask.prompt) + ask.n_answer, dtype=np.int32)
        self.tokens[n][: len(ask.prompt)] = ask.prompt
        self.known[n] = list(ask.prompt)
        self.live.append(n)
        self.scheduler.add(n, self.tokens[n], len(ask.prompt), ask.salt, ask.n_to_score)

    def _step(self) -> None:
        scheduler = self.scheduler
        decoding_before = scheduler.n_decoding
        drafts = {n: self._draft(n) for n in self.live} if self.drafts else {}
        batch = scheduler.plan(self.prefill, drafts, self.n_stored)
        self.admitted += [n for n in batch.admitted if n not in self.admitted]
        self.n_prefilled += batch.n_prefill
        assert batch.chunks
        assert 0 < batch.n_tokens <= scheduler.n_batch
        assert batch.n_prefill <= max(self.prefill, 1)
        n_decoding = batch.n_tokens - batch.n_prefill - batch.n_drafted
        stores = any(isinstance(one, Store) for one in batch.operations)
        if n_decoding and scheduler.n_reading and not batch.n_prefill:
            assert stores, "prompts wait for a copy"
            assert self.n_steps - 1 not in self.copied, "never twice in a row"
            self.copied.append(self.n_steps)
        else:
            assert self.live[0] in {chunk.id for chunk in batch.chunks}
            both = stores and n_decoding and batch.n_prefill
            assert not both or self.n_steps - 1 in self.copied, "streams wait for both"
        assert n_decoding >= decoding_before - len(batch.preempted)
        assert len({chunk.slot for chunk in batch.chunks}) == len(batch.chunks)
        n_outputs = sum(chunk.n_outputs for chunk in batch.chunks)
        assert n_outputs <= scheduler.n_slots + batch.n_drafted
        assert batch.n_drafted <= scheduler.n_draft
        assert batch.n_tokens + batch.n_pad <= scheduler.n_batch
        assert not batch.n_pad or not batch.n_prefill
        self.drafts = True
        if not self.memory.decode(batch, self.known):
            if batch.n_drafted:
                self.drafts = False
            elif not scheduler.relieve():
                self.failed.add(self.live[0])
                self._drop(self.live[0], broken=True)
            return
        scheduler.commit(batch)
        for chunk in batch.chunks:
            end = chunk.start + chunk.count
            assert chunk.last == (end == len(self.known[chunk.id]))
            if chunk.scored:
                assert chunk.start <= self.n_scored[chunk.id] < self.asks[chunk.id].n_to_score
                assert end <= self.asks[chunk.id].n_to_score
                self.n_scored[chunk.id] = max(self.n_scored[chunk.id], end)
            if chunk.last:
                assert self.n_scored[chunk.id] == self.asks[chunk.id].n_to_score
                self._draw(chunk)
        self.memory.change(scheduler.cache.take_operations())
        self._check_cells()

    def _draft(self, n: int) -> tuple[int, ...]:
        """What may come next; wrong now and then. As in the engine, never more than is wanted."""
        ask, known = self.asks[n], self.known[n]
        n_most = ask.n_answer - (len(known) - len(ask.prompt)) - 1
        draft, text = [], list(known)
        for _ in range(min(n_most, self.n_steps % 5)):
            text.append(following(text))
            draft.append(text[-1] if sum(text) % 7 else 9)
        return tuple(draft)

    def _draw(self, chunk: Chunk) -> None:
        n = chunk.id
        ask, known = self.asks[n], self.known[n]
        drawn = []
        for drafted in (*chunk.draft, None):
            drawn.append(following(known))
            known.append(drawn[-1])
            self.tokens[n][len(known) - 1] = drawn[-1]
            if len(known) - len(ask.prompt) >= ask.n_answer or drawn[-1] != drafted:
                break
        if chunk.draft:
            self.scheduler.settle(chunk, len(drawn) - 1)
            self.n_accepted += len(drawn) - 1
        if len(known) - len(ask.prompt) >= ask.n_answer:
            self.ended[n] += 1
            self.n_cached[n] = self.scheduler.n_cached(n)
            self._drop(n)
            return
        self.scheduler.grow(n, len(drawn))

    def _drop(self, n: int, *, broken: bool = False) -> None:
        self.live.remove(n)
        self.scheduler.remove(n, broken=broken)

    def _check_cells(self) -> None:
        cache = self.scheduler.cache
        assert cache.n_pinned + cache.n_kept == self.memory.n_used
        assert self.memory.n_used <= self.scheduler.n_cells


@st.composite
def workloads(draw: st.DrawFn, n_really_percent: int = 100) -> Run:
    n_cells = draw(st.integers(8, 200))
    n_slots = draw(st.integers(1, 6))
    n_batch = draw(st.integers(n_slots, 64))
    asks = []
    for _ in range(draw(st.integers(1, 12))):
        n_prompt = draw(st.integers(1, n_cells - 1))
        asks.append(
            Ask(
                arrives=draw(st.integers(0, 60)),
                prompt=tuple(draw(st.sampled_from(TEXTS))[:n_prompt]),
                n_answer=draw(st.integers(1, n_cells - n_prompt)),
                cancelled_after=draw(st.none() | st.integers(1, 60)),
                salt=draw(st.sampled_from(("", "", "", "pepper"))),
                scored=draw(st.sampled_from((False, False, True))),
            )
        )
    scheduler, memory = fake_scheduler(
        n_cells,
        n_slots,
        n_batch,
        draw(st.sampled_from(ALL_RULES)),
        n_really=max(n_cells * draw(st.integers(n_really_percent, 100)) // 100, 1),
        shortest=draw(st.integers(1, 4)),
        n_draft=draw(st.sampled_from((0, 0, 1, 4, 12))),
        rows=draw(st.sampled_from(({}, {2: 3}, {2: 5, 3: 5, 4: 5}))),
        learns=draw(st.booleans()),
        stores=draw(st.booleans()),
    )
    prefill, n_stored = draw(st.integers(1, 64)), draw(st.sampled_from((0, 4, 64)))
    return Run(scheduler, memory, asks, prefill, n_stored=n_stored)


@pytest.fixture(scope="module", autouse=True)
def _short_sequences_are_stored() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "SHORTEST", 4)
        yield


@given(workloads())
@settings(deadline=None, max_examples=300)
def test_every_request_ends_exactly_once_and_starts_in_order(run: Run) -> None:
    run.play()
    for n in range(len(run.asks)):
        assert (run.ended[n], n in run.cancelled) in {(1, False), (0, True)}
    arrivals = [run.asks[n].arrives for n in run.admitted]
    assert arrivals == sorted(arrivals)
    assert not run.scheduler.has_work
    assert run.scheduler.cache.n_pinned == 0
    assert all(cached < len(run.asks[n].prompt) for n, cached in run.n_cached.items())


@given(workloads(n_really_percent=1))
@settings(deadline=None, max_examples=200)
def test_a_cache_that_is_fuller_than_it_seems_fails_only_what_cannot_fit_alone(run: Run) -> None:
    run.play()
    for n, ask in enumerate(run.asks):
        assert run.ended[n] + (n in run.cancelled) + (n in run.failed) == 1
        if n in run.failed:
            assert len(ask.prompt) + ask.n_answer > run.memory.n_cells


def play(asks: list[Ask], n_cells: int = 1000, rules=PLAIN, n_slots: int = 4) -> Run:
    scheduler, memory = fake_scheduler(n_cells, n_slots, 64, rules)
    return Run(scheduler, memory, asks, 64).play()


def test_a_request_shares_the_cells_of_a_running_one() -> None:
    run = play([Ask(0, (1,) * 50, 20), Ask(10, (1,) * 40 + (7,) * 10, 5)])
    assert run.n_cached[1] == 40
    assert run.n_prefilled == 60


def test_requests_that_arrive_together_prefill_their_common_beginning_once() -> None:
    run = play([Ask(0, (*range(200), 300 + n), 5) for n in range(4)])
    assert run.n_prefilled == 204
    assert run.n_cached == {0: 0, 1: 200, 2: 200, 3: 200}


def test_a_follower_whose_leader_is_cancelled_goes_on_from_what_it_left() -> None:
    run = play([Ask(0, (*range(200), 7), 5, cancelled_after=3), Ask(1, (*range(200), 8), 5)])
    assert (run.cancelled, run.ended) == ({0}, {1: 1})
    assert 0 < run.n_cached[1] < 200


def test_sliding_windows_are_never_shared_by_running_requests() -> None:
    run = play([Ask(0, (1,) * 50, 20), Ask(10, (1,) * 50, 5)], rules=WINDOW)
    assert run.n_cached == {0: 0, 1: 0}


def test_scored_prompts_reuse_nothing_and_are_reused() -> None:
    prompt = (*range(50),)
    run = play([Ask(0, prompt, 1), Ask(10, prompt, 3, scored=True), Ask(40, prompt, 1)])
    assert run.n_cached == {0: 0, 1: 0, 2: 49}
    assert run.n_scored == {1: 49}


def test_scored_chunks_leave_an_output_to_everyone_else() -> None:
    scheduler, _ = fake_scheduler(n_cells=1000, n_slots=6, n_batch=64)
    scheduler.add(1, np.full(64, 5), 10)
    for n in (2, 3):
        scheduler.add(n, np.arange(100) + n, 50, n_to_score=49)
    chunks = scheduler.plan(64).chunks
    assert [(c.id, c.count, c.last, c.scored) for c in chunks] == [
        (1, 10, True, False),
        (2, 2, False, True),
        (3, 2, False, True),
    ]


def test_a_preempted_prompt_goes_on_where_its_scores_end() -> None:
    scheduler, _ = fake_scheduler(n_cells=64, n_slots=2, n_batch=64)
    scheduler.add(1, np.full(64, 5), 4)
    scheduler.add(2, np.arange(64), 40, n_to_score=39)
    n_done = 0
    while not (batch := scheduler.plan(64)).preempted:
        scheduler.commit(batch)
        n_done = max(n_done, *(c.start + c.count for c in batch.chunks if c.id == 2))
        scheduler.grow(1)
    assert 16 < n_done < 39
    scheduler.commit(batch)
    scheduler.remove(1)
    again = scheduler.plan(64)
    assert [(c.id, c.start, c.scored) for c in again.chunks] == [(2, n_done, True)]


def test_salts_part_what_would_be_shared() -> None:
    prompt = (1,) * 50
    run = play([Ask(0, prompt, 5), Ask(20, prompt, 5, salt="a"), Ask(40, prompt, 5, salt="a")])
    assert run.n_cached == {0: 0, 1: 0, 2: 49}


def test_a_preempted_request_comes_back_to_its_cells() -> None:
    """Both grow beyond the cells; the younger one's are still there when the older one ends."""
    run = play([Ask(0, (1,) * 10, 22), Ask(0, (2,) * 10, 40)], n_cells=64)
    assert run.ended == {0: 1, 1: 1}
    assert run.n_prefilled < 10 + 10 + 33


def test_a_short_prompt_passes_a_long_one() -> None:
    scheduler, _ = fake_scheduler(n_cells=10_000, n_slots=4, n_batch=64)
    scheduler.add(1, np.full(6400, 5), 6400)
    scheduler.commit(scheduler.plan(64))
    scheduler.add(2, np.full(32, 6), 32)
    batch = scheduler.plan(64)
    assert [(chunk.id, chunk.count, chunk.last) for chunk in batch.chunks] == [
        (1, 32, False),
        (2, 32, True),
    ]


def test_the_youngest_is_preempted_and_decoded_again_from_where_its_cells_end() -> None:
    scheduler, _ = fake_scheduler(n_cells=64, n_slots=2, n_batch=64)
    scheduler.add(1, np.full(64, 5), 10)
    scheduler.add(2, np.full(64, 6), 10)
    while not (batch := scheduler.plan(64)).preempted:
        scheduler.commit(batch)
        for chunk in batch.chunks:
            scheduler.grow(chunk.id)
    assert batch.preempted == (2,)
    assert [chunk.id for chunk in batch.chunks] == [1]
    scheduler.commit(batch)
    scheduler.remove(1, broken=True)
    again = scheduler.plan(64)
    assert again.admitted == (2,)
    assert [(chunk.start, chunk.count, chunk.last) for chunk in again.chunks] == [(31, 2, True)]


def test_refuses_what_can_never_fit() -> None:
    scheduler, _ = fake_scheduler(n_cells=64, n_slots=2, n_batch=64)
    for n_tokens in (0, 65):
        with pytest.raises(ValueError, match="do not fit"):
            scheduler.add(1, np.zeros(65), n_tokens)


def test_those_that_wait_for_their_first_token_are_counted_as_far_as_there_are_places() -> None:
    scheduler, _ = fake_scheduler(n_cells=512, n_slots=3, n_batch=64)
    assert scheduler.n_unanswered == 0
    for request in range(5):
        scheduler.add(request, np.full(64, request), 8)
    assert scheduler.n_unanswered == 3
    batch = scheduler.plan(64)
    scheduler.commit(batch)
    scheduler.grow(0)
    assert (scheduler.n_decoding, scheduler.n_unanswered) == (1, 2)
    scheduler.remove(0)
    assert scheduler.n_unanswered == 3


def test_a_step_gets_the_rows_that_make_it_quicker_where_there_are_cells_for_them() -> None:
    scheduler, memory = fake_scheduler(n_cells=40, n_slots=3, n_batch=8, rows={2: 4})
    known = {request: [request] * 5 for request in range(2)}
    for request, tokens in known.items():
        scheduler.add(request, np.full(24, tokens[0]), 5)
    steps = []
    for _ in range(17):
        n_free = scheduler.cache.n_free
        batch = scheduler.plan(64)
        assert memory.decode(batch, known)
        repeats = scheduler.may_repeat(len(batch.chunks), batch.n_pad)
        scheduler.commit(batch)
        for chunk in batch.chunks:
            if chunk.last:
                known[chunk.id].append(chunk.id)
                scheduler.grow(chunk.id)
        steps.append((n_free, batch.n_prefill, batch.n_pad, repeats))
    assert steps[:3] == [(40, 8, 0, False), (32, 2, 0, False), (30, 0, 2, True)]
    assert steps[-4:] == [(8, 0, 2, True), (6, 0, 2, True), (4, 0, 2, False), (2, 0, 0, False)]


def test_drafts_are_filled_up_as_measured_on_a_cpu_alone() -> None:
    for learns in (False, True):
        scheduler, memory = fake_scheduler(
            400, n_slots=4, n_batch=64, n_draft=8, rows={5: 6}, learns=learns
        )
        known = {request: [request] * 5 for request in range(4)}
        for request, tokens in known.items():
            scheduler.add(request, np.full(60, tokens[0]), 5)
        rows = []
        for _ in range(40):
            batch = scheduler.plan(64, {0: (8,)})
            assert memory.decode(batch, known)
            scheduler.commit(batch)
            for chunk in batch.chunks:
                if chunk.draft:
                    scheduler.settle(chunk, 0)
                if chunk.last:
                    known[chunk.id].append(chunk.id)
                    scheduler.grow(chunk.id)
            memory.change(scheduler.cache.take_operations())
            if not batch.n_prefill:
                n_rows = batch.n_tokens + batch.n_pad
                scheduler.rows.observe(batch.n_tokens, n_rows, {5: 0.09, 6: 0.08, 8: 0.06}[n_rows])
                rows.append(n_rows)
        assert set(rows[-20:]) == {8 if learns else 5}


@pytest.mark.parametrize(
    ("learns", "drafts", "prompts", "n_kept"),
    [
        (True, (4, 2), (9,), (3, 2)),  # 2 + 6 + the prompt's: one over
        (True, (4, 3), (40,), (4, 3)),  # it does not end: outputs of its tokens fill up
        (True, (3, 2), (9,), (3, 2)),  # 2 + 5 + 1 are whole
        (True, (3, 3), (9,), (2, 3)),
        (True, (1, 2), (9,), (0, 1)),
        (True, (1, 1), (9,), (0, 1)),
        (True, (1, 0), (9,), (1, 0)),  # four
        (True, (2, 0), (4, 5), (0, 0)),  # 2 + 2 + 2: all that is drafted
        (True, (1, 0), (4, 5, 6), (1, 0)),  # 2 + 1 + 3: two over, and one drafted
        (True, (4, 3), (4, 5), (2, 2)),  # 2 + 7 + 2: three over
        (True, (4, 3), (5, 40), (4, 3)),  # the last one does not end
        (False, (4, 2), (9,), (4, 2)),
    ],
)
def test_where_prompts_end_drafts_make_the_outputs_whole_on_a_cpu(
    learns: bool, drafts: tuple[int, int], prompts: tuple[int, ...], n_kept: tuple[int, int]
) -> None:
    """What is left over takes longer than the tokens are worth."""
    scheduler, _ = fake_scheduler(400, n_slots=8, n_batch=64, n_draft=8, learns=learns)
    for request in range(2):
        scheduler.add(request, np.full(60, request), 5)
    scheduler.commit(scheduler.plan(64))
    for request in range(2):
        scheduler.grow(request)
    for request, n_tokens in enumerate(prompts, 2):
        scheduler.add(request, np.full(60, request), n_tokens)
    proposed = {request: tuple(range(n)) for request, n in enumerate(drafts) if n}
    batch = scheduler.plan(16, proposed)
    kept = [chunk.draft for chunk in batch.chunks[:2]]
    assert tuple(map(len, kept)) == n_kept
    for request, draft in enumerate(kept):
        assert draft == proposed.get(request, ())[: len(draft)]
    assert batch.n_prefill == min(sum(prompts), 16)
    n_outputs = sum(chunk.n_outputs for chunk in batch.chunks) + batch.n_idle
    assert not learns or drafts == (1, 0) or n_outputs % 4 == 0
    scheduler.commit(batch)


def test_outputs_that_are_scored_are_counted_where_drafts_make_them_whole() -> None:
    scheduler, _ = fake_scheduler(400, n_slots=8, n_batch=64, n_draft=8, learns=True)
    scheduler.add(0, np.full(60, 0), 5)
    scheduler.commit(scheduler.plan(64))
    scheduler.grow(0)
    scheduler.add(1, np.full(60, 1), 3, n_to_score=3)
    batch = scheduler.plan(16, {0: (1, 2, 3)})
    assert [chunk.n_outputs for chunk in batch.chunks] == [1, 3]


@pytest.mark.parametrize(
    ("n_window", "n_ubatch", "expected"), [(None, 3, 1), (16, 4, 1), (16, 3, 0)]
)
def test_with_a_window_rows_more_are_in_the_same_micro_batch(
    n_window: int | None, n_ubatch: int, expected: int
) -> None:
    """Those of another one would overwrite cells that the first one's still look back to."""
    rules = Rules(n_window, recurrent=False, shares=n_window is None, n_spare=0)
    scheduler, _ = fake_scheduler(200, n_slots=3, n_batch=8, rules=rules, rows={3: 4})
    scheduler.n_ubatch = n_ubatch
    for request in range(3):
        scheduler.add(request, np.full(20, request), 2)
    scheduler.commit(scheduler.plan(8))
    for request in range(3):
        scheduler.grow(request)
    assert scheduler.plan(8).n_pad == expected


@pytest.mark.parametrize("n_slots", [60, 61, 63, 64])
def test_rows_are_learned_beside_a_tile_of_attention_too(n_slots: int) -> None:
    """What a plan would refuse is not wanted for ever, and steps are repeated."""
    scheduler, memory = fake_scheduler(8000, n_slots, n_batch=128, n_draft=8, learns=True)
    known = {request: [request] for request in range(n_slots)}
    for request in known:
        scheduler.add(request, np.full(60, request), 1)
    repeats = []
    for _ in range(30):
        batch = scheduler.plan(128)
        assert memory.decode(batch, known)
        repeats.append(scheduler.may_repeat(len(batch.chunks), batch.n_pad))
        scheduler.commit(batch)
        for chunk in batch.chunks:
            known[chunk.id].append(chunk.id)
            scheduler.grow(chunk.id)
        n_rows = batch.n_tokens + batch.n_pad
        assert n_slots == 64 or n_rows < 64
        if not batch.n_prefill:
            scheduler.rows.observe(n_slots, n_rows, n_rows**-3)
    assert all(repeats[1:])
    assert n_rows == {60: 60, 61: 62, 63: 63, 64: 64}[n_slots]


def test_steps_get_no_rows_more_where_attention_would_read_many_cells_again() -> None:
    scheduler, memory = fake_scheduler(n_cells=20_000, n_slots=2, n_batch=5000, rows={2: 3})
    known = {request: [request] * 4094 for request in range(2)}
    for request, tokens in known.items():
        scheduler.add(request, np.full(4200, tokens[0]), len(tokens))
    steps = []
    for _ in range(8):
        batch = scheduler.plan(5000)
        assert memory.decode(batch, known)
        steps.append((scheduler.cache.n_used, batch.n_pad, scheduler.may_repeat(2, batch.n_pad)))
        scheduler.commit(batch)
        for chunk in batch.chunks:
            if chunk.last:
                known[chunk.id].append(chunk.id)
                scheduler.grow(chunk.id)
    assert steps[2:] == [
        (8188, 1, True),
        (8190, 1, True),
        (8192, 1, False),
        (8194, 0, True),
        (8196, 0, True),
        (8198, 0, True),
    ]


def test_prompt_tokens_are_counted_that_a_step_could_read() -> None:
    scheduler, _ = fake_scheduler(n_cells=512, n_slots=3, n_batch=64)
    for request in range(5):
        scheduler.add(request, np.full(64, request), 8 + request)
    assert scheduler.n_unread == 8 + 9 + 10
    scheduler.commit(scheduler.plan(12))
    assert scheduler.n_unread == 8 + 9 + 10 - 12
    scheduler.commit(scheduler.plan(64))
    for request in range(3):
        scheduler.grow(request)
    assert scheduler.n_unread == 0
    scheduler.remove(1)
    assert scheduler.n_unread == 11


class Crowded:
    """2,000 cells, of which a kept conversation has 1,500. Request 1 is a stream, request 2 a long
    prompt."""

    def __init__(self) -> None:
        self.scheduler, self.memory = fake_scheduler(2000, 4, 512, stores=True, n_draft=8)
        self.texts = [np.arange(5000 * n, 5000 * n + 1900, dtype=np.int32) for n in range(3)]
        self.known = {n: text.tolist() for n, text in enumerate(self.texts)}
        self.n_drafted = 0
        self.scheduler.add(0, self.texts[0], 1500)
        while not self.scheduler.n_decoding:
            self.step(512)
        self.scheduler.remove(0)
        self.scheduler.add(1, self.texts[1], 20)
        self.step(512)

    def arrive(self, n_tokens: int = 800) -> None:
        self.scheduler.add(2, self.texts[2], n_tokens)

    def step(self, n_prefill: int, n_stored: int = 0) -> Batch:
        drafts = {1: (9,) * self.n_drafted}
        batch = self.scheduler.plan(n_prefill, drafts, n_stored)
        assert self.memory.decode(batch, self.known)
        self.scheduler.commit(batch)
        for chunk in batch.chunks:
            if chunk.draft:
                self.scheduler.settle(chunk, 0)
            if chunk.last:
                self.scheduler.grow(chunk.id)
        self.memory.change(self.scheduler.cache.take_operations())
        return batch


def n_copied(batch: Batch) -> int:
    stores = [one for one in batch.operations if isinstance(one, Store)]
    return sum(len(one.tokens) - one.n_left for one in stores)


@pytest.mark.parametrize("n_stored", [0, 10, 16, 100])
def test_a_step_beside_streams_copies_or_reads(n_stored: int) -> None:
    house = Crowded()
    house.arrive()
    copied, n_read = [], 0
    while n_read < 800:
        n_free, batch = house.scheduler.cache.n_free, house.step(20, n_stored)
        if n_copied(batch):
            assert (batch.n_prefill, batch.n_tokens) == (0, 1), "the stream alone"
            copied.append(n_copied(batch))
        else:
            assert n_free >= batch.n_tokens > 1
        n_read += batch.n_prefill
    # As many as are wanted, up to a 64th of all cells, and a token of the prompt at least.
    each = max(min(n_stored, 2000 // 64), 2)
    assert max(copied) <= each + 1
    assert len(copied) <= 350 // max(each - 2, 1)


@pytest.mark.parametrize("n_drafted", [0, 5])
@pytest.mark.parametrize("n_stored", [16, 30])
def test_so_it_is_when_the_next_step_may_read_more(n_stored: int, n_drafted: int) -> None:
    house = Crowded()
    house.arrive()
    house.n_drafted = n_drafted
    limit, n_read, n_steps = 20, 0, 0
    while n_read < 800:
        limit = 20 + 7 * (limit + 1) % 60
        batch = house.step(limit, n_stored)
        assert not (n_copied(batch) and batch.n_prefill)
        assert n_copied(batch) <= n_stored + 1 + n_drafted
        n_read, n_steps = n_read + batch.n_prefill, n_steps + 1
    assert n_steps < 800 / 8


def test_a_step_that_only_streams_need_does_not_let_the_next_one_copy_and_read() -> None:
    house = Crowded()
    while not n_copied(house.step(20, 16)):
        pass
    while house.scheduler.cache.n_free:
        house.step(20, 16)
    assert n_copied(house.step(20, 1))
    house.arrive()
    batch = house.step(20, 16)
    assert n_copied(batch)
    assert not batch.n_prefill


def test_many_prompts_that_may_all_be_read_make_no_copy_longer() -> None:
    house = Crowded()
    house.arrive()
    while not n_copied(batch := house.step(400, 30)):
        pass
    assert n_copied(batch) <= 31


def test_what_is_stored_for_an_id_is_a_copy_too() -> None:
    """All ids are taken: an admission pushes a whole conversation out."""
    scheduler, memory = fake_scheduler(4000, 2, 64, Rules(), stores=True)
    texts = [np.arange(5000 * n, 5000 * n + 300, dtype=np.int32) for n in range(4)]
    known = {n: text.tolist() for n, text in enumerate(texts)}

    def step() -> Batch:
        batch = scheduler.plan(50, None, 16)
        assert memory.decode(batch, known)
        scheduler.commit(batch)
        for chunk in batch.chunks:
            if chunk.last:
                scheduler.grow(chunk.id)
        return batch

    scheduler.add(0, texts[0], 200)
    while not scheduler.n_decoding:
        step()
    scheduler.remove(0)
    scheduler.add(1, texts[1], 20)
    step()
    scheduler.add(2, texts[2], 200)
    batch = step()
    assert (n_copied(batch), batch.n_prefill, batch.n_tokens) == (200, 0, 1)
    assert [step().n_prefill for _ in range(4)] == [50] * 4


def test_where_no_stream_waits_a_step_copies_and_reads() -> None:
    scheduler, memory = fake_scheduler(1000, 4, 64, stores=True)
    for n in range(2):
        text = np.arange(1000 * n, 1000 * n + 900, dtype=np.int32)
        scheduler.add(n, text, 700)
        while not scheduler.n_decoding:
            batch = scheduler.plan(40, None, 100)
            assert batch.n_prefill
            assert memory.decode(batch, {n: text.tolist()})
            scheduler.commit(batch)
            if batch.chunks[0].last:
                scheduler.grow(n)
        scheduler.remove(n)
    assert len(memory.stored) > 1


def test_a_batch_that_goes_on_keeps_its_rows() -> None:
    chunks = (Chunk(1, 0, 7, 1, last=True), Chunk(2, 1, 3, 1, last=True))
    assert Batch(chunks, n_prefill=0, n_pad=2).advanced() == Batch(
        (Chunk(1, 0, 8, 1, last=True), Chunk(2, 1, 4, 1, last=True)), n_pad=2
    )
