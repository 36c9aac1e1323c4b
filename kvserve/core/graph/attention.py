"""The tensors of attention (llm_graph_context::build_qkv, build_attn and build_attn_mha).

ggml computes a tensor's first source before its second, and takes over the place of no view:
norms of heads and RoPE see their projection through one.
"""

from typing import Protocol

from kvserve.core.cells import cache_cells
from kvserve.core.dtypes import KvType, row_bytes
from kvserve.core.graph.arena import Tensor
from kvserve.core.graph.frame import F16, F32, Frame, attention_of
from kvserve.core.plan import Launch
from kvserve.core.shape import AttentionCache, LayerShape

V_ROTATION = 64


class Inputs(Protocol):
    """The graph's inputs that attention reads."""

    def positions(self) -> tuple[Tensor, ...]:
        """The place of each token in its sequence."""
        ...

    def rotations(self) -> tuple[Tensor, ...]:
        """The matrices that turn queries, keys and values."""
        ...

    def mask(self, window: int | None) -> tuple[Tensor, ...]:
        """The mask of one kind of cache."""
        ...

    def places(self, window: int | None) -> tuple[Tensor, ...]:
        """Where K and V of each token go in one kind of cache."""
        ...


def add_attention(frame: Frame, x: Tensor, layer: LayerShape, inputs: Inputs) -> Tensor:
    """Attention over the layer's cache; returns what goes to the residual."""
    cache, widths = attention_of(layer), frame.widths(layer)
    if widths.kv_lora:
        return _add_latent_attention(frame, x, layer, inputs)
    rotated_k, rotated_v = rotation_sizes(cache, frame.launch)

    def project(name: str, width: int) -> Tensor:
        return frame.row(width, x, *frame.matrix(layer, name))

    joint = project("attn_qkv", widths.qkv) if widths.qkv else None
    projected = project("attn_q", widths.q) if joint is None else joint
    q = frame.row(widths.attention, projected, *inputs.positions())
    # A gate of the query is the other half of its projection, and waits for the end
    # (src/models/qwen35.cpp).
    gated = projected if widths.q >= 2 * widths.attention else None
    if rotated_k:
        q = frame.row(widths.attention, q, *inputs.rotations())
    v = project("attn_v", cache.v_elements) if joint is None else joint
    if rotated_v:
        v = frame.row(cache.v_elements, v, *inputs.rotations())
    k = project("attn_k", cache.k_elements) if joint is None else joint
    k = frame.row(cache.k_elements, k)
    if rotated_k:
        k = frame.row(cache.k_elements, k, *inputs.rotations())
    places = inputs.places(cache.window)
    frame.graph.use(k, *places)
    frame.graph.use(v, *places)
    mixed = _add_mix(frame, q, layer, inputs, widths.attention)
    if rotated_v:
        mixed = frame.row(widths.attention, mixed, *inputs.rotations())
    if gated is not None:
        gate = frame.row(widths.attention, gated)
        mixed = frame.graph.add(gate.n_bytes, gate, mixed, in_place=True)
    return frame.residual(mixed, *frame.matrix(layer, "attn_output"))


def rotation_sizes(cache: AttentionCache, launch: Launch) -> tuple[int, int]:
    """Rows of the Hadamard matrices for K and V, 0 where there is none: for K the largest 64 * 2^n
    that divides the head, for V 64. MLA rows are not rotated (src/llama-kv-cache.cpp)."""
    if cache.v_elements == 0:
        return 0, 0
    k = v = 0
    if launch.pair.k.quantized and cache.k_head_size % 64 == 0:
        k = 64
        while cache.k_head_size % (2 * k) == 0:
            k *= 2
    if launch.pair.v.quantized and cache.v_head_size % V_ROTATION == 0:
        v = V_ROTATION
    return k, v


def _add_latent_attention(frame: Frame, x: Tensor, layer: LayerShape, inputs: Inputs) -> Tensor:
    """MLA with the absorbed key matrix (src/models/deepseek2.cpp)."""
    widths, n_head = frame.widths(layer), frame.shape.n_head
    rope = widths.kv_lora_rope - widths.kv_lora
    q = frame.row(widths.q_lora, x) if widths.q_lora else x
    q = frame.row(widths.q, q)
    absorbed = frame.row(n_head * widths.kv_lora, q)
    q_rope = frame.row(n_head * rope, q)
    q = frame.row(n_head * widths.kv_lora_rope, absorbed, q_rope)
    kv = frame.row(widths.kv_lora_rope, x)
    latent = frame.row(widths.kv_lora, kv)
    k_rope = frame.row(rope, kv)
    places = inputs.places(attention_of(layer).window)
    frame.graph.use(frame.row(widths.kv_lora_rope, latent, k_rope), *places)
    mixed = _add_mix(frame, q, layer, inputs, n_head * widths.kv_lora)
    mixed = frame.row(n_head * widths.mla_v, mixed)
    mixed = frame.row(n_head * widths.mla_v, mixed)
    return frame.residual(mixed)


def _add_mix(frame: Frame, q: Tensor, layer: LayerShape, inputs: Inputs, width: int) -> Tensor:
    """Softmax attention over the cache, `width` elements for each token."""
    cache, launch = attention_of(layer), frame.launch
    cells = cache_cells(cache.window, launch)
    k = frame.streamed(row_bytes(launch.pair.k, cache.k_elements) * cells)
    # A quantized V takes a second place: the next layer's does not fit the hole of the last
    # (measured on an H100; the reason in the order of the copies is not found).
    n_v = 2 if launch.pair.v.quantized else 1
    v = frame.streamed(n_v * row_bytes(launch.pair.v, cache.v_elements) * cells)
    mask = inputs.mask(cache.window)
    if not launch.flash_attn:
        scores = frame.graph.add(
            cells * frame.n_tokens * frame.shape.n_head * F32, q, *mask, *k, *v
        )
        return frame.row(width, frame.row(width, scores))
    n_bytes = frame.n_tokens * width * F32 + _f16_bytes(frame, cache, cells)
    return frame.graph.add(n_bytes, q, *mask, *k, *v)


def _f16_bytes(frame: Frame, cache: AttentionCache, cells: int) -> int:
    """K and V of one layer as f16 behind the result, where CUDA's prefill kernels get another
    type; an MLA cache's V is a part of its K (ggml_cuda_flash_attn_ext_get_f16_extra_data)."""
    if not frame.on_gpu:
        return 0
    pair = frame.launch.pair
    k = 0 if pair.k is KvType.F16 else cache.k_elements
    v = 0 if pair.v is KvType.F16 else cache.v_elements
    return F16 * cells * (k + v)
