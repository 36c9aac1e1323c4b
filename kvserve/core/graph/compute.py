"""Bytes of llama.cpp's compute buffers: its worst-case graph, laid out as ggml would."""

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache

from kvserve.core.cells import cache_cells, first_gpu_layer, uses_gpu
from kvserve.core.graph.arena import CPU_ALIGNMENT, CUDA_ALIGNMENT, Tensor
from kvserve.core.graph.attention import add_attention, rotation_sizes
from kvserve.core.graph.feed_forward import add_feed_forward
from kvserve.core.graph.frame import F16, F32, Frame, frame_of
from kvserve.core.graph.recurrent import add_recurrent
from kvserve.core.plan import Launch
from kvserve.core.shape import AttentionCache, LayerShape, ModelShape

_REPEATS = 2
"""A pair of neighbours that came twice changes nothing when it comes again."""
_INDEX_BYTES = 8


def compute_bytes(shape: ModelShape, launch: Launch) -> int:
    """The compute buffer of the device that runs the layers (llama_context::sched_reserve).

    The graph of one full micro-batch with a token of logits for each sequence: the worker sets
    `n_outputs_max` to the number of sequences, so that a whole micro-batch of logits is never
    reserved. On a GPU the inputs are copies of the host's.
    """
    scenes = _scenes(shape, launch)
    on_gpu = uses_gpu(launch)
    return _compute_bytes(shape, replace(launch, n_gpu_layers=int(on_gpu), n_cpu_moe=0), scenes)


@lru_cache(maxsize=4096)
def _compute_bytes(shape: ModelShape, launch: Launch, scenes: tuple["_Scene", ...]) -> int:
    frame = frame_of(shape, launch)
    graph = frame.graph
    residual_bytes = frame.n_tokens * shape.n_embd * F32
    embeddings = graph.add_input(residual_bytes)
    inputs = _Inputs(frame, late=bool(scenes) and scenes[0].on_host)
    # On the host the place for ready embeddings stays empty, and rows are fetched beside it.
    residual = embeddings if frame.on_gpu else graph.add(residual_bytes)
    for scene in scenes:
        here = replace(frame, on_host=scene.on_host, experts_away=scene.experts_away)
        residual = _add_layer(here, shape.layers[scene.layer], residual, inputs)
    n_outputs = min(frame.n_tokens, launch.n_parallel)
    last = graph.add(n_outputs * shape.n_embd * F32, residual)
    graph.use(*inputs.all())
    graph.add(n_outputs * shape.n_vocab * F32, last, kept=True)
    return graph.peak_bytes(CUDA_ALIGNMENT if frame.on_gpu else CPU_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Scene:
    """A layer like `layer`, and where its weights lie."""

    layer: int
    on_host: bool
    experts_away: bool


class _Inputs:
    """Positions, rotations and masks. A graph that begins on the host copies them to the GPU when
    it first needs them, any other at its start (ggml_backend_sched_split_graph)."""

    def __init__(self, frame: Frame, *, late: bool) -> None:
        self._graph = frame.graph
        self._late = late
        self._sizes: dict[object, tuple[int, ...]] = {
            "positions": (frame.n_tokens * F32,),
            "rotations": _rotation_bytes(frame.shape, frame.launch),
        }
        self._sizes |= {("mask", w): (n,) for w, n in _mask_bytes(frame).items()}
        self._there: dict[object, tuple[Tensor, ...]] = {}
        if not self._late:
            for key in self._sizes:
                self._tensors(key)
            for _ in range(2 * len(_mask_bytes(frame))):
                frame.graph.add_input(frame.n_tokens * _INDEX_BYTES)

    def positions(self) -> tuple[Tensor, ...]:
        """The place of each token in its sequence."""
        return self._tensors("positions")

    def rotations(self) -> tuple[Tensor, ...]:
        """The matrices that turn queries, keys and values."""
        return self._tensors("rotations")

    def mask(self, window: int | None) -> tuple[Tensor, ...]:
        """The mask of one kind of cache."""
        return self._tensors(("mask", window))

    def all(self) -> tuple[Tensor, ...]:
        """All that there is so far."""
        return tuple(tensor for tensors in self._there.values() for tensor in tensors)

    def _tensors(self, key: object) -> tuple[Tensor, ...]:
        if key not in self._there:
            add = self._graph.add if self._late else self._graph.add_input
            self._there[key] = tuple(add(n_bytes) for n_bytes in self._sizes[key])
        return self._there[key]


def pinned_bytes(shape: ModelShape, launch: Launch) -> int:
    """The host side of a GPU's graph: the inputs, and the embedded tokens beside their place."""
    frame = frame_of(shape, launch)
    embeddings = 2 * frame.n_tokens * shape.n_embd * F32
    return embeddings + sum(_mask_bytes(frame).values()) + sum(_rotation_bytes(shape, launch))


def _add_layer(frame: Frame, layer: LayerShape, residual: Tensor, inputs: _Inputs) -> Tensor:
    """Norm, mixer and sum, then norm, feed-forward network and sum, as far as there are any."""
    graph = frame.graph
    if layer.attention is not None or layer.recurrent is not None:
        x = frame.norm(residual)
        addends = [residual]
        if layer.attention is not None:
            addends.insert(0, add_attention(frame, x, layer, inputs))
        if layer.recurrent is not None:
            # The delta rule's result is seen through a view: the sum takes the residual's place.
            at = 0 if frame.widths(layer).ssm_in else len(addends)
            addends.insert(at, add_recurrent(frame, x, layer))
        residual = graph.add(residual.n_bytes, *addends, in_place=True)
    widths = frame.widths(layer)
    if widths.ff or widths.expert_ff:
        out = add_feed_forward(frame, frame.norm(residual), layer)
        residual = graph.add(residual.n_bytes, out, residual, in_place=True)
    return residual


def _mask_bytes(frame: Frame) -> dict[int | None, int]:
    """One f16 mask (f32 without flash attention) for each kind of cache, by window."""
    element = F16 if frame.launch.flash_attn else F32
    return {
        window: cache_cells(window, frame.launch) * frame.n_tokens * element
        for window in _kinds(frame.shape)
    }


def _rotation_bytes(shape: ModelShape, launch: Launch) -> tuple[int, ...]:
    """The Hadamard matrices of each kind of cache."""
    sizes = (size for cache in _kinds(shape).values() for size in rotation_sizes(cache, launch))
    return tuple(size * size * F32 for size in sizes if size)


def _kinds(shape: ModelShape) -> dict[int | None, AttentionCache]:
    """The kinds of attention cache by window: llama.cpp keeps each in one cache of its own."""
    caches = (layer.attention for layer in shape.layers)
    return {cache.window: cache for cache in caches if cache is not None}


def _scenes(shape: ModelShape, launch: Launch) -> tuple[_Scene, ...]:
    """The layers that show all there is to see: those that follow a neighbour of another kind, or
    of their own, for the first times."""
    on_gpu = uses_gpu(launch)
    first = first_gpu_layer(shape, launch) if on_gpu else 0
    n_away = launch.n_cpu_moe if on_gpu else 0
    seen: Counter[tuple[_Scene | None, _Scene]] = Counter()
    kept = []
    before = None
    for index, kind in enumerate(_kinds_of_layers(shape)):
        scene = _Scene(kind, on_host=index < first, experts_away=index < n_away)
        seen[before, scene] += 1
        if seen[before, scene] <= _REPEATS:
            kept.append(scene)
        before = scene
    return tuple(kept)


@lru_cache(maxsize=64)
def _kinds_of_layers(shape: ModelShape) -> tuple[int, ...]:
    """For each layer the one of its kind whose matrices are largest: on their way to the GPU they
    count, and which layer has finer ones changes from file to file."""
    largest: dict[object, LayerShape] = {}
    for layer in shape.layers:
        kind = (layer.attention, layer.recurrent, layer.widths)
        known = largest.setdefault(kind, layer)
        if layer.weights_bytes > known.weights_bytes:
            largest[kind] = layer
    return tuple(
        largest[layer.attention, layer.recurrent, layer.widths].index for layer in shape.layers
    )
