"""Divergences of logits, against the formula in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvserve.worker.divergences import compare, log_probs

N_VOCAB = 97
seeds = st.integers(0, 2**32 - 1)
spreads = st.floats(0.1, 30.0)


def logits(seed: int, spread: float) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(N_VOCAB) * spread).astype(np.float32)


def exact(row: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = row.astype(np.float64)
    return wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())


@given(seeds, spreads, st.floats(-50.0, 50.0))
def test_log_probs_do_not_mind_a_shift(seed: int, spread: float, shift: float) -> None:
    row = logits(seed, spread)
    assert log_probs(row) == pytest.approx(exact(row), abs=2e-5)
    assert log_probs(row + np.float32(shift)) == pytest.approx(exact(row), abs=1e-4)


@given(seeds, seeds, spreads)
def test_kld_is_that_of_the_formula(one: int, other: int, spread: float) -> None:
    before, after = logits(one, spread), logits(other, spread)
    p = exact(before)
    wanted = float((np.exp(p) * (p - exact(after))).sum())
    tally = compare([log_probs(before)], [after], [5])
    assert tally.klds[0] == pytest.approx(wanted, rel=1e-4, abs=1e-5)
    assert tally.reference[0] == pytest.approx(p[5], abs=2e-5)
    assert tally.candidate[0] == pytest.approx(exact(after)[5], abs=2e-5)
    assert tally.same_top[0] == (before.argmax() == after.argmax())


def test_tokens_that_cannot_come_count_for_nothing() -> None:
    row = logits(1, 3.0)
    row[7] = -np.inf
    tally = compare([log_probs(row)] * 2, [row, row * np.float32(1.01)], [3, 3])
    assert tally.klds[0] == 0
    assert 0 < tally.klds[1] < 0.01


def test_a_token_that_the_candidate_rules_out_costs_without_end() -> None:
    row = logits(2, 3.0)
    barred = row.copy()
    barred[row.argmax()] = -np.inf
    assert compare([log_probs(row)], [barred], [0]).klds[0] == np.inf


def test_lengths_must_agree() -> None:
    row = logits(3, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        compare([log_probs(row)] * 2, [row], [0, 1])
