"""The figures of an evaluation: what must hold for any data, and cases worked out by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import parse_pair
from kvserve.core.loss import TextLoss
from kvserve.eval.statistics import (
    compare_tasks,
    mcnemar,
    standard_error,
    summarize,
    text_losses,
    upper_tail,
)
from kvserve.ipc.evaluating import Scored

Q8 = parse_pair("q8_0")
log_probs = st.floats(-20.0, 0.0)
positions = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.booleans(), log_probs, log_probs), min_size=1, max_size=60
)


def row(data: list[tuple[float, bool, float, float]]) -> TextLoss:
    klds, same, before, after = zip(*data, strict=True)
    return summarize(Q8, "prefill", 64, klds=klds, same_top=same, reference=before, candidate=after)


@given(positions)
def test_figures_keep_their_order_and_bounds(data: list[tuple[float, bool, float, float]]) -> None:
    found = row(data)
    assert found.n_positions == len(data)
    assert 0 <= found.median_kld <= found.p99_kld + 1e-12 <= found.p999_kld + 2e-12
    assert 0 <= found.mean_kld <= max(kld for kld, *_ in data) + 1e-9
    assert 0 <= found.same_top <= 1
    assert found.ppl_ratio_low <= found.ppl_ratio * (1 + 1e-9)
    assert found.ppl_ratio <= found.ppl_ratio_high * (1 + 1e-9)
    assert abs(found.mean_delta_p) <= found.rms_delta_p + 1e-12


@given(positions)
def test_the_ppl_ratio_is_that_of_the_perplexities(
    data: list[tuple[float, bool, float, float]],
) -> None:
    found = row(data)
    after = math.exp(-math.fsum(lp for *_, lp in data) / len(data))
    assert found.ppl_ratio * found.ppl_reference == pytest.approx(after, rel=1e-9)


def test_delta_p_is_in_probabilities() -> None:
    found = row([(0.1, True, math.log(0.5), math.log(0.25)), (0.1, True, math.log(0.5), 0.0)])
    assert found.mean_delta_p == pytest.approx(0.125)
    assert found.rms_delta_p == pytest.approx(math.sqrt((0.0625 + 0.25) / 2))


def test_one_position_has_no_error() -> None:
    import numpy as np

    assert standard_error(np.array([3.0])) == 0
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)


def scored(unit: str, kld: float, mode: str = "prefill") -> Scored:
    return Scored(unit, "q8_0:q8_0", mode, 64, (kld,), (True,), (-1.0,), (-1.0,))


def test_pieces_are_pooled_by_mode_whatever_their_order() -> None:
    answers = [scored("b", 3.0), scored("a", 1.0), scored("a", 7.0, "decode")]
    there, back = text_losses(answers), text_losses(answers[::-1])
    assert there == back
    assert [(r.mode, r.n_positions, r.mean_kld) for r in there] == [
        ("decode", 1, 7.0),
        ("prefill", 2, 2.0),
    ]


@pytest.mark.parametrize(
    ("n_lost", "n_won", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 0.03857421875)],
)
def test_mcnemar_by_hand(n_lost: int, n_won: int, p: float) -> None:
    assert mcnemar(n_lost, n_won) == pytest.approx(p)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_has_no_preference_and_is_a_probability(n_lost: int, n_won: int) -> None:
    assert mcnemar(n_lost, n_won) == mcnemar(n_won, n_lost)
    assert 0 < mcnemar(n_lost, n_won) <= 1


@given(st.integers(1, 50), st.floats(0.0, 1.0))
def test_upper_tail_falls_from_one(n: int, p: float) -> None:
    tail = [upper_tail(k, n, p) for k in range(n + 2)]
    assert tail[0] == pytest.approx(1.0)
    assert tail[-1] == 0
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(tail))


def test_a_reference_at_chance_measures_nothing() -> None:
    coin = [True, False] * 10
    assert not compare_tasks("t", Q8, coin, coin, chance=0.5).measurable
    assert compare_tasks("t", Q8, [True] * 10, coin[:10], chance=0.5).measurable


def test_items_are_paired() -> None:
    found = compare_tasks("t", Q8, [True, True, False], [False, True, True], chance=0.0)
    assert (found.n_lost, found.n_won, found.n_reference, found.n_candidate) == (1, 1, 2, 2)
