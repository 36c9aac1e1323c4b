"""States that are written and read a few cells at a time, against those of the whole."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from kvserve.worker.carry.canary import divergence
from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.parts import (
    ArrivingSequence,
    LeavingSequence,
    Scratch,
    Writer,
    cells_of,
)
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.carry.structure import parse
from kvserve.worker.llama import Context
from tests.worker.carry.conftest import Backend, decode, random_tokens, score

N_TOKENS = 150
TOKENS = random_tokens(N_TOKENS + 12)
ENDS = (149, 117, 60, 59, 0)
THROUGH, SPARE = 2, 9
"""Ids that batches can use, and cannot."""
KINDS = ("llama", "deepseek2", "qwen2vl")


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=KINDS)
def path(request, small_model) -> Path:
    return small_model(request.param)


def scattered(context: Context, slot: int = 0) -> None:
    """A sequence whose cells are not in the order of its positions, amid another one's."""
    decode(context, 3, random_tokens(200, seed=1))
    decode(context, slot, TOKENS[:40])
    decode(context, 1, random_tokens(170, seed=2))
    context.clear_slot(3)
    for begin in range(40, N_TOKENS, 37):
        decode(context, slot, TOKENS[begin : min(begin + 37, N_TOKENS)], begin)
        decode(context, 3, random_tokens(5), context.n_cached(3))


def left_in_parts(
    context: Context, slot: int = 0, through: int = SPARE, *, cut: bool = True
) -> ExportedState:
    leaving = LeavingSequence(context, slot, TOKENS[:N_TOKENS], "s", Writer())
    for n_left in ENDS:
        leaving.add(slot, n_left, through if n_left or not cut else None)
        assert leaving.n_missing == n_left
        assert context.n_cached(through) == 0
        if n_left and cut:
            context.cut_slot(slot, n_left)
    return leaving.finish()


def cells(state: ExportedState) -> dict[int, tuple[bytes, ...]]:
    """What each position has in every layer."""
    data, layout = state.view(), state.layout
    parsed = parse(data, layout)
    positions, ext = cells_of(parsed, layout.cell_ext_bytes)
    found = {}
    for index, position in enumerate(positions.tolist()):
        rows = [
            data[begin : begin + one.row_bytes].tobytes()
            for one in parsed.rows
            for begin in [one.offset + index * one.row_bytes]
        ]
        found[position] = (ext[index].tobytes(), *rows)
    return found


@pytest.mark.parametrize("through", [THROUGH, SPARE])
@pytest.mark.parametrize("slot", [0, 20])
def test_in_parts_from_the_end_it_is_the_state_of_the_whole(
    backend: Backend, path: Path, opened: ExitStack, slot: int, through: int
) -> None:
    context = backend.context(path)
    scattered(context)
    if slot:
        context.copy_slot(0, slot, N_TOKENS)
    whole = opened.enter_context(export_sequence(context, slot, TOKENS[:N_TOKENS], salt="s"))
    order = cells_of(parse(whole.view(), whole.layout), whole.layout.cell_ext_bytes)[0]
    assert (np.diff(order) < 0).any(), "the test is for cells that are not in order"
    parts = opened.enter_context(left_in_parts(context, slot, through))
    assert cells(parts) == cells(whole)
    assert parts.contents == whole.contents
    assert parts.tokens.tolist() == TOKENS[:N_TOKENS].tolist()
    ordered = cells_of(parse(parts.view(), parts.layout), parts.layout.cell_ext_bytes)[0]
    assert ordered.tolist() == list(range(N_TOKENS))


@pytest.mark.parametrize("pair", ["f16", "q8_0"])
@pytest.mark.parametrize("from_parts", [True, False])
def test_what_comes_back_in_parts_goes_on_as_if_nothing_was(
    backend: Backend, path: Path, opened: ExitStack, pair: str, from_parts: bool
) -> None:
    old, new = (backend.context(path, pair) for _ in range(2))
    scattered(old)
    export = left_in_parts if from_parts else export_sequence
    arguments = {"cut": False} if from_parts else {"tokens": TOKENS[:N_TOKENS], "salt": "s"}
    state = opened.enter_context(export(old, 0, **arguments))
    arriving = ArrivingSequence.of(new, state, Scratch())
    begin = 0
    for end in (1, 64, 65, N_TOKENS):
        decode(new, 3, random_tokens(9, seed=end), new.n_cached(3))
        arriving.take(SPARE, THROUGH, begin, end)
        assert (new.n_cached(SPARE), new.n_cached(THROUGH)) == (end, 0)
        begin = end
    assert cells(opened.enter_context(export_sequence(new, SPARE, TOKENS[:N_TOKENS]))) == cells(
        state
    )
    new.copy_slot(SPARE, 0, N_TOKENS)
    wanted = score(old, 0, TOKENS[N_TOKENS:], N_TOKENS)
    found = score(new, 0, TOKENS[N_TOKENS:], N_TOKENS)
    assert max(map(divergence, wanted, found)) < 1e-5


def test_only_its_beginning_comes_back_too(backend: Backend, path: Path, opened: ExitStack) -> None:
    old, new = backend.context(path), backend.context(path)
    scattered(old)
    state = opened.enter_context(left_in_parts(old, cut=False))
    arriving = ArrivingSequence.of(new, state, Scratch())
    arriving.take(SPARE, THROUGH, 0, 30)
    arriving.take(SPARE, THROUGH, 30, 70)
    import_sequence(new, 1, state)
    new.cut_slot(1, 70)
    one, other = (
        opened.enter_context(export_sequence(new, slot, TOKENS[:70])) for slot in (SPARE, 1)
    )
    assert cells(one) == cells(other)


def test_a_part_that_does_not_follow_is_refused(
    backend: Backend, small_model, opened: ExitStack
) -> None:
    old, new = (backend.context(small_model("llama")) for _ in range(2))
    scattered(old)
    arriving = ArrivingSequence.of(new, opened.enter_context(left_in_parts(old)), Scratch())
    arriving.take(SPARE, THROUGH, 0, 30)
    for begin, end in ((20, 40), (40, 50), (30, N_TOKENS + 1)):
        with pytest.raises(CannotCarry) as refused:
            arriving.take(SPARE, THROUGH, begin, end)
        assert refused.value.reason is Reason.IMPORT
        assert (new.n_cached(SPARE), new.n_cached(THROUGH)) == (30, 0)
    arriving.take(SPARE, THROUGH, 30, N_TOKENS)


def test_where_no_cells_are_free_nothing_changes(
    backend: Backend, small_model, opened: ExitStack
) -> None:
    old, new = (backend.context(small_model("llama")) for _ in range(2))
    scattered(old)
    arriving = ArrivingSequence.of(new, opened.enter_context(left_in_parts(old)), Scratch())
    decode(new, 1, random_tokens(480))
    arriving.take(SPARE, THROUGH, 0, 20)
    with pytest.raises(CannotCarry):
        arriving.take(SPARE, THROUGH, 20, N_TOKENS)
    assert (new.n_cached(SPARE), new.n_cached(THROUGH)) == (20, 0)


def test_states_of_another_kind_are_refused(
    backend: Backend, small_model, opened: ExitStack
) -> None:
    old = backend.context(small_model("llama"))
    scattered(old)
    state = opened.enter_context(left_in_parts(old))
    for other, reason in (
        (backend.context(small_model("llama"), "q8_0"), Reason.LAYOUT),
        (backend.context(small_model("deepseek2")), Reason.IDENTITY),
    ):
        with pytest.raises(CannotCarry) as refused:
            ArrivingSequence.of(other, state, Scratch())
        assert refused.value.reason is reason


def test_no_file_is_left_of_one_that_is_given_up(backend: Backend, small_model) -> None:
    context = backend.context(small_model("llama"))
    scattered(context)
    before = len(list(Path("/proc/self/fd").iterdir()))
    leaving = LeavingSequence(context, 0, TOKENS[:N_TOKENS], "", Writer())
    leaving.add(0, 100, SPARE)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    leaving.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
