"""Bytes of a launch, item by item, from the model's shape alone.

Formulas are llama.cpp's (commit 0c1e57098); each names its source. `compute` has the compute
buffers. docs/memory.md has the derivation and the measurements.
"""

from dataclasses import dataclass, replace
from functools import reduce

from kvserve.core.cells import cache_cells, first_gpu_layer, pad_context, uses_gpu
from kvserve.core.devices import compute_of_gpus, layers_of_gpus
from kvserve.core.dtypes import KvType, row_bytes
from kvserve.core.graph.compute import compute_bytes, pinned_bytes
from kvserve.core.plan import N_CTX_PADDING, Estimate, Launch, Memory
from kvserve.core.shape import LayerShape, ModelShape
from kvserve.units import MIB

_F32 = 4
_PRIOR_UBATCH = 512


@dataclass(frozen=True, slots=True)
class Overheads:
    """What a process costs beside llama.cpp's own buffers, in bytes.

    `gpu_bytes` is per GPU: CUDA context, loaded kernels, cuBLAS workspace, graphs. `host_bytes`
    is the worker process: the interpreter, the libraries, the tokenizer.
    """

    gpu_bytes: int
    host_bytes: int


HOPPER_OVERHEADS = Overheads(gpu_bytes=607 * MIB, host_bytes=250 * MIB)
"""H100, CUDA 13: 606.5 MiB with every context and pair tried (docs/memory.md)."""

DEFAULT_OVERHEADS = Overheads(gpu_bytes=450 * MIB, host_bytes=250 * MIB)
"""A prior for cards nobody has measured yet; the first load on a machine replaces it."""


CPU_OVERHEADS = Overheads(gpu_bytes=0, host_bytes=128 * MIB)
"""A worker without a GPU: Python, its libraries and what they allocate. Gemma 3 270M: 80 MiB."""


def prior_overheads(
    compute_capability: tuple[int, int] | None, shape: ModelShape | None = None
) -> Overheads:
    """The overheads to assume before a first load of this kind of model on this kind of GPU.

    Routed experts take three more copies of a batch's rows, sorted by expert (ggml-cuda's pool
    for mul_mat_id; 99 MiB measured for 8 experts of 2048 wide rows, 96 by this).
    """
    prior = HOPPER_OVERHEADS if compute_capability == (9, 0) else DEFAULT_OVERHEADS
    if shape is None or not shape.n_expert:
        return prior
    sorted_rows = 3 * _PRIOR_UBATCH * shape.n_expert_used * shape.n_embd * _F32
    return replace(prior, gpu_bytes=prior.gpu_bytes + sorted_rows)


def kv_bytes(layer: LayerShape, launch: Launch) -> int:
    """K and V rows of one layer, all cells. 0 for a layer without a cache of its own."""
    cache = layer.attention
    if cache is None:
        return 0
    per_cell = row_bytes(launch.pair.k, cache.k_elements)
    per_cell += row_bytes(launch.pair.v, cache.v_elements)
    return per_cell * cache_cells(cache.window, launch)


def recurrent_bytes(layer: LayerShape, launch: Launch) -> int:
    """f32 state of one layer for all sequences (src/llama-memory-recurrent.cpp)."""
    if layer.recurrent is None:
        return 0
    elements = layer.recurrent.r_elements + layer.recurrent.s_elements
    return elements * _F32 * max(1, launch.n_parallel)


def estimate(shape: ModelShape, launch: Launch, overheads: Overheads, n_gpus: int) -> Estimate:
    """What a launch takes on the GPUs (all together) and on the host."""
    first_on_gpu = first_gpu_layer(shape, launch)
    gpu = _Sum()
    host = _Sum(weights=shape.input_bytes)
    output_at = gpu if first_on_gpu <= shape.n_layer else host
    output_at.weights += shape.output_bytes
    if output_at is host:
        # A tied tensor serves as input and output where both stay on the host.
        host.weights -= shape.tied_bytes
    for layer in shape.layers:
        there = layer.index >= first_on_gpu
        place = gpu if there else host
        experts_away = there and layer.index < launch.n_cpu_moe
        experts = layer.expert_bytes if experts_away else 0
        place.weights += layer.weights_bytes - experts
        host.weights += experts
        place.kv += kv_bytes(layer, launch)
        place.recurrent += recurrent_bytes(layer, launch)
    on_gpu, draft = uses_gpu(launch), launch.draft_model
    each = _each_gpu(shape, launch, overheads) if on_gpu and len(launch.tensor_split) > 1 else ()
    if each:
        on_gpus = reduce(Memory.plus, each)
    else:
        on_gpus = Memory(
            weights_bytes=gpu.weights,
            kv_bytes=gpu.kv,
            recurrent_bytes=gpu.recurrent,
            compute_bytes=compute_bytes(shape, launch) * n_gpus if on_gpu else 0,
            runtime_bytes=overheads.gpu_bytes * n_gpus if on_gpu else 0,
        )
    return Estimate(
        gpu=replace(on_gpus, draft_bytes=draft.on_gpu(launch.n_ctx) if draft and on_gpu else 0),
        host=Memory(
            weights_bytes=host.weights,
            kv_bytes=host.kv,
            recurrent_bytes=host.recurrent,
            compute_bytes=pinned_bytes(shape, launch) if on_gpu else compute_bytes(shape, launch),
            output_bytes=launch.n_parallel * shape.n_vocab * _F32,
            # The first batch with drafted tokens makes the output buffer longer (output_reserve).
            runtime_bytes=overheads.host_bytes + launch.n_draft * shape.n_vocab * _F32,
            draft_bytes=draft.on_host(launch.n_ctx) if draft and not on_gpu else 0,
        ),
        each=each,
    )


def gpu_layer_bytes(shape: ModelShape, launch: Launch) -> list[int]:
    """Weights and caches of each layer on the GPUs, from the first one there to the output."""
    sizes = []
    for layer in shape.layers[first_gpu_layer(shape, launch) :]:
        away = layer.expert_bytes if layer.index < launch.n_cpu_moe else 0
        kept = kv_bytes(layer, launch) + recurrent_bytes(layer, launch)
        sizes.append(layer.weights_bytes - away + kept)
    return [*sizes, shape.output_bytes]


def _each_gpu(shape: ModelShape, launch: Launch, overheads: Overheads) -> tuple[Memory, ...]:
    """Every GPU's memory: its layers, its compute buffer, and a process."""
    every = []
    compute = compute_of_gpus(shape, launch)
    for layers, compute_size in zip(layers_of_gpus(shape, launch), compute, strict=True):
        weights = kv = recurrent = 0
        for index in layers:
            if index == shape.n_layer:
                weights += shape.output_bytes
                continue
            layer = shape.layers[index]
            away = layer.expert_bytes if index < launch.n_cpu_moe else 0
            weights += layer.weights_bytes - away
            kv += kv_bytes(layer, launch)
            recurrent += recurrent_bytes(layer, launch)
        every.append(
            Memory(weights, kv, recurrent, compute_size, runtime_bytes=overheads.gpu_bytes)
        )
    return tuple(every)


def may_fit(
    shape: ModelShape, launch: Launch, overheads: Overheads, n_gpus: int, free_bytes: int
) -> bool:
    """Whether weights, caches and runtime alone fit the GPUs: a quick look before an estimate."""
    first = first_gpu_layer(shape, launch)
    taken = overheads.gpu_bytes * n_gpus + (shape.output_bytes if first <= shape.n_layer else 0)
    for layer in shape.layers[first:]:
        taken += layer.weights_bytes + kv_bytes(layer, launch) + recurrent_bytes(layer, launch)
        taken -= layer.expert_bytes if layer.index < launch.n_cpu_moe else 0
    return taken <= free_bytes


def max_context(
    shape: ModelShape, launch: Launch, overheads: Overheads, n_gpus: int, free_bytes: int
) -> int:
    """The longest context, a multiple of 256 up to the model's own, with which the launch fits
    `free_bytes` of the device that decides; 0 where none does.

    With layers on both sides a longer one may fit again: copies of weights and cache share the
    compute buffer there, and its holes move.
    """

    def needed(n_steps: int) -> int:
        trial = with_context(launch, n_steps * N_CTX_PADDING)
        return deciding(estimate(shape, trial, overheads, n_gpus), trial).total_bytes

    low, high = 1, max(1, pad_context(shape.n_ctx_train) // N_CTX_PADDING)
    low_bytes, high_bytes = needed(low), needed(high)
    if high_bytes <= free_bytes:
        return shape.n_ctx_train
    if low_bytes > free_bytes:
        return 0
    # Memory grows almost in proportion: a guess by that, then one by halves, in turn.
    halve = False
    while high - low > 1:
        step = (high - low) // 2
        if not halve:
            step = (high - low) * (free_bytes - low_bytes) // (high_bytes - low_bytes)
        halve = not halve
        middle = min(max(low + step, low + 1), high - 1)
        n_bytes = needed(middle)
        if n_bytes <= free_bytes:
            low, low_bytes = middle, n_bytes
        else:
            high, high_bytes = middle, n_bytes
    return low * N_CTX_PADDING


def deciding(bill: Estimate, launch: Launch) -> Memory:
    """The memory of the device that decides: the GPUs, or the host without one."""
    return bill.gpu if uses_gpu(launch) else bill.host


def with_context(launch: Launch, n_ctx: int) -> Launch:
    """The same launch with another context."""
    return Launch(
        backend=launch.backend,
        pair=launch.pair,
        n_ctx=n_ctx,
        n_parallel=launch.n_parallel,
        n_batch=launch.n_batch,
        n_ubatch=launch.n_ubatch,
        n_gpu_layers=launch.n_gpu_layers,
        n_cpu_moe=launch.n_cpu_moe,
        flash_attn=launch.flash_attn,
        tensor_split=launch.tensor_split,
        n_draft=launch.n_draft,
        draft_model=launch.draft_model,
    )


@dataclass(slots=True)
class _Sum:
    weights: int = 0
    kv: int = 0
    recurrent: int = 0


def supports_rows(shape: ModelShape, kv_type: KvType) -> bool:
    """Whether every row and head of the cache divides into the type's blocks of 32."""
    if not kv_type.quantized:
        return True
    return all(
        size % 32 == 0
        for layer in shape.attention_layers
        if layer.attention
        for size in (layer.attention.k_head_size, layer.attention.v_head_size)
    )
