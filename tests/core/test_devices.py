"""Layers over several GPUs: llama.cpp's own division, by cases worked out by hand, and what each
GPU then takes. No machine with several GPUs was at hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.devices import compute_of_gpus, layers_of_gpus, owners_of, share_out
from kvserve.core.dtypes import LADDER
from kvserve.core.graph.compute import compute_bytes, n_copies, pinned_bytes
from kvserve.core.machine import Backend
from kvserve.core.memory import DEFAULT_OVERHEADS, estimate, gpu_layer_bytes
from kvserve.core.plan import Launch
from kvserve.units import MIB
from tests.core.shapes import llama3_8b, plain

WHOLE = Launch(Backend.CUDA, LADDER[0], 32768, 4, 512, 512, 33, tensor_split=(17.0, 16.0))
KIB = 1024


@pytest.mark.parametrize(
    ("shares", "n", "counts"),
    [
        ((1, 1), 33, [17, 16]),  # layer 17 lies at 17/33, behind the middle
        ((1, 1), 32, [16, 16]),  # layer 16 lies on the border, which is the next GPU's
        ((3, 1), 33, [25, 8]),  # 24/33 = 0.727 and 25/33 = 0.758
        ((24, 8), 33, [25, 8]),  # only proportions count
        ((0, 1), 33, [0, 33]),
        ((1, 0), 33, [33, 0]),
        ((1, 1, 2), 8, [2, 2, 4]),
        ((1, 1, 1), 10, [4, 3, 3]),  # 3/10 < 1/3, 6/10 < 2/3
        ((0.9, 0.1), 5, [5, 0]),  # 4/5 lies before 0.9: a GPU may get nothing
    ],
)
def test_layers_are_divided_as_load_tensors_does_it(shares, n, counts) -> None:
    owners = owners_of(shares, n)
    assert [owners.count(gpu) for gpu in range(len(shares))] == counts
    assert owners == sorted(owners)


@given(st.lists(st.integers(0, 60), min_size=2, max_size=8).filter(any))
def test_whole_numbers_of_layers_come_back_as_they_are(counts: list[int]) -> None:
    owners = owners_of([float(count) for count in counts], sum(counts))
    assert [owners.count(gpu) for gpu in range(len(counts))] == counts


def test_the_output_lies_on_the_last_gpu_and_the_first_layers_on_the_host() -> None:
    assert layers_of_gpus(llama3_8b(), WHOLE) == (range(17), range(17, 33))
    partly = replace(WHOLE, n_gpu_layers=21, tensor_split=(11.0, 10.0))
    assert layers_of_gpus(llama3_8b(), partly) == (range(12, 23), range(23, 33))
    empty = replace(WHOLE, tensor_split=(33.0, 0.0))
    assert layers_of_gpus(llama3_8b(), empty) == (range(33), range(33, 33))
    assert compute_of_gpus(llama3_8b(), empty)[1] == 0


@pytest.mark.parametrize("split", [(17.0, 16.0), (30.0, 3.0), (11.0, 11.0, 11.0)])
@pytest.mark.parametrize("n_gpu_layers", [33, 20])
def test_no_byte_is_lost_or_counted_twice(split: tuple[float, ...], n_gpu_layers: int) -> None:
    shape = llama3_8b()
    one = replace(WHOLE, tensor_split=(), n_gpu_layers=n_gpu_layers)
    alone = estimate(shape, one, DEFAULT_OVERHEADS, 1)
    several = estimate(shape, replace(one, tensor_split=split), DEFAULT_OVERHEADS, len(split))
    assert len(several.each) == len(split)
    assert several.gpu.weights_bytes == alone.gpu.weights_bytes
    assert several.gpu.kv_bytes == alone.gpu.kv_bytes
    assert several.gpu.runtime_bytes == len(split) * DEFAULT_OVERHEADS.gpu_bytes
    assert several.host.weights_bytes == alone.host.weights_bytes


def test_the_bytes_of_two_gpus_by_hand() -> None:
    shape = llama3_8b()
    first, second = estimate(shape, WHOLE, DEFAULT_OVERHEADS, 2).each
    layers = shape.layers
    assert first.weights_bytes == sum(layer.weights_bytes for layer in layers[:17])
    assert second.weights_bytes == sum(x.weights_bytes for x in layers[17:]) + shape.output_bytes
    # 8 heads of 128 for K and V in f16: 4 KiB for each token and layer.
    assert first.kv_bytes == 17 * 32768 * 4 * KIB
    assert second.kv_bytes == 15 * 32768 * 4 * KIB


def test_several_gpus_hold_four_copies_of_their_inputs() -> None:
    shape = llama3_8b()
    assert n_copies(shape, WHOLE) == 4
    assert n_copies(shape, replace(WHOLE, tensor_split=())) == 1
    assert n_copies(shape, replace(WHOLE, n_gpu_layers=32)) == 1
    assert n_copies(shape, replace(WHOLE, n_cpu_moe=1)) == 1
    # One copy: 512 rows of 4096 floats, the f16 mask of 512 times 32768, positions, two indices.
    inputs = 8 * MIB + 32 * MIB + 2 * KIB + 2 * 4 * KIB
    alone = compute_bytes(shape, replace(WHOLE, tensor_split=()))
    for one in compute_of_gpus(shape, WHOLE):
        # A kept input is not overwritten in place: one more row of 8 MiB at most.
        assert 3 * inputs <= one - alone + 8 * MIB
        assert one - alone <= 3 * inputs + 8 * MIB
    host = pinned_bytes(shape, WHOLE) - pinned_bytes(shape, replace(WHOLE, tensor_split=()))
    assert host == 3 * (8 + 32) * MIB


def test_what_lies_on_the_host_is_worked_on_by_the_first_gpu() -> None:
    partly = replace(WHOLE, n_gpu_layers=20, tensor_split=(10.0, 10.0))
    first, second = compute_of_gpus(llama3_8b(), partly)
    alone = compute_bytes(llama3_8b(), replace(partly, tensor_split=()))
    assert first > second
    assert first == pytest.approx(alone, rel=0.25)


def test_a_gpu_without_a_layer_of_a_kind_has_no_mask_of_it() -> None:
    shape = plain(n_layer=12, window_every=6, window=1024)
    launch = replace(WHOLE, n_gpu_layers=13, tensor_split=(5.0, 8.0))
    first, second = compute_of_gpus(shape, launch)
    # The first five layers slide over 4 * 1024 + 512 cells; the mask of 32768 is the others'.
    assert second - first > 4 * 32 * MIB - 8 * MIB


@given(
    free=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    n_gpu_layers=st.integers(4, 33),
)
def test_shares_fit_where_any_shares_do(free: list[int], n_gpu_layers: int) -> None:
    shape = plain(n_layer=32)
    launch = replace(WHOLE, n_ctx=4096, n_gpu_layers=n_gpu_layers, tensor_split=())
    sizes = gpu_layer_bytes(shape, launch)
    room = [n * 1024 * MIB for n in free]
    split = share_out(shape, launch, room, DEFAULT_OVERHEADS.gpu_bytes, sizes).tensor_split
    assert sum(split) == n_gpu_layers
    each = estimate(shape, replace(launch, tensor_split=split), DEFAULT_OVERHEADS, len(free)).each
    fits = all(m.total_bytes <= r for m, r in zip(each, room, strict=True))
    grain = len(free) * (max(sizes) + 512 * MIB)
    if sum(sizes) + len(free) * DEFAULT_OVERHEADS.gpu_bytes + grain <= sum(room) and min(free) > 1:
        assert fits
