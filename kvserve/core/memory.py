"""Bytes of a launch, item by item, from the model's shape alone.

Formulas are llama.cpp's (commit 0c1e57098); each names its source. Compute buffers are the
scheduler's worst-case graph: what lives at its widest moment. docs/memory.md has the derivation
and the measurements.
"""

from dataclasses import dataclass, replace

from kvserve.core.dtypes import CachePair, KvType, row_bytes
from kvserve.core.machine import Backend
from kvserve.core.plan import N_CTX_PADDING, Estimate, Launch, Memory
from kvserve.core.shape import LayerShape, ModelShape
from kvserve.units import MIB

_F32 = 4
_F16 = 2
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


def pad_context(n_ctx: int) -> int:
    """`n_ctx` as llama.cpp allocates it: the next multiple of 256 (src/llama-context.cpp)."""
    return -(-n_ctx // N_CTX_PADDING) * N_CTX_PADDING


def cache_cells(window: int | None, launch: Launch) -> int:
    """Cells of one layer's cache: the context, or the sliding window's need where that is less
    (src/llama-kv-cache-iswa.cpp, unified cache)."""
    n_ctx = pad_context(launch.n_ctx)
    if window is None:
        return n_ctx
    return pad_context(min(n_ctx, window * launch.n_parallel + _ubatch(launch)))


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
    first_on_gpu = _first_gpu_layer(shape, launch)
    gpu = _Sum()
    host = _Sum(weights=shape.input_bytes)
    output_at = gpu if first_on_gpu <= shape.n_layer else host
    output_at.weights += shape.output_bytes
    if output_at is host:
        # A tied tensor serves as input and output where both stay on the host.
        host.weights -= shape.tied_bytes
    for layer in shape.layers:
        on_gpu = layer.index >= first_on_gpu
        place = gpu if on_gpu else host
        experts_away = on_gpu and layer.index < launch.n_cpu_moe
        experts = layer.expert_bytes if experts_away else 0
        place.weights += layer.weights_bytes - experts
        host.weights += experts
        place.kv += kv_bytes(layer, launch)
        place.recurrent += recurrent_bytes(layer, launch)
    uses_gpu = launch.backend is Backend.CUDA and launch.n_gpu_layers > 0
    return Estimate(
        gpu=Memory(
            weights_bytes=gpu.weights,
            kv_bytes=gpu.kv,
            recurrent_bytes=gpu.recurrent,
            compute_bytes=compute_bytes(shape, launch) * n_gpus if uses_gpu else 0,
            runtime_bytes=overheads.gpu_bytes * n_gpus if uses_gpu else 0,
        ),
        host=Memory(
            weights_bytes=host.weights,
            kv_bytes=host.kv,
            recurrent_bytes=host.recurrent,
            compute_bytes=_pinned_bytes(shape, launch)
            if uses_gpu
            else compute_bytes(shape, launch),
            output_bytes=launch.n_parallel * shape.n_vocab * _F32,
            runtime_bytes=overheads.host_bytes,
        ),
    )


def compute_bytes(shape: ModelShape, launch: Launch) -> int:
    """The compute buffer of the device that runs the layers.

    The widest of three moments of a layer, plus the attention masks that live through the whole
    graph: the feed-forward network (gate, up and their product beside three residual-sized
    tensors), attention (four tensors of the width of its heads, and on CUDA the cache converted
    to f16 where it is quantized), and the logits of one token for each sequence: the worker sets
    `n_outputs_max` to the number of sequences, so that a whole ubatch of logits is never
    reserved.
    """
    n_ubatch = _ubatch(launch)
    residual = n_ubatch * shape.n_embd * _F32
    experts_out = shape.n_expert_used * residual if shape.n_expert else 0
    feed_forward = 3 * n_ubatch * shape.n_ff * _F32 + 3 * residual + experts_out
    attention = 4 * n_ubatch * _attention_width(shape) * _F32 + _f16_scratch_bytes(shape, launch)
    recurrent = _recurrent_stage_bytes(shape, n_ubatch)
    logits = launch.n_parallel * shape.n_vocab * _F32 + residual
    if _is_split(shape, launch):
        # Layers on the host run their large batches on the GPU too: their weights, and their
        # cache (V twice where it is quantized), are copied there for the time of one layer.
        feed_forward += max((layer.weights_bytes for layer in shape.layers), default=0) // 3
        attention += _streamed_cache_bytes(shape, launch) + residual
    widest = max(feed_forward, attention, recurrent, logits)
    inputs = residual if launch.backend is Backend.CPU and not launch.pair.quantized else 0
    return widest + _mask_bytes(shape, launch) + inputs + _rotation_bytes(launch.pair)


def max_context(
    shape: ModelShape, launch: Launch, overheads: Overheads, n_gpus: int, free_bytes: int
) -> int:
    """The longest context, a multiple of 256 up to the model's own, with which the launch fits
    `free_bytes` of the device that decides; 0 where none does."""
    low, high = 0, max(1, pad_context(shape.n_ctx_train) // N_CTX_PADDING)
    while low < high:
        middle = (low + high + 1) // 2
        trial = with_context(launch, middle * N_CTX_PADDING)
        if deciding(estimate(shape, trial, overheads, n_gpus), trial).total_bytes <= free_bytes:
            low = middle
        else:
            high = middle - 1
    return min(low * N_CTX_PADDING, shape.n_ctx_train)


def deciding(bill: Estimate, launch: Launch) -> Memory:
    """The memory of the device that decides: the GPUs, or the host without one."""
    return bill.gpu if launch.backend is Backend.CUDA and launch.n_gpu_layers > 0 else bill.host


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
    )


@dataclass(slots=True)
class _Sum:
    weights: int = 0
    kv: int = 0
    recurrent: int = 0


def _ubatch(launch: Launch) -> int:
    return min(launch.n_ubatch, launch.n_batch, pad_context(launch.n_ctx))


def _first_gpu_layer(shape: ModelShape, launch: Launch) -> int:
    """Index of the first layer on the GPU; the output counts as layer n_layer, and n_layer + 1
    means none (llama_model_base::load_tensors)."""
    if launch.backend is Backend.CPU:
        return shape.n_layer + 1
    return max(shape.n_layer + 1 - launch.n_gpu_layers, 0)


def _is_split(shape: ModelShape, launch: Launch) -> bool:
    on_gpu = launch.backend is Backend.CUDA and launch.n_gpu_layers > 0
    return on_gpu and (launch.n_gpu_layers <= shape.n_layer or launch.n_cpu_moe > 0)


def _attention_width(shape: ModelShape) -> int:
    heads = max(
        (layer.attention.k_head_size for layer in shape.attention_layers if layer.attention),
        default=0,
    )
    return max(shape.n_embd, shape.n_head * heads)


def _mask_bytes(shape: ModelShape, launch: Launch) -> int:
    """One f16 mask (f32 without flash attention) for each kind of cache, cells x ubatch."""
    element = _F16 if launch.flash_attn else _F32
    windows = {layer.attention.window for layer in shape.attention_layers if layer.attention}
    return sum(cache_cells(window, launch) * _ubatch(launch) * element for window in windows)


def _f16_scratch_bytes(shape: ModelShape, launch: Launch) -> int:
    """K and V of one layer as f16, where CUDA's prefill kernels get a quantized cache
    (ggml-cuda/fattn.cu: the allocation size of the flash-attention node)."""
    if launch.backend is Backend.CPU or not launch.pair.quantized:
        return 0
    return max(
        (
            _F16
            * cache_cells(layer.attention.window, launch)
            * (layer.attention.k_elements + layer.attention.v_elements)
            for layer in shape.attention_layers
            if layer.attention
        ),
        default=0,
    )


def _streamed_cache_bytes(shape: ModelShape, launch: Launch) -> int:
    def layer_bytes(layer: LayerShape) -> int:
        if layer.attention is None:
            return 0
        k = row_bytes(launch.pair.k, layer.attention.k_elements)
        v = row_bytes(launch.pair.v, layer.attention.v_elements)
        v_copies = 2 if launch.pair.v.quantized else 1
        return (k + v_copies * v) * cache_cells(layer.attention.window, launch)

    return max((layer_bytes(layer) for layer in shape.layers), default=0)


def _recurrent_stage_bytes(shape: ModelShape, n_ubatch: int) -> int:
    widest = max(
        (layer.recurrent.r_elements for layer in shape.layers if layer.recurrent), default=0
    )
    return 3 * n_ubatch * widest * _F32


def _rotation_bytes(pair: CachePair) -> int:
    """The Hadamard matrices of the K and V rotation, 128 x 128 and 64 x 64 f32 at most."""
    return (128 * 128 + 64 * 64) * _F32 if pair.quantized else 0


def _pinned_bytes(shape: ModelShape, launch: Launch) -> int:
    """The host side of the CUDA graph: masks and the embedded tokens, twice."""
    inputs = 2 * _ubatch(launch) * shape.n_embd * _F32
    return _mask_bytes(shape, launch) + inputs + _rotation_bytes(launch.pair)


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
