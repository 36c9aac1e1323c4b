"""Log probabilities and the largest values of a row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from kvserve.worker.logprobs import largest, log_sum_exp, token_logprobs

FINITE = st.floats(-100, 100, width=32)


@given(arrays(np.float32, st.integers(1, 3000), elements=FINITE), st.integers(0, 25))
@settings(deadline=None)
def test_largest_is_the_head_of_a_stable_sort(row: np.ndarray, n: int) -> None:
    assert largest(row, n) == np.argsort(-row, kind="stable")[:n].tolist()


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(15_000, 20_000))
@settings(deadline=None, max_examples=30)
def test_largest_of_a_large_vocabulary_with_many_ties(seed: int, n: int, n_vocab: int) -> None:
    row = np.random.default_rng(seed).integers(0, 300, n_vocab).astype(np.float32)
    expected = np.argsort(-row, kind="stable")[:n].tolist()
    assert row[largest(row, n)].tolist() == row[expected].tolist()


def test_probabilities_add_up_and_nothing_overflows() -> None:
    row = np.array([1000.0, 999.0, -np.inf, 0.0], dtype=np.float32)
    logprobs = row.astype(np.float64) - log_sum_exp(row)
    assert np.exp(logprobs).sum() == pytest.approx(1.0, abs=1e-6)


def test_the_drawn_token_need_not_be_among_the_likeliest() -> None:
    row = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    found = token_logprobs(7, row, 2, 2, lambda token: b"abc"[token : token + 1])
    assert (found.id, found.drawn.token, found.drawn.piece) == (7, 2, b"c")
    assert found.drawn.logprob == pytest.approx(np.log(0.2), abs=1e-6)
    assert [top.token for top in found.top] == [0, 1]
    assert found.top[0].logprob == pytest.approx(np.log(0.5), abs=1e-6)
