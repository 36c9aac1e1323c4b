"""Sequences that are copied in pieces while they grow, and put together elsewhere."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.worker.carry.canary import divergence
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import (
    export_piece,
    export_sequence,
    import_piece,
    prove_sequence,
)
from kvserve.worker.carry.structure import parse
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.llama import Context
from tests.worker.carry.conftest import Backend, decode, random_tokens, score

N_TOKENS = 120
TOKENS = random_tokens(N_TOKENS + 20)
ENDS = (50, 100)
"""Where the pieces end; the rest is exported when the sequence has stopped."""
SPARE = 9
"""An id that the context's batches cannot use."""


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(params=["llama", "deepseek2"])
def path(request, small_model) -> Path:
    return small_model(request.param)


def in_pieces(
    context: Context, opened: ExitStack, slot: int = 0, through: int = SPARE
) -> list[ExportedState]:
    """Pieces of a sequence that goes on between them, amid another one's cells, then its rest."""
    states = []
    begin = 0
    for n_before, end in zip((0, *ENDS), ENDS, strict=False):
        decode(context, slot, TOKENS[begin : end + 5], begin)
        decode(context, 3, random_tokens(9, seed=end), context.n_cached(3))
        begin = end + 5
        piece = export_piece(
            context, slot, TOKENS[:end], n_before=n_before, through=through, salt="s"
        )
        states.append(opened.enter_context(piece))
    decode(context, slot, TOKENS[begin:N_TOKENS], begin)
    rest = export_sequence(
        context,
        slot,
        TOKENS[: N_TOKENS + 1],
        salt="s",
        canary=True,
        n_before=ENDS[-1],
        through=through,
    )
    return [*states, opened.enter_context(rest)]


@pytest.mark.parametrize("through", [SPARE, 2])
def test_put_together_it_goes_on_as_if_nothing_was(backend, path, opened, through) -> None:
    old, new = backend.context(path), backend.context(path)
    states = in_pieces(old, opened, through=through)
    assert [state.contents.n_before for state in states] == [0, *ENDS]
    assert [state.contents.n_cached for state in states] == [*ENDS, N_TOKENS]
    assert old.n_cached(through) == 0
    decode(new, 3, random_tokens(30, seed=7))
    for state in states:
        import_piece(new, 20, state, 0)
        assert new.n_cached(20) == state.contents.n_cached
        assert new.n_cached(0) == 0
    new.copy_slot(20, 1, N_TOKENS)
    kld = prove_sequence(new, 1, states[-1])
    assert kld is not None
    assert kld < 1e-5
    wanted = score(old, 0, TOKENS[N_TOKENS + 1 :], N_TOKENS + 1)
    found = score(new, 1, TOKENS[N_TOKENS + 1 :], N_TOKENS + 1)
    assert [int(row.argmax()) for row in wanted] == [int(row.argmax()) for row in found]
    assert max(map(divergence, wanted, found)) < 1e-5


@pytest.mark.parametrize("pair", ["f16", "q8_0", "q4_0"])
def test_transcoded_apart_the_rows_are_those_of_the_whole(backend, path, opened, pair) -> None:
    """Cells lie in the order of their positions here: the pieces' rows follow each other."""
    context = backend.context(path)
    decode(context, 0, TOKENS[:N_TOKENS])
    whole = opened.enter_context(export_sequence(context, 0, TOKENS[:N_TOKENS]))
    target = forecast(whole.layout, parse_pair(pair))
    pieces = []
    for n_before, end in zip((0, *ENDS), (*ENDS, N_TOKENS), strict=True):
        piece = export_piece(context, 0, TOKENS[:end], n_before=n_before, through=SPARE)
        pieces.append(opened.enter_context(piece))
    apart = [rows_of(opened.enter_context(transcode(piece, target, 1))) for piece in pieces]
    at_once = rows_of(opened.enter_context(transcode(whole, target, 1)))
    assert at_once
    for index, rows in enumerate(at_once):
        np.testing.assert_array_equal(rows, np.concatenate([one[index] for one in apart]))


def rows_of(state: ExportedState) -> list[np.ndarray]:
    data = state.view()
    rows = parse(data, state.layout).rows
    return [data[one.offset : one.offset + one.n_bytes].copy() for one in rows]


def test_a_piece_is_refused_where_the_one_before_is_missing(
    backend: Backend, small_model, opened: ExitStack
) -> None:
    path = small_model("llama")
    old, new = backend.context(path), backend.context(path)
    first, second, rest = in_pieces(old, opened)
    for wrong in (second, rest):
        with pytest.raises(CannotCarry) as refusal:
            import_piece(new, 20, wrong, 0)
        assert refusal.value.reason is Reason.IMPORT
        assert new.n_cached(20) == 0
    import_piece(new, 20, first, 0)
    with pytest.raises(CannotCarry):
        import_piece(new, 20, rest, 0)
    assert new.n_cached(20) == ENDS[0]
    import_piece(new, 20, second, 0)
    import_piece(new, 20, rest, 0)


def test_a_part_of_another_memory_is_no_piece(backend: Backend, small_model) -> None:
    """A window has lost its older cells, and a recurrent state is whole or nothing."""
    for arch, dims in (("gemma3", {"window": 16, "n_layer": 6}), ("qwen35", {"n_layer": 4})):
        context = backend.context(small_model(arch, **dims))
        decode(context, 0, TOKENS[:N_TOKENS])
        with pytest.raises(CannotCarry) as refusal:
            export_piece(context, 0, TOKENS[:100], n_before=50, through=2)
        assert refusal.value.reason is Reason.MALFORMED
        assert context.n_cached(2) == 0
