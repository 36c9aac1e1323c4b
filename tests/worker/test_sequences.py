"""Tokens to text, and when a generation ends."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.dialects.form import Form
from kvserve.dialects.watch import CallWatch
from kvserve.worker.sequences import Finish, Generation, Limits, Utf8Stream

PROMPT = np.array([100, 101, 102], dtype=np.int32)
EOS = 9
PIECES = {0: b"zero ", 1: b"one ", 2: b"two ", 3: "\N{SNOWMAN}".encode()[:2], 4: b"\x83", EOS: b""}


def start(**limits: object) -> Generation:
    return Generation(PROMPT, Limits(**({"max_tokens": 10} | limits)))


def accept(generation: Generation, token: int, piece: bytes) -> str:
    generation.take(token)
    return generation.read(generation.n_tokens - 1, piece, ends=token == EOS)


def feed(generation: Generation, *tokens: int) -> list[str]:
    return [accept(generation, token, PIECES.get(token, b"?")) for token in tokens]


@given(st.text(), st.lists(st.integers(0, 10_000), max_size=20))
def test_bytes_in_any_split_make_the_same_text(text: str, places: list[int]) -> None:
    data = text.encode("utf-8", "surrogatepass")
    bounds = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    stream = Utf8Stream()
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    whole = "".join([stream.push(piece) for piece in pieces]) + stream.finish()
    assert whole == data.decode("utf-8", "replace")


@given(st.binary(max_size=40))
def test_any_bytes_one_by_one_never_show_a_broken_character_early(data: bytes) -> None:
    stream = Utf8Stream()
    text = "".join(stream.push(bytes([byte])) for byte in data) + stream.finish()
    assert text == data.decode("utf-8", "replace")


def test_a_split_character_waits_for_its_rest() -> None:
    assert feed(start(), 0, 3, 4) == ["zero ", "", "\N{SNOWMAN}"]


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    assert feed(start(max_tokens=2), 0, 3) == ["zero ", "\ufffd"]


def test_ends_at_the_end_token_and_counts_it() -> None:
    generation = start()
    feed(generation, 0, EOS)
    assert generation.finish == Finish("stop")
    assert generation.n_generated == 2
    assert generation.tokens.tolist() == [100, 101, 102, 0, EOS]


def test_ignores_the_end_token_when_asked() -> None:
    generation = start(ignore_eos=True)
    feed(generation, 0, EOS, 1)
    assert generation.finish is None


def test_ends_at_max_tokens_and_shows_what_was_held_back() -> None:
    generation = start(max_tokens=2, stop=("two four",))
    assert feed(generation, 0, 2) == ["zero ", "two "]
    assert generation.finish == Finish("length")


def test_a_stop_string_over_token_borders_cuts_the_text() -> None:
    generation = start(stop=("ro on",))
    assert feed(generation, 0, 1) == ["ze", ""]
    assert generation.finish == Finish("stop", "ro on")


def test_stop_strings_count_only_after_min_tokens() -> None:
    generation = start(stop=("one",), min_tokens=2)
    assert feed(generation, 1, 1, 0) == ["one ", "one ", "zero "]
    assert feed(generation, 1) == [""]
    assert generation.finish == Finish("stop", "one")


def test_no_room_ends_at_once() -> None:
    assert start(max_tokens=0).finish == Finish("length")


@pytest.mark.parametrize("n", range(7))
def test_replayed_tokens_are_silent_and_the_text_goes_on_exactly(n: int) -> None:
    tokens = [0, 3, 4, 2, 1, 0, EOS]
    limits = {"stop": ("two zero", "e z"), "max_tokens": 20}
    whole = start(**limits)
    texts = feed(whole, *tokens[: 6 if whole.finish else 7])[: len(tokens)]
    stopped_after = next((i for i in range(1, 8) if _finish_after(limits, tokens[:i])), 7)
    n = min(n, stopped_after - 1)
    resumed = start(**limits)
    late = resumed.replay(tokens[:n], PIECES.__getitem__, EOS.__eq__)
    assert late == ""
    rest = feed(resumed, *tokens[n:stopped_after])
    assert rest == texts[n:stopped_after]
    assert resumed.n_generated == stopped_after


def _finish_after(limits: dict[str, object], tokens: list[int]) -> bool:
    generation = start(**limits)
    for token in tokens:
        if generation.finish is None:
            feed(generation, token)
    return generation.finish is not None


def test_resumed_tokens_that_already_end_the_answer_give_the_late_text() -> None:
    generation = start(max_tokens=2, stop=("two four",))
    assert generation.replay([2, 3], PIECES.__getitem__, EOS.__eq__).endswith("\ufffd")
    assert generation.finish == Finish("length")


def test_a_replay_that_a_smaller_limit_ends_repeats_nothing() -> None:
    pieces = {1: b"Hello", 2: b" wor", 3: b"ld"}
    told = Generation(np.array([7], dtype=np.int32), Limits(max_tokens=10, stop=("ldx",)))
    shown = "".join(accept(told, token, pieces[token]) for token in (1, 2, 3))
    assert shown == "Hello wor"
    again = Generation(np.array([7], dtype=np.int32), Limits(max_tokens=3, stop=("ldx",)))
    late = again.replay((1, 2, 3), pieces.__getitem__, lambda _token: False)
    assert again.finish is not None
    assert again.finish.reason == "length"
    assert shown + late == "Hello world"


def write(generation: Generation, text: str) -> str:
    shown = ""
    for byte in text.encode():
        if generation.finish is None:
            shown += accept(generation, byte, bytes([byte]))
    return shown + ("" if generation.finish is not None else generation.end())


CALL = '<tool_call>\n{"name": "now", "arguments": {"a": "END"}}\n</tool_call>'


@pytest.mark.parametrize("stop", ["END", '"', "}", "name", "call>\n{"])
def test_stop_strings_do_not_cut_calls(stop: str) -> None:
    def generation() -> Generation:
        watch = CallWatch(Form(), ["now"])
        return Generation(PROMPT, Limits(max_tokens=200, stop=(stop,)), watch)

    calling = generation()
    assert write(calling, f"I look. {CALL}") == f"I look. {CALL}"
    assert calling.finish == Finish("stop")
    talking = generation()
    assert write(talking, f"I look. {stop}{CALL}") == "I look. "
    assert talking.finish == Finish("stop", stop)
    # Another worker goes on.
    resumed = generation()
    assert not resumed.replay(CALL[:-8].encode(), lambda token: bytes([token]), lambda _: False)
    assert write(resumed, CALL[-8:]) == CALL[-8:]
