"""What is proposed, and when it is left: the policy against scripted sequences and costs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker.speculation.acceptance import Acceptance
from kvserve.worker.speculation.allotment import allot
from kvserve.worker.speculation.ledger import SHARE, Ledger
from kvserve.worker.speculation.proposal import Ask, Proposal
from kvserve.worker.speculation.speculator import Outcome, Speculator
from kvserve.worker.speculation.step_costs import StepCosts

rates = st.lists(st.lists(st.floats(0, 1), max_size=4), min_size=1, max_size=3)
costs = st.lists(st.floats(0, 0.5), min_size=0, max_size=8)


@given(rates, costs, st.sampled_from((1, 2, 4)))
@settings(deadline=None)
def test_an_allotment_is_the_fastest_of_all(
    rows: list[list[float]], more: list[float], n_together: int
) -> None:
    seconds = [1.0]
    for one in more:
        seconds.append(seconds[-1] + one)
    counts = allot(rows, seconds, lambda n: n + -n % n_together)
    assert sum(counts) < len(seconds)

    def speed(chosen: Sequence[int]) -> float:
        gain = sum(
            np.prod(row[:n]) for row, k in zip(rows, chosen, strict=True) for n in range(1, k + 1)
        )
        n = sum(chosen)
        while n and (len(rows) + n) % n_together:
            n += 1  # the batch is filled up
        return (len(rows) + gain) / seconds[min(n, len(seconds) - 1)]

    every = product(*(range(len(row) + 1) for row in rows))
    best = max(speed(chosen) for chosen in every if sum(chosen) < len(seconds))
    if sum(counts):
        assert speed(counts) == pytest.approx(best)
        assert best > 1.04 * len(rows)
    else:
        assert best <= 1.0401 * len(rows)


def test_acceptance_begins_with_the_prior_and_follows_what_happens() -> None:
    overall = Acceptance((0.3, 0.4, 0.5, 0.6, 0.7, 0.8), memory=0.99)
    one, other = Acceptance(overall, memory=0.9), Acceptance(overall, memory=0.9)
    assert one.rate(2) == 0.5
    for _ in range(50):
        one.observe(2, accepted=True)
    assert one.rate(2) > 0.9
    assert other.rate(2) == 0.5  # what others do well proves nothing
    for _ in range(50):
        one.observe(2, accepted=False)
    assert one.rate(2) < 0.15
    assert other.rate(2) < 0.5
    assert one.rate(3) == 0.6


def test_costs_lie_on_lines_and_never_fall() -> None:
    known = StepCosts()
    assert known.lacks(1)
    for width, seconds in ((1, 1.0), (5, 3.0), (9, 2.5)):
        known.observe(width, seconds, plain=width == 1)
    curve = known.curve(1, 11)
    assert curve[:5] == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert curve[4:9] == [3.0] * 5
    assert 3.0 < curve[10] < 3.2
    assert not known.lacks(1)


def test_one_bad_measurement_is_not_believed_for_long() -> None:
    known = StepCosts()
    known.observe(1, 1.0)
    known.observe(5, 100.0, plain=False)
    for _ in range(60):
        known.observe(1, 1.0)
    assert known.curve(1, 5)[4] < 2
    known.observe(5, 1.5, plain=False)
    assert known.curve(1, 5)[4] == 1.5


def test_what_slows_all_steps_down_changes_no_ratio() -> None:
    known = StepCosts()
    for n in range(200):
        slowness = 1 + 3 * n / 200
        known.observe(1, slowness)
        if n < 5:
            known.observe(5, 3 * slowness, plain=False)
    one, *_, five = known.curve(1, 5)
    assert one == pytest.approx(4, rel=0.05)
    assert five == pytest.approx(3 * one, rel=0.1)


@given(st.lists(st.floats(-5, 5)))
def test_what_a_ledger_owes_is_bounded_and_paid_back(losses: list[float]) -> None:
    ledger = Ledger()
    for loss in losses:
        ledger.observe(1.0, loss)
        assert -5 <= ledger.balance_seconds <= 14
    for _ in range(round(5 / SHARE) + 1):
        ledger.observe(1.0, 0.0)
    assert ledger.solvent


@dataclass
class Oracle:
    """Knows how each sequence goes on, and is wrong in `wrong` of all tokens."""

    wrong: float
    batched: bool = False
    random: Random = field(default_factory=lambda: Random(5))

    def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        return [self._one(ask) for ask in asks]

    def forget(self, request: int) -> None: ...

    def _one(self, ask: Ask) -> Proposal:
        real = ask.tokens[ask.n_tokens : ask.n_tokens + ask.n_most].tolist()
        tokens = [t if self.random.random() >= self.wrong else -1 for t in real]
        return Proposal(tuple(tokens), (3,) * len(tokens))


@dataclass
class World:
    """Sequences that are decoded with a speculator, on a machine with known costs."""

    wrong: float
    cost: Callable[[int], float]
    n_sequences: int = 1
    look_seconds: float = 0.0
    now: float = 0.0
    n_drafted: int = 0

    def __post_init__(self) -> None:
        world = self

        class Slow(Oracle):
            def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
                world.now += world.look_seconds
                return super().propose(asks)

        self.proposer = Slow(self.wrong)
        self.speculator = Speculator(self.proposer, 8, 16, clock=lambda: self.now)
        self.texts = [np.arange(100_000, dtype=np.int32) for _ in range(self.n_sequences)]
        self.at = [0] * self.n_sequences

    def run(self, n_steps: int) -> float:
        """Tokens a second."""
        begun, before = self.now, sum(self.at)
        for _ in range(n_steps):
            asks = [Ask(i, self.texts[i], at, 8) for i, at in enumerate(self.at)]
            drafts = self.speculator.propose(asks)
            assert sum(map(len, drafts.values())) <= 16
            assert all(1 <= len(draft) <= 8 for draft in drafts.values())
            outcomes = {}
            for i, at in enumerate(self.at):
                draft, drawn = drafts.get(i, ()), []
                for drafted in (*draft, None):
                    drawn.append(int(self.texts[i][at + len(drawn)]))
                    if drawn[-1] != drafted:
                        break
                self.at[i] += len(drawn)
                outcomes[i] = Outcome(drawn, len(draft))
                self.n_drafted += len(draft)
            n_tokens = len(asks) + sum(map(len, drafts.values()))
            seconds = self.cost(n_tokens)
            self.now += seconds
            self.speculator.observe(outcomes, seconds, 0)
        return (sum(self.at) - before) / (self.now - begun)


def gpu(n_tokens: int) -> float:
    return 0.004 + 0.0001 * n_tokens


def cpu(n_tokens: int) -> float:
    return 0.02 * n_tokens


def stairs(n_tokens: int) -> float:
    """As seen on a CPU: up to 5 tokens each costs as much as the first, then they get cheap."""
    return 0.02 * min(n_tokens, 5) + 0.007 * max(n_tokens - 5, 0)


@pytest.mark.parametrize("n_sequences", [1, 8])
@pytest.mark.parametrize("cost", [gpu, cpu, stairs])
@pytest.mark.parametrize("wrong", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_never_much_slower_and_fast_where_it_pays(
    wrong: float, cost: Callable[[int], float], n_sequences: int
) -> None:
    world = World(wrong, cost, n_sequences, look_seconds=1e-5)
    world.run(200)
    plain = n_sequences / cost(n_sequences)
    assert world.run(1000) >= 0.985 * plain
    if wrong == 0.0 and n_sequences == 1:
        gain = world.run(500) / plain
        assert gain > {gpu: 6.0, cpu: 0.98, stairs: 1.35}[cost]


@pytest.mark.parametrize("n_sequences", [1, 3, 6])
def test_drafts_make_whole_groups_of_rows(n_sequences: int) -> None:
    """Where nine rows take longer than twelve."""
    world = World(0.1, lambda n: 0.02 + 0.005 * n + 0.02 * (n % 4 > 0), n_sequences)
    world.speculator = Speculator(
        world.proposer, 8, 16, clock=lambda: world.now, whole=lambda n: n + -n % 4
    )
    world.run(300)
    widths = []
    observe = world.speculator._costs.observe

    def observing(width: int, seconds: float, *, plain: bool) -> None:
        if not plain:
            widths.append(width)
        observe(width, seconds, plain=plain)

    world.speculator._costs.observe = observing
    world.run(100)
    assert len(widths) > 50
    assert sum(width % 4 == 0 for width in widths) > 0.95 * len(widths)


def test_padding_belongs_to_the_width_of_a_step_with_drafts() -> None:
    speculator = Speculator(Oracle(0.0), 8, 16)
    speculator.observe({1: Outcome([5], 0)}, 1.0, 0, 3)
    assert not speculator._costs.lacks(1), "a plain step is one of its sequences"
    speculator.observe({1: Outcome([5, 6], 1)}, 1.5, 0, 2)
    assert speculator._costs.curve(1, 4) == [1.0, pytest.approx(7 / 6), pytest.approx(8 / 6), 1.5]


@pytest.mark.parametrize(("look_seconds", "least"), [(0.001, 3.0), (0.004, 1.5), (0.05, 0.98)])
def test_a_draft_model_is_used_as_far_as_its_time_pays(look_seconds: float, least: float) -> None:
    world = World(0.05, gpu, look_seconds=look_seconds)
    world.proposer.batched = True
    world.run(300)
    assert world.run(1000) * gpu(1) > least


def test_a_proposer_that_costs_much_is_seldom_asked_where_it_is_wrong() -> None:
    world = World(1.0, gpu, look_seconds=0.004)
    assert world.run(2000) >= 0.98 / gpu(1)


def test_it_begins_again_when_the_text_changes() -> None:
    world = World(1.0, gpu)
    world.run(500)
    before = world.n_drafted
    world.run(100)
    assert world.n_drafted - before < 20
    world.proposer.wrong = 0.0
    world.run(100)
    assert world.run(100) > 5 / gpu(1)


def test_a_machine_that_was_held_up_once_is_tried_again() -> None:
    world = World(0.0, lambda n: 1.0 if n > 1 else 0.0041)
    world.run(30)
    world.cost = gpu
    world.run(400)
    assert world.run(100) > 5 / gpu(1)
