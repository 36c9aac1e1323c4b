"""How a context stores the rows of its caches: types, rotation, and which parts there are."""

from dataclasses import dataclass, replace

from kvserve.core.dtypes import CachePair, KvType

ROTATION_V = 64
"""Chunk of a rotated V row, whatever its head size (llama_kv_cache::build_input_v_rot)."""

CELL_EXT_BYTES = 12
"""llama_kv_cell_ext, written for each cell of a model with M-RoPE: x, y and the token."""

_LARGEST_HEAD = 4096

LARGEST_LAYER_COUNT = 512
"""LLAMA_MAX_LAYERS in llama.cpp's src/llama-hparams.h."""


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """How one attention cache stores the rows of its `n_layer` layers.

    `type_v` is None where the cache holds K only (MLA). Head sizes are in elements, None where
    they differ between layers. `rot_k` and `rot_v` are the chunks, in elements, in which rows are
    stored multiplied by a Hadamard matrix; None: as they are.

    Raises ValueError for values that no cache has.
    """

    n_layer: int
    type_k: KvType
    type_v: KvType | None
    head_k: int | None = None
    head_v: int | None = None
    rot_k: int | None = None
    rot_v: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.n_layer <= LARGEST_LAYER_COUNT:
            raise ValueError(f"a cache of {self.n_layer} layers")
        for head, chunk in ((self.head_k, self.rot_k), (self.head_v, self.rot_v)):
            if head is not None and not 0 < head <= _LARGEST_HEAD:
                raise ValueError(f"heads of {head} elements")
            if chunk is None:
                continue
            power_of_two = chunk & (chunk - 1) == 0
            if head is None or chunk < 64 or not power_of_two or head % chunk:
                raise ValueError(f"heads of {head} elements rotated in chunks of {chunk}")
        if self.type_v is None and (self.rot_k or self.rot_v):
            raise ValueError("a rotated cache without V")


@dataclass(frozen=True, slots=True)
class StateLayout:
    """The parts of a sequence's state, in the order in which llama.cpp writes them.

    `caches` has one entry, two with sliding windows (full attention, then sliding), none where
    the memory is recurrent alone; the recurrent part comes last. `cell_ext_bytes` follow each
    cell's position with M-RoPE.
    """

    caches: tuple[CacheLayout, ...]
    recurrent: bool = False
    cell_ext_bytes: int = 0

    def __post_init__(self) -> None:
        if len(self.caches) > 2 or not (self.caches or self.recurrent):
            raise ValueError(f"a memory of {len(self.caches)} caches")
        if self.cell_ext_bytes not in (0, CELL_EXT_BYTES):
            raise ValueError(f"cells with {self.cell_ext_bytes} more bytes")

    @property
    def rowless(self) -> "StateLayout":
        """The layout with everything taken out that transcoding can change."""
        return replace(self, caches=tuple(_without_types(cache) for cache in self.caches))


def key_rotation(head_size: int) -> int:
    """Chunk of a rotated K row: the largest 64·2^k that divides the head size, in elements
    (llama_kv_cache::build_input_k_rot)."""
    return head_size & -head_size


def forecast(layout: StateLayout, pair: CachePair) -> StateLayout:
    """The layout that a context with other types will have, before it exists.

    Lets transcoding begin while the weights load. It follows the rules in llama.cpp's
    src/llama-kv-cache.cpp and is only a forecast: the import compares the state with what
    llama.cpp has logged of the real cache, and refuses another rotation.
    """
    return replace(layout, caches=tuple(_retyped(cache, pair) for cache in layout.caches))


def _retyped(cache: CacheLayout, pair: CachePair) -> CacheLayout:
    rot_k = rot_v = None
    if cache.type_v is not None:
        if pair.k.quantized and cache.head_k and cache.head_k % 64 == 0:
            rot_k = key_rotation(cache.head_k)
        if pair.v.quantized and cache.head_v and cache.head_v % 64 == 0:
            rot_v = ROTATION_V
    type_v = None if cache.type_v is None else pair.v
    return replace(cache, type_k=pair.k, type_v=type_v, rot_k=rot_k, rot_v=rot_v)


def _without_types(cache: CacheLayout) -> CacheLayout:
    type_v = None if cache.type_v is None else KvType.F32
    return replace(cache, type_k=KvType.F32, type_v=type_v, rot_k=None, rot_v=None)
