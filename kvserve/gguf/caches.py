"""What each layer of a model keeps in memory, from its metadata.

Follows llama_model_base::load_hparams, llama_hparams and llama_model::create_memory in llama.cpp's
src/.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvserve.core.shape import AttentionCache, RecurrentState
from kvserve.gguf.architectures import (
    INDEXERS,
    LAYERS_WITH_CACHE,
    RECURRENT,
    SHARES_CACHE_BY_FILE,
    WINDOWS,
    IndexerLayers,
    RecurrentLayers,
)
from kvserve.gguf.metadata import Metadata
from kvserve.gguf.recurrent import recurrent_states
from kvserve.gguf.refusal import bad_file

MAX_LAYERS: Final = 512
"""LLAMA_MAX_LAYERS in llama.cpp's src/llama-hparams.h."""


@dataclass(frozen=True, slots=True)
class Dimensions:
    """Layer counts and heads of a model, one entry a layer; `n_layer` is without draft layers."""

    n_layer: int
    n_layer_all: int
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    n_ff: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LayerCaches:
    """What one layer keeps: KV rows for each token, a state for each sequence, both or neither."""

    attention: AttentionCache | None
    recurrent: RecurrentState | None


def read_dimensions(metadata: Metadata) -> Dimensions:
    """Read the layer counts and heads.

    Raises BadModelFile where they are missing or out of llama.cpp's range, and for a file that
    holds draft (MTP) layers alone.
    """
    n_layer_all = metadata.required(".block_count")
    if n_layer_all > MAX_LAYERS:
        raise bad_file(
            metadata.path,
            f"has {n_layer_all:,} layers, and llama.cpp holds {MAX_LAYERS}: take another model",
        )
    n_draft = metadata.natural(".nextn_predict_layers") or 0
    if n_draft >= n_layer_all:
        raise bad_file(
            metadata.path, "holds draft (MTP) layers alone: take the model they belong to"
        )
    none = (0,) * n_layer_all
    n_head = metadata.per_layer(".attention.head_count", n_layer_all) or none
    return Dimensions(
        n_layer=n_layer_all - n_draft,
        n_layer_all=n_layer_all,
        n_embd=metadata.required(".embedding_length"),
        n_head=n_head,
        n_head_kv=metadata.per_layer(".attention.head_count_kv", n_layer_all) or n_head,
        n_ff=metadata.per_layer(".feed_forward_length", n_layer_all) or none,
    )


def layer_caches(metadata: Metadata, dims: Dimensions) -> tuple[LayerCaches, ...]:
    """Give what each layer keeps, draft layers and loop passes included. Element counts, not bytes.

    Raises BadModelFile for metadata of the wrong kind or length.
    """
    states = recurrent_states(metadata, dims.n_layer, dims.n_head, dims.n_head_kv, dims.n_ff)
    windows = _windows(metadata, dims)
    indexer = _indexer_rows(metadata, dims)
    caches = tuple(
        LayerCaches(
            attention=_attention(metadata, dims, layer, windows[layer], indexer[layer])
            if _keeps_kv(metadata, dims, layer, recurrent=states[layer] is not None)
            else None,
            recurrent=states[layer],
        )
        for layer in range(dims.n_layer_all)
    )
    add_layers = _ADDED_LAYERS.get(metadata.architecture)
    return caches if add_layers is None else add_layers(metadata, dims, caches)


def _keeps_kv(metadata: Metadata, dims: Dimensions, layer: int, *, recurrent: bool) -> bool:
    architecture = metadata.architecture
    rule = RECURRENT.get(architecture)
    if rule is None:
        return layer < min(dims.n_layer, _first_without_cache(metadata, dims))
    if rule.layers is RecurrentLayers.ALL or (layer >= dims.n_layer and not rule.draft_caches):
        return False
    if rule.layers is RecurrentLayers.ALL_BESIDE_ATTENTION:
        return True
    if rule.layers is RecurrentLayers.WITHOUT_KV_HEADS_OR_FF and dims.n_ff[layer]:
        return False
    return not recurrent


def _first_without_cache(metadata: Metadata, dims: Dimensions) -> int:
    if metadata.architecture in SHARES_CACHE_BY_FILE:
        return dims.n_layer_all - (metadata.natural(".attention.shared_kv_layers") or 0)
    return LAYERS_WITH_CACHE.get(metadata.architecture, dims.n_layer_all)


def _attention(
    metadata: Metadata, dims: Dimensions, layer: int, window: int | None, indexer: tuple[int, int]
) -> AttentionCache:
    k_head, v_head = _head_sizes(metadata, dims, sliding=window is not None)
    n_head_kv = dims.n_head_kv[layer]
    mla = metadata.natural(".attention.key_length_mla") and metadata.natural(
        ".attention.value_length_mla"
    )
    return AttentionCache(
        k_elements=k_head * n_head_kv + indexer[0],
        v_elements=0 if mla else v_head * n_head_kv + indexer[1],
        k_head_size=k_head,
        v_head_size=0 if mla else v_head,
        window=window,
    )


def _head_sizes(metadata: Metadata, dims: Dimensions, *, sliding: bool) -> tuple[int, int]:
    # llama.cpp divides by the heads of layer 0, and takes models without heads there for headless.
    default = dims.n_embd // dims.n_head[0] if dims.n_head[0] else None
    sizes = []
    for name in ("key", "value"):
        size = None
        if sliding:
            size = metadata.natural(f".attention.{name}_length_swa")
        if size is None and (default is not None or metadata.architecture == "plamo2"):
            size = metadata.natural(f".attention.{name}_length")
        sizes.append(default or 0 if size is None else size)
    return sizes[0], sizes[1]


def _windows(metadata: Metadata, dims: Dimensions) -> tuple[int | None, ...]:
    rule = WINDOWS.get(metadata.architecture)
    full: tuple[int | None, ...] = (None,) * dims.n_layer_all
    if rule is None or (rule.n_layer is not None and rule.n_layer != dims.n_layer):
        return full
    window = metadata.natural(".attention.sliding_window")
    window = rule.default if window is None else window and (rule.fixed or window)
    if not window:
        return full
    key = ".attention.sliding_window_pattern"
    if metadata.is_array(key):
        pattern = metadata.array(key) or ()
        sliding = [bool(slides) for slides in pattern[: dims.n_layer_all]]
    else:
        period = None if rule.period is None else metadata.natural(key)
        period = rule.period if period is None else period
        sliding = [
            period is not None and _slides(layer, period, dense_first=rule.dense_first)
            for layer in range(dims.n_layer)
        ]
    sliding += [False] * (dims.n_layer_all - len(sliding))
    return tuple(window if slides else None for slides in sliding)


def _slides(layer: int, period: int, *, dense_first: bool) -> bool:
    """llama_hparams::set_swa_pattern."""
    if period == 0:
        return True
    place = layer % period
    return place != 0 if dense_first else place < period - 1


def _indexer_rows(metadata: Metadata, dims: Dimensions) -> tuple[tuple[int, int], ...]:
    """Elements of K and V that a sparse-attention indexer adds to each layer's rows."""
    rule = INDEXERS.get(metadata.architecture)
    size = metadata.natural(".attention.indexer.key_length") or 0
    if rule is None or not size or not metadata.natural(".attention.indexer.top_k"):
        return ((0, 0),) * dims.n_layer_all
    _, v_head = _head_sizes(metadata, dims, sliding=False)
    rows = (size * rule.rows, v_head if rule.keeps_v else 0)
    indexed = _indexed_layers(metadata, rule.layers)
    return tuple(
        rows if layer < dims.n_layer and indexed(layer) else (0, 0)
        for layer in range(dims.n_layer_all)
    )


def _indexed_layers(metadata: Metadata, layers: IndexerLayers) -> Callable[[int], bool]:
    if layers is IndexerLayers.ALL:
        return lambda _: True
    if layers is IndexerLayers.AFTER_DENSE:
        n_dense = metadata.natural(".leading_dense_block_count") or 0
        return lambda layer: layer >= n_dense
    types = metadata.array(".attention.indexer.types")
    if types is not None:
        return lambda layer: layer < len(types) and bool(types[layer])
    if layers is IndexerLayers.BY_TYPE_GLM and (metadata.natural(".context_length") or 0) >= 2**20:
        # GLM-5.2 without the key: the first two layers, then one in four (src/models/glm-dsa.cpp).
        return lambda layer: layer < 2 or layer % 4 == 2
    return lambda _: True


def _loop_passes(
    metadata: Metadata, dims: Dimensions, caches: tuple[LayerCaches, ...]
) -> tuple[LayerCaches, ...]:
    """A looped model goes through its layers again, with rows of its own for each pass."""
    n_loops = metadata.natural(".num_loops") or 1
    if n_loops * dims.n_layer > MAX_LAYERS:
        raise bad_file(metadata.path, f"loops {n_loops:,} times, more than llama.cpp holds")
    return caches * n_loops


def _router_layer(
    metadata: Metadata, dims: Dimensions, caches: tuple[LayerCaches, ...]
) -> tuple[LayerCaches, ...]:
    """One more layer with a single head, in which an adapter is chosen for each token."""
    k_head, v_head = _head_sizes(metadata, dims, sliding=False)
    return (*caches, LayerCaches(AttentionCache(k_head, v_head, k_head, v_head), None))


_ADDED_LAYERS: Final[
    dict[str, Callable[[Metadata, Dimensions, tuple[LayerCaches, ...]], tuple[LayerCaches, ...]]]
] = {"graniteswitch": _router_layer, "nanbeige": _loop_passes}
