"""Several GPUs: which layers llama.cpp gives to each, and what each then takes.

Layers are split by `tensor_split` as `llama_model_base::load_tensors` does it, in single precision.
The rules are read in llama.cpp's source (commit 0c1e57098), tested on cases worked out by hand, and
measured on two GPUs (docs/memory.md).
"""

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from kvserve.core.cells import first_gpu_layer
from kvserve.core.graph.compute import part_bytes
from kvserve.core.plan import Launch
from kvserve.core.shape import ModelShape

_LEVELS = 12


def layers_of_gpus(shape: ModelShape, launch: Launch) -> tuple[range, ...]:
    """The layers of each GPU; the output counts as layer `n_layer`."""
    first = first_gpu_layer(shape, launch)
    n = shape.n_layer + 1 - first
    if len(launch.tensor_split) < 2:
        return (range(first, shape.n_layer + 1),)
    owners = owners_of(launch.tensor_split, n)
    ends = [first + bisect_right(owners, gpu) for gpu in range(len(launch.tensor_split))]
    return tuple(range(a, b) for a, b in zip([first, *ends], ends, strict=False))


def owners_of(shares: Sequence[float], n: int) -> list[int]:
    """The GPU of each of `n` consecutive layers: the first whose cumulated share is above the
    layer's place (`std::upper_bound` over floats)."""
    sums = list(accumulate((_f32(share) for share in shares), lambda a, b: _f32(a + b)))
    points = [_f32(s / sums[-1]) for s in sums]
    return [min(bisect_right(points, _f32(i / n)), len(points) - 1) for i in range(n)]


def compute_of_gpus(shape: ModelShape, launch: Launch) -> tuple[int, ...]:
    """The compute buffer of each GPU. What lies on the host is worked on by the first one, which
    is asked first (ggml_backend_sched_backend_id_from_cur)."""
    every = []
    for gpu, layers in enumerate(layers_of_gpus(shape, launch)):
        begin = 0 if gpu == 0 else layers.start
        inside = range(begin, min(layers.stop, shape.n_layer))
        output = shape.n_layer in layers
        works = bool(layers) or (gpu == 0 and begin < layers.start)
        every.append(part_bytes(shape, launch, inside, output=output) if works else 0)
    return tuple(every)


def share_out(
    shape: ModelShape,
    launch: Launch,
    free_bytes: Sequence[int],
    fixed_bytes: int,
    layer_bytes: Sequence[int],
) -> Launch:
    """The launch with the `tensor_split` that fills all GPUs to the same degree.

    `free_bytes` is of each GPU, `fixed_bytes` what a process takes of each, `layer_bytes` are the
    weights and caches of each layer on a GPU, from the first one there to the output. The shares
    are whole numbers of layers, so that llama.cpp's division gives them back as they are. Where
    nothing fits they are in proportion to the free memory.
    """
    n = len(layer_bytes)
    total = sum(free_bytes)
    owners = owners_of([f / total for f in free_bytes], n) if total > 0 else [0] * n
    best = replace(launch, tensor_split=_counts(owners, len(free_bytes)))
    compute = max(compute_of_gpus(shape, best))
    room = [max(0, free - fixed_bytes - compute) for free in free_bytes]
    low, high = 0.0, 1.0
    for _ in range(_LEVELS):
        level = (low + high) / 2
        filled = _filled([level * r for r in room], layer_bytes)
        if filled is None:
            low = level
        else:
            high, best = level, replace(launch, tensor_split=filled)
    if high == 1.0 and (filled := _filled(room, layer_bytes)) is not None:
        best = replace(launch, tensor_split=filled)
    return best


def _filled(room: Sequence[float], layer_bytes: Sequence[int]) -> tuple[float, ...] | None:
    """Whole layers in order, each GPU up to its room; None where some are left over."""
    counts, at = [], 0
    for bytes_left in room:
        begin, left = at, bytes_left
        while at < len(layer_bytes) and layer_bytes[at] <= left:
            left -= layer_bytes[at]
            at += 1
        counts.append(float(at - begin))
    return tuple(counts) if at == len(layer_bytes) else None


def _counts(owners: Sequence[int], n_gpus: int) -> tuple[float, ...]:
    return tuple(float(owners.count(gpu)) for gpu in range(n_gpus))


def _f32(number: float) -> float:
    value: float = struct.unpack("f", struct.pack("f", number))[0]
    return value
