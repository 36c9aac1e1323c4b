import contextlib
import itertools
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import KvType, parse_pair
from kvserve.worker import llama
from kvserve.worker.carry.layout import CELL_EXT_BYTES, CacheLayout, StateLayout, forecast
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.structure import GGML_TYPES, parse, retype
from tests.worker.carry.conftest import decode, random_tokens
from tests.worker.carry.states import MEMORIES, Raw, raw_state, rewritten

N_TOKENS = 100


@pytest.fixture(scope="module", params=MEMORIES)
def raw(request, backend, small_model) -> Raw:
    """A sequence of 100 tokens between cells of another one, in slot 2."""
    arch, dims = MEMORIES[request.param]
    pair = "q8_0" if arch == "deepseek2" else "q8_0:q4_0"
    context = backend.context(small_model(arch, **dims), pair)
    tokens = random_tokens(N_TOKENS)
    for begin in range(0, N_TOKENS, 20):
        decode(context, 2, tokens[begin : begin + 20], begin)
        decode(context, 0, tokens[begin : begin + 10], begin // 2)
    return raw_state(context, 2)


def test_parsed_and_written_it_is_the_same(raw: Raw) -> None:
    np.testing.assert_array_equal(rewritten(raw), raw.data)


def test_what_is_read(raw: Raw) -> None:
    state = raw.state
    assert (state.seq_id, state.n_tokens, state.n_bytes) == (2, N_TOKENS, len(raw.data))
    for cache, layout in zip(state.caches, raw.layout.caches, strict=True):
        assert 0 < cache.n_cells <= N_TOKENS
        assert len(cache.k) == layout.n_layer
        assert len(cache.v) == (0 if layout.type_v is None else layout.n_layer)
    assert (state.recurrent is not None) == raw.layout.recurrent


def test_retyped_there_and_back_everything_lies_where_it_was(raw: Raw) -> None:
    f16 = forecast(raw.layout, parse_pair("f16"))
    assert retype(retype(raw.state, f16), raw.layout) == raw.state


def test_an_empty_sequence(backend, small_model) -> None:
    for arch, dims in MEMORIES.values():
        state = raw_state(backend.context(small_model(arch, **dims)), 1).state
        assert state.n_tokens == 0


def test_the_types_are_numbered_as_in_ggml() -> None:
    assert llama.GGML_TYPES == GGML_TYPES


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_or_longer_state_is_refused(raw: Raw, data: st.DataObject) -> None:
    n_bytes = data.draw(st.integers(0, len(raw.data) + 64).filter(lambda n: n != len(raw.data)))
    other = np.zeros(n_bytes, dtype=np.uint8)
    kept = min(n_bytes, len(raw.data))
    other[:kept] = raw.data[:kept]
    if raw.layout.recurrent and n_bytes in row_borders(raw):
        assert parse(other, raw.layout).n_bytes == n_bytes  # llama.cpp refuses it
        return
    with pytest.raises(CannotCarry) as refusal:
        parse(other, raw.layout)
    assert refusal.value.reason is Reason.MALFORMED


def row_borders(raw: Raw) -> set[int]:
    """Where an even number of the rows of a recurrent state has been written."""
    part = raw.state.recurrent
    assert part is not None
    offset = part.offset + 4 + 8 + 8
    borders = set()
    for n_rows in itertools.count(1):
        if offset >= len(raw.data):
            return borders
        offset += 12 + struct.unpack_from("<Q", raw.data.data, offset + 4)[0]
        if n_rows % 2 == 0:
            borders.add(offset)
    raise AssertionError


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_state_is_refused_or_read_the_same_way(raw: Raw, data: st.DataObject) -> None:
    """Any four bytes, structure and rows alike: never another exception, never out of bounds."""
    front = data.draw(st.booleans())
    last = len(raw.data) - 4
    offset = data.draw(st.integers(0, min(last, 8 + 8 + 30 * N_TOKENS) if front else last))
    value = data.draw(
        st.sampled_from([0, 1, 2, 2**31 - 1, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)
    )
    other = raw.data.copy()
    struct.pack_into("<I", other.data, offset, value)
    try:
        state = parse(other, raw.layout)
    except CannotCarry:
        return
    assert all(rows.offset + rows.n_bytes <= len(other) for rows in state.rows)


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=300).map(lambda tail: struct.pack("<I", 0xAF143CD8) + tail),
    n_layer=st.integers(0, 3),
    recurrent=st.booleans(),
    ext=st.sampled_from([0, CELL_EXT_BYTES]),
)
@example(data=b"", n_layer=0, recurrent=True, ext=0)
def test_any_bytes_at_all(data: bytes, n_layer: int, recurrent: bool, ext: int) -> None:
    layout = StateLayout((CacheLayout(n_layer, KvType.Q8_0, KvType.Q8_0),), recurrent, ext)
    for one in (layout, StateLayout((), True, ext)):
        with contextlib.suppress(CannotCarry):
            parse(np.frombuffer(data, dtype=np.uint8), one)


def test_another_layout_is_refused(raw: Raw) -> None:
    others = [replace(raw.layout, recurrent=not raw.layout.recurrent)] if raw.layout.caches else []
    others.append(replace(raw.layout, cell_ext_bytes=CELL_EXT_BYTES - raw.layout.cell_ext_bytes))
    if raw.layout.caches:
        front = raw.layout.caches[-1]
        for changed in (
            replace(front, n_layer=front.n_layer + 1),
            replace(front, type_k=KvType.F16, rot_k=None),
            replace(
                front, type_v=KvType.Q8_0 if front.type_v is None else None, rot_v=None, rot_k=None
            ),
            replace(front, head_k=front.head_k * 32, rot_k=None),
        ):
            others.append(replace(raw.layout, caches=(*raw.layout.caches[:-1], changed)))
    else:
        others = [StateLayout((CacheLayout(2, KvType.F16, KvType.F16),))]
    for layout in others:
        with pytest.raises(CannotCarry):
            parse(raw.data, layout)


PLAIN = StateLayout((CacheLayout(1, KvType.F16, KvType.F16),))


def plain(**changes: object) -> np.ndarray:
    """A state of two cells and one layer, with something changed."""
    field = {
        "magic": 0xAF143CD8, "seq_id": 0, "n_stream": 1, "n_cells": 2,
        "cells": [(0, 1, 0), (1, 1, 0)], "v_trans": 0, "n_layer": 1,
        "type": 1, "row_bytes": 128, "rest": b"",
    } | changes  # fmt: skip
    rows = struct.pack("<iQ", field["type"], field["row_bytes"]) + bytes(256)
    data = struct.pack("<Ii", field["magic"], field["seq_id"])
    data += struct.pack("<II", field["n_stream"], field["n_cells"])
    data += b"".join(struct.pack("<iIi", *cell) for cell in field["cells"])
    data += struct.pack("<II", field["v_trans"], field["n_layer"]) + rows + rows + field["rest"]
    return np.frombuffer(data, dtype=np.uint8)


def test_the_hand_made_state_is_sound() -> None:
    assert parse(plain(), PLAIN).n_tokens == 2
    assert parse(plain(cells=[(7, 1, 0), (3, 1, 0)]), PLAIN).n_tokens == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"magic": 0xAF143CD9}, "begins with 0xaf143cd9"),
        ({"n_stream": 2}, "2 streams"),
        ({"n_cells": 2**32 - 1}, "early"),
        ({"cells": [(0, 1, 0), (1, 2, 0)]}, "another sequence"),
        ({"cells": [(0, 1, 0), (1, 1, 1)]}, "another sequence"),
        ({"cells": [(0, 1, 0), (-1, 1, 0)]}, "without a position"),
        ({"cells": [(4, 1, 0), (4, 1, 0)]}, "two cells"),
        ({"v_trans": 1}, "transposed"),
        ({"n_layer": 2}, "2 layers"),
        ({"type": 8}, "ggml type 8"),
        ({"type": -1}, "ggml type -1"),
        ({"row_bytes": 0}, "rows of 0 bytes"),
        ({"row_bytes": 127}, "rows of 127 bytes"),
        ({"row_bytes": 2**63}, "rows of"),
        ({"row_bytes": 2**20}, "early"),
        ({"rest": b"x"}, "1 bytes follow"),
    ],
)
def test_each_surprise_is_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CannotCarry, match=message) as refusal:
        parse(plain(**changes), PLAIN)
    assert refusal.value.reason is Reason.MALFORMED
