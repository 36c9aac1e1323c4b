"""The memory estimate against what llama.cpp reported, and its properties."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvserve.core.dtypes import LADDER, CachePair, KvType, parse_pair
from kvserve.core.machine import Backend
from kvserve.core.memory import (
    HOPPER_OVERHEADS,
    cache_cells,
    compute_bytes,
    estimate,
    kv_bytes,
    max_context,
    pad_context,
)
from kvserve.core.plan import Launch
from kvserve.core.shape import ModelShape
from kvserve.units import MIB
from tests.core.shapes import hybrid_4b, llama3_8b, plain


def launch(
    pair: str = "f16",
    n_ctx: int = 32768,
    *,
    backend: Backend = Backend.CUDA,
    n_gpu_layers: int = 999,
    n_parallel: int = 4,
    n_ubatch: int = 512,
    n_cpu_moe: int = 0,
) -> Launch:
    return Launch(
        backend=backend,
        pair=parse_pair(pair),
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_batch=max(512, n_ubatch),
        n_ubatch=n_ubatch,
        n_gpu_layers=n_gpu_layers,
        n_cpu_moe=n_cpu_moe,
    )


# llama.cpp's own lines for the 8B Q4_K_M shape on a CUDA build (commit 0c1e57098), in MiB:
# context, pair, ubatch, KV buffer, CUDA compute buffer, CUDA_Host compute buffer.
REPORTED = [
    (2048, "f16", 512, 256.00, 110.01, 18.01),
    (8192, "f16", 512, 1024.00, 116.01, 24.01),
    (16384, "q8_0", 512, 1088.00, 124.09, 32.09),
    (32768, "f16", 512, 4096.00, 140.01, 48.01),
    (32768, "q8_0", 512, 2176.00, 192.09, 48.09),
    (32768, "q8_0:q4_0", 512, 1664.00, 192.09, 48.09),
    (32768, "q4_0", 512, 1152.00, 192.09, 48.09),
    (32768, "q4_0", 128, 1152.00, 144.08, 12.08),
    (65536, "q5_1:q4_0", 512, 2688.00, 352.09, 80.09),
    (131072, "f16", 512, 16384.00, 236.01, 144.01),
    (131072, "q8_0", 512, 8704.00, 672.09, 144.09),
    (131072, "q8_0", 2048, 8704.00, 1152.12, 576.13),
]


@pytest.mark.parametrize(("n_ctx", "pair", "n_ubatch", "kv", "compute", "pinned"), REPORTED)
def test_buffers_of_an_8b_model_are_what_llama_cpp_reports(
    n_ctx: int, pair: str, n_ubatch: int, kv: float, compute: float, pinned: float
) -> None:
    bill = estimate(llama3_8b(), launch(pair, n_ctx, n_ubatch=n_ubatch), HOPPER_OVERHEADS, 1)
    assert bill.gpu.kv_bytes == kv * MIB
    assert bill.gpu.compute_bytes / MIB == pytest.approx(compute, abs=0.25)
    assert bill.host.compute_bytes / MIB == pytest.approx(pinned, abs=0.25)


def test_weights_of_an_8b_model_are_what_llama_cpp_reports() -> None:
    bill = estimate(llama3_8b(), launch(), HOPPER_OVERHEADS, 1)
    assert bill.gpu.weights_bytes / MIB == pytest.approx(4403.49, abs=0.01)
    assert bill.host.weights_bytes / MIB == pytest.approx(281.81, abs=0.01)
    half = estimate(llama3_8b(), launch(n_gpu_layers=20), HOPPER_OVERHEADS, 1)
    assert half.gpu.weights_bytes / MIB == pytest.approx(2773.80, abs=0.01)
    assert half.gpu.kv_bytes == 2432 * MIB
    assert half.host.kv_bytes == 1664 * MIB


# NVML's used memory of a whole worker on an H100, in MiB (docs/memory.md).
@pytest.mark.parametrize(
    ("n_ctx", "pair", "used"),
    [(8192, "f16", 6150), (32768, "f16", 9246), (32768, "q8_0", 7378), (32768, "q8_0:q4_0", 6866),
     (32768, "q4_0", 6354), (131072, "q8_0", 14386)],
)  # fmt: skip
def test_the_total_is_what_nvml_shows(n_ctx: int, pair: str, used: int) -> None:
    bill = estimate(llama3_8b(), launch(pair, n_ctx), HOPPER_OVERHEADS, 1)
    assert bill.gpu.total_bytes / MIB == pytest.approx(used, abs=2)


# The same model with 20 of 33 layers on the GPU: the compute buffer holds copies of what the
# host layers need there. An upper bound close to the truth is what the plan wants.
@pytest.mark.parametrize(
    ("n_ctx", "pair", "reported"),
    [(32768, "q8_0", 303.07), (65536, "q8_0:q4_0", 501.07), (131072, "f16", 665.00),
     (131072, "q8_0", 1089.07), (131072, "q4_0", 897.07), (2048, "f16", 114.5)],
)  # fmt: skip
def test_the_compute_buffer_of_a_split_model(n_ctx: int, pair: str, reported: float) -> None:
    predicted = compute_bytes(llama3_8b(), launch(pair, n_ctx, n_gpu_layers=20)) / MIB
    assert reported - 12 <= predicted <= reported + 48


def test_the_seeds_hybrid_keeps_half_a_gib_at_32k() -> None:
    bill = estimate(hybrid_4b(), launch(), HOPPER_OVERHEADS, 1)
    assert bill.gpu.kv_bytes == 512 * MIB


def test_a_sliding_window_is_capped_and_shared_by_the_sequences() -> None:
    assert cache_cells(1024, launch(n_parallel=4)) == pad_context(4 * 1024 + 512)
    assert cache_cells(1024, launch(n_ctx=2048, n_parallel=4)) == 2048
    assert cache_cells(None, launch(n_ctx=10000)) == 10240


def test_mla_holds_keys_only() -> None:
    shape = plain(mla=True)
    assert kv_bytes(shape.layers[0], launch("f16", 1024)) == 576 * 2 * 1024


def test_recurrent_state_is_f32_and_by_sequence_whatever_the_kv_type() -> None:
    one = estimate(hybrid_4b(), launch(n_parallel=1), HOPPER_OVERHEADS, 1).gpu
    four = estimate(hybrid_4b(), launch("q4_0", n_parallel=4), HOPPER_OVERHEADS, 1).gpu
    assert four.recurrent_bytes == 4 * one.recurrent_bytes
    assert one.recurrent_bytes == 24 * (3 * 8192 + 128 * 4096) * 4


def test_experts_on_the_host_leave_the_gpu() -> None:
    shape = plain(layer_bytes=500 * MIB, expert_bytes=400 * MIB, n_expert=64, n_expert_used=8)
    all_on_gpu = estimate(shape, launch(), HOPPER_OVERHEADS, 1)
    moved = estimate(shape, launch(n_cpu_moe=10), HOPPER_OVERHEADS, 1)
    assert all_on_gpu.gpu.weights_bytes - moved.gpu.weights_bytes == 10 * 400 * MIB
    assert moved.host.weights_bytes - all_on_gpu.host.weights_bytes == 10 * 400 * MIB


def test_tied_embeddings_lie_once_on_the_host_and_twice_with_a_gpu() -> None:
    shape = replace(plain(), tied_bytes=plain().input_bytes)
    cpu = estimate(shape, launch(backend=Backend.CPU, n_gpu_layers=0), HOPPER_OVERHEADS, 1)
    gpu = estimate(shape, launch(), HOPPER_OVERHEADS, 1)
    both = gpu.gpu.weights_bytes + gpu.host.weights_bytes
    assert both - cpu.host.weights_bytes == shape.input_bytes


pairs = st.sampled_from([*LADDER, CachePair(KvType.F16, KvType.Q8_0)])
shapes = st.sampled_from(
    [llama3_8b(), hybrid_4b(), plain(window_every=6), plain(head_size=64, n_head_kv=2)]
)
contexts = st.integers(min_value=1, max_value=131072)


@given(shapes, pairs, contexts, contexts, st.integers(1, 64))
def test_a_longer_context_never_takes_less(
    shape: ModelShape, pair: CachePair, a: int, b: int, n_parallel: int
) -> None:
    short, long = sorted((a, b))
    first = replace(launch(n_parallel=n_parallel, n_ctx=short), pair=pair)
    second = replace(first, n_ctx=long)
    small = estimate(shape, first, HOPPER_OVERHEADS, 1)
    large = estimate(shape, second, HOPPER_OVERHEADS, 1)
    assert small.gpu.total_bytes <= large.gpu.total_bytes
    assert small.host.total_bytes <= large.host.total_bytes


@given(shapes, pairs, contexts, st.integers(0, 33))
def test_no_byte_of_weights_or_cache_is_lost_in_a_split(
    shape: ModelShape, pair: CachePair, n_ctx: int, n_gpu_layers: int
) -> None:
    whole = replace(launch(n_ctx=n_ctx), pair=pair)
    part = replace(whole, n_gpu_layers=n_gpu_layers)
    a = estimate(shape, whole, HOPPER_OVERHEADS, 1)
    b = estimate(shape, part, HOPPER_OVERHEADS, 1)
    assert a.gpu.kv_bytes + a.host.kv_bytes == b.gpu.kv_bytes + b.host.kv_bytes
    assert a.gpu.weights_bytes + a.host.weights_bytes == b.gpu.weights_bytes + b.host.weights_bytes


@given(shapes, pairs, st.integers(0, 20_000), st.integers(1, 16))
def test_max_context_is_exact_to_256_tokens(
    shape: ModelShape, pair: CachePair, free_mib: int, n_parallel: int
) -> None:
    asked = replace(launch(n_parallel=n_parallel), pair=pair)
    free_bytes = free_mib * MIB
    longest = max_context(shape, asked, HOPPER_OVERHEADS, 1, free_bytes)

    def fits(n_ctx: int) -> bool:
        bill = estimate(shape, replace(asked, n_ctx=n_ctx), HOPPER_OVERHEADS, 1)
        return bill.gpu.total_bytes <= free_bytes

    if longest:
        assert fits(longest)
    if longest < shape.n_ctx_train:
        assert not fits(longest + 256)


@given(
    shape=st.sampled_from(
        (plain(n_ctx_train=8192), plain(n_ctx_train=8192, window_every=6), llama3_8b())
    ),
    pair=st.sampled_from(LADDER),
    share=st.floats(0.0, 1.0),
    n_ubatch=st.sampled_from((128, 512)),
    n_parallel=st.sampled_from((1, 4)),
)
@settings(max_examples=40, deadline=None)
def test_the_longest_context_is_exact_to_256_tokens(
    shape: ModelShape, pair: CachePair, share: float, n_ubatch: int, n_parallel: int
) -> None:
    shape = replace(shape, n_ctx_train=8192)
    trial = Launch(Backend.CUDA, pair, 256, n_parallel, 512, n_ubatch, shape.n_layer + 1)

    def needed(n_ctx: int) -> int:
        bill = estimate(shape, replace(trial, n_ctx=n_ctx), HOPPER_OVERHEADS, 1)
        return bill.gpu.total_bytes

    lengths = range(256, 8192 + 1, 256)
    free = int(needed(256) - 1 + share * (needed(8192) - needed(256) + 2))
    expected = max((n for n in lengths if needed(n) <= free), default=0)
    assert max_context(shape, trial, HOPPER_OVERHEADS, 1, free) == expected
