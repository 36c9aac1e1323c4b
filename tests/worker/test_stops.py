"""Stop strings are found whatever way the text is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.worker.stops import StopMatcher

ALPHABET = st.sampled_from("abc")


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None, str]:
    """Text shown, the stop string found, and what was never looked at."""
    matcher = StopMatcher(stops)
    shown = ""
    for index, piece in enumerate(pieces):
        text, found = matcher.push(piece)
        shown += text
        if found is not None:
            return shown, found, "".join(pieces[index + 1 :])
    return shown + matcher.flush(), None, ""


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


@given(
    text=st.text(ALPHABET, max_size=40),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=6), max_size=4),
    places=st.lists(st.integers(0, 1000), max_size=12),
)
def test_any_split_finds_the_same(text: str, stops: list[str], places: list[int]) -> None:
    shown, found, _ = run(stops, cut(text, places))
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        assert (shown, found) == (text, None)
        return
    end, _, stop = min(ends)
    assert (shown, found) == (text[: end - len(stop)], stop)


@given(
    text=st.text(ALPHABET, max_size=40),
    stops=st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=1, max_size=4),
)
def test_holds_back_no_more_than_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, found = matcher.push(text)
    if found is None:
        held = text[len(shown) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ([], ["a", "b"], ("ab", None)),
        ([""], ["ab"], ("ab", None)),
        (["\n\n"], ["one\n", "\ntwo"], ("one", "\n\n")),
        (["END"], ["the EN", "D"], ("the ", "END")),
        (["END"], ["the EN", "E"], ("the ENE", None)),
        (["aab"], ["aa", "a", "b"], ("a", "aab")),
        (["bc", "abcd"], ["a", "b", "c", "d"], ("a", "bc")),
        (["b", "ab"], ["ab"], ("", "ab")),
        (["\U0001f600"], ["x\U0001f600y"], ("x", "\U0001f600")),
    ],
)
def test_examples(stops: list[str], pieces: list[str], expected: tuple[str, str | None]) -> None:
    assert run(stops, pieces)[:2] == expected


def test_a_long_stop_string_costs_no_more_per_character() -> None:
    matcher = StopMatcher(["a" * 20_000 + "b"] * 4)
    shown = "".join(matcher.push("a" * 1000)[0] for _ in range(40))
    assert len(shown) == 20_000
