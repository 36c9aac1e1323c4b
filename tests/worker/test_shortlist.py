"""Shortlists hold what the whole row would have given."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker.shortlist import (
    BLOCK,
    NEVER,
    above,
    largest,
    nucleus,
    typical,
    without_top_choices,
)

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
def test_the_largest_are_the_head_of_a_sort(row: np.ndarray, n: int) -> None:
    order = np.argsort(-row, kind="stable")
    expected = [token for token in order[:n].tolist() if row[token] > NEVER]
    assert largest(row, n).tolist() == sorted(expected)


@given(rows(), st.floats(-40, 40, width=32))
@settings(deadline=None, max_examples=200)
def test_all_above_and_never_none(row: np.ndarray, least: float) -> None:
    expected = np.flatnonzero((row >= np.float32(least)) & (row > NEVER))
    found = above(row, least)
    assert found.tolist() == (expected.tolist() or [row.argmax()])


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


@given(rows(), st.floats(0.01, 0.5))
@settings(deadline=None, max_examples=200)
def test_one_of_the_top_choices_stays(row: np.ndarray, threshold: float) -> None:
    share = probabilities(row)
    ids = without_top_choices(row, threshold)
    top = share >= threshold
    if (np.abs(share - threshold) < 1e-4).any():
        return
    assert (share[ids] >= threshold).sum() == min(top.sum(), 1)
    assert share[ids].max() == (share[top].min() if top.any() else share.max())
    assert len(ids) == len(row) - max(top.sum() - 1, 0)


@pytest.mark.parametrize("shorten", [nucleus, typical])
def test_zeros_have_signs(shorten) -> None:
    for seed in range(50):
        row = np.random.default_rng(seed).permutation([0.0, 0.0, 0.0, -0.0, -0.0, -0.0, -20.0])
        assert len(shorten(row.astype(np.float32), 0.99)) == 6


@pytest.mark.parametrize("shorten", [nucleus, typical])
def test_indices_ascend(shorten) -> None:
    row = np.random.default_rng(1).normal(0, 3, 20_000).astype(np.float32)
    ids = shorten(row, 0.9)
    assert len(ids) > 100
    assert (np.diff(ids) > 0).all()


@pytest.mark.parametrize("shorten", [nucleus, typical])
@pytest.mark.parametrize("share", [0.0, 1e-300])
def test_of_no_share_one_is_left(shorten, share: float) -> None:
    row = np.random.default_rng(1).normal(0, 3, 20_000).astype(np.float32)
    assert len(shorten(row, share)) == 1
