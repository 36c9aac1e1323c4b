from dataclasses import replace

import numpy as np
import pytest

from kvserve.core.dtypes import KvType, parse_pair
from kvserve.worker.carry.hadamard import rotate
from kvserve.worker.carry.layout import CacheLayout, StateLayout, forecast
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.row_codec import row_codec
from kvserve.worker.carry.structure import Rows
from kvserve.worker.carry.transcode import transcode
from tests.worker.carry.conftest import decode, random_tokens
from tests.worker.carry.states import (
    MEMORIES,
    Raw,
    exported,
    first_layer,
    raw_state,
    steps,
)

QUANTIZED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
NATIVE = [
    ("llama", {}),
    ("llama", {"head_dim": 128}),
    ("llama", {"head_dim": 192}),
    ("llama", {"head_dim": 256}),
    ("llama", {"head_dim": 96}),
    ("gemma3", {}),
    ("gpt-oss", {}),
    ("qwen35", {}),
    ("deepseek2", {}),
    ("deepseek2", {"kv_lora_rank": 96}),
]
"""The last is latent attention whose head divides by 64: logged as rotated, and not rotated."""


def prefilled(backend, path, pair: str, n_tokens: int = 200) -> Raw:
    context = backend.context(path, pair)
    decode(context, 0, random_tokens(n_tokens))
    return raw_state(context)


def values(raw: Raw, rows: Rows) -> np.ndarray:
    """Rows as f32, rotated as they are stored; shape (n_rows, n_elements)."""
    out = np.empty((rows.n_rows, rows.n_elements), dtype=np.float32)
    data = raw.matrix(rows).ravel()
    row_codec().to_f32[rows.kv_type](data.ctypes.data, out.ctypes.data, out.size)
    return out


def unrotated(raw: Raw, rows: Rows, chunk: int | None) -> np.ndarray:
    flat = values(raw, rows).ravel()
    if chunk is not None:
        flat, _ = rotate(flat, chunk, np.empty_like(flat))
    return flat


def carried(raw: Raw, target: StateLayout, n_threads: int = 2) -> Raw:
    with exported(raw) as source, transcode(source, target, n_threads) as result:
        return Raw(result.view().copy(), target)


@pytest.mark.parametrize(("arch", "dims"), NATIVE)
def test_it_is_what_a_native_cache_holds(backend, small_model, arch, dims) -> None:
    """The first layer's K and V depend on no attention, so a native cache quantizes the very
    values that the f32 cache holds. They differ by a rounding where the rotation's sums were
    taken in another order, and there only."""
    path = small_model(arch, **dims)
    source = prefilled(backend, path, "f32")
    for pair in QUANTIZED:
        native = prefilled(backend, path, pair)
        assert native.layout == forecast(source.layout, parse_pair(pair))
        ours = carried(source, native.layout)
        assert len(ours.data) == len(native.data)
        for rows, expected in zip(first_layer(ours), first_layer(native), strict=True):
            assert rows == expected
            if rows is None:
                continue
            found, wanted = values(ours, rows), values(native, rows)
            difference = np.abs(found - wanted).reshape(-1, 32)
            assert (difference <= 1.05 * steps(rows.kv_type, wanted)).all()
            assert (difference > 1e-3 * steps(rows.kv_type, wanted)).mean() < 0.005


@pytest.mark.parametrize("name", MEMORIES)
def test_equal_types_are_copied(backend, small_model, name) -> None:
    arch, dims = MEMORIES[name]
    raw = prefilled(backend, small_model(arch, **dims), "q4_0")
    np.testing.assert_array_equal(carried(raw, raw.layout).data, raw.data)


@pytest.mark.parametrize("name", MEMORIES)
def test_there_and_back_loses_half_a_step_at_most(backend, small_model, name) -> None:
    arch, dims = MEMORIES[name]
    raw = prefilled(backend, small_model(arch, **dims), "f16")
    for pair in QUANTIZED:
        target = forecast(raw.layout, parse_pair(pair))
        there = carried(raw, target)
        back = carried(there, raw.layout)
        if raw.state.recurrent is not None:
            part = raw.state.recurrent
            begin, end = part.offset, part.offset + part.n_bytes
            np.testing.assert_array_equal(back.data[begin:end], raw.data[begin:end])
        for old, new in zip(raw.state.rows, back.state.rows, strict=True):
            before, after = values(raw, old), values(back, new)
            error = np.sqrt(np.mean((after - before) ** 2))
            # An even error of half a step has a deviation of step / sqrt(12); the rotation
            # spreads it, and f16 scales add a little.
            spread = np.sqrt(np.mean(steps(KvType(pair), before) ** 2) / 12)
            assert error <= 1.25 * spread


def test_k_and_v_have_types_of_their_own(backend, small_model) -> None:
    path = small_model("llama")
    source = prefilled(backend, path, "f16")
    ours = carried(source, forecast(source.layout, parse_pair("q8_0:q4_0")))
    k_alone = carried(source, forecast(source.layout, parse_pair("q8_0:f16")))
    v_alone = carried(source, forecast(source.layout, parse_pair("f16:q4_0")))
    for layer in range(2):
        np.testing.assert_array_equal(
            ours.matrix(ours.state.caches[0].k[layer]),
            k_alone.matrix(k_alone.state.caches[0].k[layer]),
        )
        np.testing.assert_array_equal(
            ours.matrix(ours.state.caches[0].v[layer]),
            v_alone.matrix(v_alone.state.caches[0].v[layer]),
        )


def test_between_two_quantized_types_with_one_rotation(backend, small_model) -> None:
    raw = prefilled(backend, small_model("llama", head_dim=128), "q8_0")
    target = forecast(raw.layout, parse_pair("q4_0"))
    ours = carried(raw, target)
    for old, new in zip(raw.state.rows, ours.state.rows, strict=True):
        wanted = values(raw, old)
        difference = np.abs(values(ours, new) - wanted).reshape(-1, 32)
        assert (difference <= 1.1 * steps(KvType.Q4_0, wanted)).all()


def test_only_the_rotation_can_differ(backend, small_model) -> None:
    """As between a daemon with LLAMA_ATTN_ROT_DISABLE and one without."""
    raw = prefilled(backend, small_model("llama", head_dim=128), "q8_0")
    plain = tuple(replace(part, rot_k=None, rot_v=None) for part in raw.layout.caches)
    ours = carried(raw, replace(raw.layout, caches=plain))
    k, v = first_layer(raw)
    new_k, new_v = first_layer(ours)
    for old, new, chunk in ((k, new_k, 128), (v, new_v, 64)):
        wanted = unrotated(raw, old, chunk)
        error = np.abs(unrotated(ours, new, None) - wanted).reshape(-1, 32)
        assert (error <= 0.6 * steps(KvType.Q8_0, wanted) + 1e-6).all()


@pytest.mark.parametrize("n_threads", [1, 2, 16])
def test_threads_change_nothing(backend, small_model, n_threads) -> None:
    raw = prefilled(backend, small_model("gpt-oss"), "f16")
    target = forecast(raw.layout, parse_pair("q4_0"))
    np.testing.assert_array_equal(carried(raw, target, n_threads).data, carried(raw, target).data)


def test_what_differs_in_more_than_types_is_refused(backend, small_model) -> None:
    raw = prefilled(backend, small_model("llama"), "f16")
    front = raw.layout.caches[0]
    for other in (
        replace(raw.layout, recurrent=True),
        replace(raw.layout, caches=(front, front)),
        replace(raw.layout, caches=(replace(front, n_layer=3),)),
        replace(raw.layout, caches=(replace(front, head_k=128),)),
        replace(raw.layout, caches=(replace(front, type_v=None, head_v=None),)),
    ):
        with exported(raw) as source, pytest.raises(CannotCarry) as refusal:
            transcode(source, other, 1)
        assert refusal.value.reason is Reason.LAYOUT


def test_a_row_that_is_no_whole_blocks_is_refused(backend, small_model) -> None:
    raw = prefilled(backend, small_model("llama", head_dim=48, n_head_kv=1), "f16")
    with exported(raw) as source, pytest.raises(CannotCarry) as refusal:
        transcode(source, forecast(raw.layout, parse_pair("q8_0")), 1)
    assert refusal.value.reason is Reason.LAYOUT


def test_a_state_that_is_not_what_it_says_is_refused(backend, small_model) -> None:
    raw = prefilled(backend, small_model("llama"), "f16")
    q8_0 = forecast(raw.layout, parse_pair("q8_0"))
    with exported(Raw(raw.data, q8_0)) as source, pytest.raises(CannotCarry) as refusal:
        transcode(source, raw.layout, 1)
    assert refusal.value.reason is Reason.MALFORMED


def test_large_rows_go_through_in_blocks() -> None:
    """More rows than a block, a last block that is not full, and a chunk over one matrix."""
    part = CacheLayout(1, KvType.F32, KvType.F32, 512, 512)
    rng = np.random.default_rng(0)
    n_cells, n_elements = 301, 1024
    k, v = rng.standard_normal((2, n_cells, n_elements)).astype(np.float32)
    cells = np.zeros((n_cells, 3), dtype=np.int32)
    cells[:, 0], cells[:, 1] = np.arange(n_cells), 1
    head = np.array([0xAF143CD8, 0, 1, n_cells], dtype=np.uint32)
    rows = np.array([0, 4 * n_elements, 0], dtype=np.int32)
    counts = np.array([0, 1], dtype=np.uint32)
    pieces = (head, cells, counts, rows, k, rows, v)
    data = np.concatenate([piece.ravel().view(np.uint8) for piece in pieces])
    raw = Raw(data, StateLayout((part,)))
    ours = carried(raw, forecast(raw.layout, parse_pair("q8_0")))
    for rows_of, wanted, chunk in zip(first_layer(ours), (k, v), (512, 64), strict=True):
        found = unrotated(ours, rows_of, chunk)
        assert np.abs(found - wanted.ravel()).max() < 0.06
