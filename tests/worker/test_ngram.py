"""The n-gram index against a search of the whole text."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.worker.speculation.ngram import N_MAX, N_MIN, Match, NgramIndex

texts = st.lists(st.integers(0, 3), max_size=150) | st.lists(st.integers(0, 200_000), max_size=60)


def n_back(text: list[int], place: int) -> int:
    """How many tokens before `place` are also the last ones."""
    n = 0
    while n < min(place, N_MAX) and text[place - 1 - n] == text[len(text) - 1 - n]:
        n += 1
    return n


@given(texts, st.lists(st.integers(1, 40), min_size=1, max_size=30))
@settings(max_examples=400, deadline=None)
def test_a_match_is_real_and_as_long_as_it_says(text: list[int], strides: list[int]) -> None:
    tokens = np.zeros(len(text) + 10, dtype=np.int32)
    index = NgramIndex(tokens)
    n = 0
    for stride in strides:
        tokens[n : min(n + stride, len(text))] = text[n : n + stride]
        n = min(n + stride, len(text))
        found = index.find(n)
        everywhere = [n_back(text[:n], place) for place in range(n)]
        longest = max(everywhere, default=0)
        if found is None:
            assert longest < N_MIN
            continue
        assert everywhere[found.position] == found.length >= N_MIN
        assert index.following(found, n, 3)[0] == text[found.position]


def test_the_longest_of_the_latest_wins() -> None:
    text = np.array([9, 1, 2, 3, 4, 7, 1, 2, 3, 5, 9, 1, 2, 3, 0], dtype=np.int32)
    index = NgramIndex(text)
    assert index.find(14) == Match(4, 4)


def test_a_long_copy_is_followed_past_tokens_that_are_everywhere() -> None:
    common = [1, 2, 3]
    original = [t for n in range(40) for t in (*common, 1000 + n)]
    text = np.array([*original, *original], dtype=np.int32)
    index = NgramIndex(text)
    assert index.find(len(original) + 5) is not None
    for n in range(len(original) + 5, len(text)):
        found = index.find(n)
        assert found is not None
        assert found.position == n - len(original)


def test_what_follows_a_repetition_is_the_repetition() -> None:
    text = np.array([5, 1, 2, 3, 1, 2, 3, 0, 0, 0], dtype=np.int32)
    index = NgramIndex(text)
    found = index.find(7)
    assert found == Match(4, 3)
    assert index.following(found, 7, 7).tolist() == [1, 2, 3, 1, 2, 3, 1]


def test_adding_all_at_once_or_one_by_one_is_the_same() -> None:
    text = np.random.default_rng(0).integers(0, 3, 500).astype(np.int32)
    slow = NgramIndex(text)
    for n in range(400):
        slow.find(n)
    fast = NgramIndex(text)
    for n in range(400, 500):
        one, other = slow.find(n), fast.find(n)
        assert (one and one.length) == (other and other.length)
