"""Shortlists hold what the whole row would have given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker.shortlist import BLOCK, NEVER, above, largest, most, nucleus, typical

SIZES = st.sampled_from((1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 8 * BLOCK, 9 * BLOCK + 17))


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Rows as models leave them, some with many ties, some with most tokens ruled out."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    row = random.normal(0, draw(st.sampled_from((0.0, 0.5, 3.0, 12.0))), draw(SIZES))
    if draw(st.booleans()):
        row = np.round(row)
    row = row.astype(np.float32)
    n_ruled_out = draw(st.sampled_from((0, len(row) // 2, len(row) - 1)))
    ruled_out = random.choice(len(row), n_ruled_out, replace=False)
    row[ruled_out] = draw(st.sampled_from((NEVER, -np.inf)))
    return row


def probabilities(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row.astype(np.float64) - row.max())
    return weights / weights.sum()


@given(rows(), st.integers(1, 12 * BLOCK))
@settings(deadline=None, max_examples=200)
def test_the_largest_are_there(row: np.ndarray, n: int) -> None:
    ids = largest(row, n)
    assert len(set(ids.tolist())) == len(ids)
    allowed = np.sort(row[row > NEVER])[::-1]
    least = allowed[min(n, len(allowed)) - 1]
    assert set(np.flatnonzero(row >= least)) <= set(ids)
    assert (row[ids] > NEVER).all()


@given(rows(), st.floats(-40, 40, width=32))
@settings(deadline=None, max_examples=200)
def test_all_above_and_never_none(row: np.ndarray, least: float) -> None:
    expected = np.flatnonzero((row >= np.float32(least)) & (row > NEVER))
    found = above(row, least)
    assert sorted(found) == (expected.tolist() or [row.argmax()])


@given(rows(), st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=200)
def test_a_nucleus_is_the_head_of_a_sort(row: np.ndarray, top_p: float) -> None:
    ids = nucleus(row, top_p)
    share = probabilities(row)
    held = share[ids].sum()
    assert len(set(ids.tolist())) == len(ids) > 0
    assert held >= top_p - 1e-5
    assert held - share[ids].min() <= top_p + 1e-5
    left = np.delete(share, ids)
    assert left.max(initial=0.0) <= share[ids].min() * (1 + 1e-5)


@given(rows(), st.floats(0.01, 1, exclude_max=True))
@settings(deadline=None, max_examples=200)
def test_typical_tokens_are_the_head_of_a_sort(row: np.ndarray, typical_p: float) -> None:
    ids = typical(row, typical_p)
    share = probabilities(row)
    held = share > 0
    surprise = np.full(len(row), np.inf)
    surprise[held] = -np.log(share[held])
    distance = np.abs(surprise - (share[held] * surprise[held]).sum())
    assert len(set(ids.tolist())) == len(ids) > 0
    assert share[ids].sum() >= typical_p - 1e-4
    assert np.delete(distance, ids).min(initial=np.inf) >= distance[ids].max() - 1e-3


def test_where_all_is_banned_the_least_bad_remains() -> None:
    """A grammar may leave only an end token that `min_tokens` bans."""
    row = np.full(4 * BLOCK, -np.inf, dtype=np.float32)
    row[700] = NEVER
    for ids in (largest(row, 40), above(row, -50.0), nucleus(row, 0.9), typical(row, 0.9)):
        assert ids.tolist() == [700]


@pytest.mark.parametrize("n_vocab", [1, BLOCK, 262_144])
def test_how_many_can_be_asked_for(n_vocab: int) -> None:
    row = np.random.default_rng(1).normal(size=n_vocab).astype(np.float32)
    n = most(n_vocab)
    ids = largest(row, n)
    assert set(np.argsort(-row)[:n]) <= set(ids)
    assert len(ids) <= 4 * n
