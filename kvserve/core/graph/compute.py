"""Bytes of llama.cpp's compute buffers: its worst-case graph, laid out as ggml would."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from kvserve.core.cells import cache_cells, first_gpu_layer, uses_gpu
from kvserve.core.graph.arena import CPU_ALIGNMENT, CUDA_ALIGNMENT, Graph, Tensor
from kvserve.core.graph.attention import add_attention, rotation_sizes
from kvserve.core.graph.feed_forward import add_feed_forward
from kvserve.core.graph.frame import F16, F32, Frame, frame_of, state_of
from kvserve.core.graph.recurrent import add_delta_rule, add_scan, scans
from kvserve.core.plan import Launch
from kvserve.core.shape import AttentionCache, LayerShape, ModelShape

_REPEATS = 2
"""A pair of neighbours that came twice changes nothing when it comes again."""
_INDEX_BYTES = 8


N_COPIES = 4
"""GGML_SCHED_MAX_COPIES: with several GPUs the inputs of each part are held for so many
micro-batches, which the GPUs work on one behind the other (ggml_backend_sched_new)."""


def compute_bytes(shape: ModelShape, launch: Launch) -> int:
    """The compute buffer of the device that runs the layers (llama_context::sched_reserve).

    The graph of one full micro-batch with a token of logits for each sequence and each drafted
    token: the worker sets `n_outputs_max` to their number, so that a whole micro-batch of logits is
    never reserved. On a GPU the inputs are copies of the host's.
    """
    return part_bytes(shape, launch, range(shape.n_layer), output=True)


def part_bytes(shape: ModelShape, launch: Launch, layers: range, *, output: bool) -> int:
    """The same for one of several GPUs: that of `layers`, and with `output` of the logits."""
    part = _Part(_scenes(shape, launch, layers), output, n_copies(shape, launch))
    on_gpu = uses_gpu(launch)
    plain = replace(launch, n_gpu_layers=int(on_gpu), n_cpu_moe=0, tensor_split=())
    return _compute_bytes(shape, plain, part)


def n_copies(shape: ModelShape, launch: Launch) -> int:
    """How often inputs are held: once, or `N_COPIES` times where several GPUs hold all layers and
    no tensor is moved elsewhere (the conditions of llama_context::llama_context)."""
    whole = launch.n_gpu_layers > shape.n_layer and not launch.n_cpu_moe
    return N_COPIES if len(launch.tensor_split) > 1 and whole else 1


@lru_cache(maxsize=4096)
def _compute_bytes(shape: ModelShape, launch: Launch, part: "_Part") -> int:
    frame = frame_of(shape, launch)
    graph, scenes = frame.graph, part.scenes
    residual_bytes = frame.n_tokens * shape.n_embd * F32
    embeddings = _add_inputs(graph, residual_bytes, part.n_copies)
    inputs = _Inputs(frame, part)
    # On the host the place for ready embeddings stays empty, and rows are fetched beside it.
    residual = embeddings if frame.on_gpu else graph.add(residual_bytes)
    fetched: Tensor | None = None
    n_outputs = min(frame.n_tokens, launch.n_outputs) if part.output else None
    layers = [shape.layers[scene.layer] for scene in scenes]
    for scene, layer, after in zip(scenes, layers, [*layers[1:], None], strict=False):
        here = replace(frame, on_host=scene.on_host, experts_away=scene.experts_away)
        if scans(frame, layer) and fetched is None:
            fetched = frame.state(state_of(layer).r_elements)
        n_rows = n_outputs if after is None else None
        residual, fetched = _add_layer(here, layer, residual, inputs, fetched, after, n_rows)
    if n_outputs is not None:
        last = graph.add(n_outputs * shape.n_embd * F32, residual, in_place=True)
        graph.add(n_outputs * shape.n_vocab * F32, last, kept=True)
    else:
        graph.use(residual)
    return graph.peak_bytes(CUDA_ALIGNMENT if frame.on_gpu else CPU_ALIGNMENT)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one device computes, and how often it holds its inputs."""

    scenes: tuple["_Scene", ...]
    output: bool
    n_copies: int


@dataclass(frozen=True, slots=True)
class _Scene:
    """A layer like `layer`, and where its weights lie."""

    layer: int
    on_host: bool
    experts_away: bool


class _Inputs:
    """Positions, rotations and masks. A graph that begins on the host copies them to the GPU when
    it first needs them, any other at its start (ggml_backend_sched_split_graph)."""

    def __init__(self, frame: Frame, part: _Part) -> None:
        self._graph = frame.graph
        self._late = bool(part.scenes) and part.scenes[0].on_host
        self._n_copies = part.n_copies
        kinds = _kinds_of(frame.shape.layers[scene.layer] for scene in part.scenes)
        self._sizes: dict[object, tuple[int, ...]] = {
            "positions": (frame.n_tokens * F32,),
            "rotations": _rotation_bytes(kinds, frame.launch),
        }
        self._sizes |= {("mask", w): (n,) for w, n in _mask_bytes(frame, kinds).items()}
        self._there: dict[object, tuple[Tensor, ...]] = {}
        if not self._late:
            for key in self._sizes:
                self._tensors(key)
            for window in kinds:
                places = (frame.n_tokens * _INDEX_BYTES,) * 2
                self._there["places", window] = tuple(self._add(n) for n in places)

    def positions(self) -> tuple[Tensor, ...]:
        """The place of each token in its sequence."""
        return self._tensors("positions")

    def rotations(self) -> tuple[Tensor, ...]:
        """The matrices that turn queries, keys and values."""
        return self._tensors("rotations")

    def mask(self, window: int | None) -> tuple[Tensor, ...]:
        """The mask of one kind of cache."""
        return self._tensors(("mask", window))

    def places(self, window: int | None) -> tuple[Tensor, ...]:
        """Where K and V of each token go in one kind of cache."""
        return self._there.get(("places", window), ())

    def _tensors(self, key: object) -> tuple[Tensor, ...]:
        if key not in self._there:
            self._there[key] = tuple(self._add(n_bytes) for n_bytes in self._sizes[key])
        return self._there[key]

    def _add(self, n_bytes: int) -> Tensor:
        if self._late:
            return self._graph.add(n_bytes)
        return _add_inputs(self._graph, n_bytes, self._n_copies)


def _add_inputs(graph: Graph, n_bytes: int, n_copies: int) -> Tensor:
    """An input, and its copies for the micro-batches that follow."""
    copies = [graph.add_input(n_bytes, kept=n_copies > 1) for _ in range(n_copies)]
    return copies[-1]


def pinned_bytes(shape: ModelShape, launch: Launch) -> int:
    """The host side of a GPU's graph: the inputs, and the embedded tokens beside their place."""
    frame = frame_of(shape, launch)
    rows = frame.n_tokens * shape.n_embd * F32
    kinds = _kinds_of(shape.layers)
    inputs = rows + sum(_mask_bytes(frame, kinds).values())
    inputs += sum(_rotation_bytes(kinds, launch))
    return rows + n_copies(shape, launch) * inputs


def _add_layer(
    frame: Frame,
    layer: LayerShape,
    residual: Tensor,
    inputs: _Inputs,
    fetched: Tensor | None,
    after: LayerShape | None,
    n_rows: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Norm, mixer and sum, then norm, feed-forward network and sum, as far as there are any. From
    the mixer on the last layer goes on with the `n_rows` tokens whose logits are wanted.

    `fetched` is the state that a scan goes on from; the second result is that of the layer `after`
    this one, where it was fetched here."""
    graph = frame.graph
    ahead: Tensor | None = None
    if layer.attention is not None or layer.recurrent is not None:
        x = frame.norm(residual)
        addends = [residual]
        if layer.attention is not None:
            addends.insert(0, add_attention(frame, x, layer, inputs))
        if fetched is not None:
            next_scan = after if scans(frame, after) else None
            scanned, ahead = add_scan(frame, x, layer, fetched, next_scan)
            addends.insert(0, scanned)
        elif layer.recurrent is not None:
            # The delta rule's result is seen through a view: the sum takes the residual's place.
            addends.append(add_delta_rule(frame, x, layer))
        if n_rows is not None:
            frame = replace(frame, n_tokens=n_rows)
            addends = [frame.residual(addend) for addend in addends]
        residual = graph.add(addends[-1].n_bytes, *addends, in_place=True)
    widths = frame.widths(layer)
    if widths.ff or widths.expert_ff:
        out = add_feed_forward(frame, frame.norm(residual), layer)
        residual = graph.add(residual.n_bytes, out, residual, in_place=True)
    return residual, ahead


def _mask_bytes(frame: Frame, kinds: dict[int | None, AttentionCache]) -> dict[int | None, int]:
    """One f16 mask (f32 without flash attention) for each kind of cache, by window."""
    element = F16 if frame.launch.flash_attn else F32
    return {
        window: cache_cells(window, frame.launch) * frame.n_tokens * element for window in kinds
    }


def _rotation_bytes(kinds: dict[int | None, AttentionCache], launch: Launch) -> tuple[int, ...]:
    """The Hadamard matrices of each kind of cache."""
    sizes = (size for cache in kinds.values() for size in rotation_sizes(cache, launch))
    return tuple(size * size * F32 for size in sizes if size)


def _kinds_of(layers: Iterable[LayerShape]) -> dict[int | None, AttentionCache]:
    """The kinds of attention cache by window: llama.cpp keeps each in one cache of its own."""
    caches = (layer.attention for layer in layers)
    return {cache.window: cache for cache in caches if cache is not None}


def _scenes(shape: ModelShape, launch: Launch, layers: range) -> tuple[_Scene, ...]:
    """The layers that show all there is to see: those that follow a neighbour of another kind, or
    of their own, for the first times."""
    on_gpu = uses_gpu(launch)
    first = first_gpu_layer(shape, launch) if on_gpu else 0
    n_away = launch.n_cpu_moe if on_gpu else 0
    seen: Counter[tuple[_Scene | None, _Scene]] = Counter()
    kept = []
    before = None
    kinds = _kinds_of_layers(shape)
    for index in layers:
        kind = kinds[index]
        scene = _Scene(kind, on_host=index < first, experts_away=index < n_away)
        seen[before, scene] += 1
        if seen[before, scene] <= _REPEATS or index == layers[-1]:
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
