"""One sequence's state as llama_state_seq_get_data writes it: read, retyped, written.

Little-endian, without padding (llama.cpp src/: llama-context.cpp, llama-kv-cache.cpp,
llama-memory-recurrent.cpp):

    u32 magic | i32 seq_id | attention caches | recurrent part

    cache      u32 n_stream = 1 | u32 n_cells, and if that is not 0: cells
               | u32 v_trans = 0 | u32 n_layer | K of each layer | V of each layer
    cell       i32 pos | u32 n_seq_id = 1 | with M-RoPE i32 x, y, token | i32 seq_id
    K, V       i32 type | u64 row_bytes | n_cells rows
    recurrent  u32 n_cells | for each: i32 pos, u32 n_seq_id = 0
               | u32 s_trans = 0 | u32 n_layer | R, then S of each layer that has one, like K

llama.cpp itself neither checks what the rows mean nor what follows the end, so reading is strict
here: whatever is not exactly this raises CannotCarry. One thing only the model knows: how many
layers have a recurrent state. A state that lacks whole rows of R and S is refused by llama.cpp.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvserve.core.dtypes import BLOCK_ELEMENTS, KvType, row_bytes
from kvserve.worker.carry.layout import LARGEST_LAYER_COUNT, CacheLayout, StateLayout
from kvserve.worker.carry.refusal import CannotCarry, Reason

Bytes = NDArray[np.uint8]

_MAGIC = 0xAF143CD8
GGML_TYPES = {
    KvType.F32: 0,
    KvType.F16: 1,
    KvType.Q4_0: 2,
    KvType.Q4_1: 3,
    KvType.Q5_0: 6,
    KvType.Q5_1: 7,
    KvType.Q8_0: 8,
    KvType.IQ4_NL: 20,
    KvType.BF16: 30,
}
"""`enum ggml_type` (ggml/include/ggml.h)."""

_HEAD = struct.Struct("<Ii")
_COUNT = struct.Struct("<I")
_PAIR = struct.Struct("<II")
_ROWS = struct.Struct("<iQ")
_RECURRENT_CELL = struct.Struct("<iI")
_LARGEST_ROW_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Rows:
    """K or V of one layer: `n_rows` rows, one a cell, from byte `offset` of the state."""

    kv_type: KvType
    row_bytes: int
    n_rows: int
    offset: int

    @property
    def n_elements(self) -> int:
        """Elements of one row: heads x head size."""
        return self.row_bytes * BLOCK_ELEMENTS // self.kv_type.block_bytes

    @property
    def n_bytes(self) -> int:
        """All rows together."""
        return self.row_bytes * self.n_rows


@dataclass(frozen=True, slots=True)
class CacheState:
    """The cells of one attention cache that belong to the sequence, in the cache's order.

    `cells` are their positions as written; `k` and `v` have one entry a layer, both empty where
    there are no cells, `v` also where the cache holds K only.
    """

    n_cells: int
    cells: bytes
    last_position: int | None
    k: tuple[Rows, ...]
    v: tuple[Rows, ...]
    first_position: int | None = None


@dataclass(frozen=True, slots=True)
class RecurrentPart:
    """The recurrent memory's part, carried as it is: `n_bytes` from byte `offset`."""

    offset: int
    n_bytes: int
    last_position: int | None


@dataclass(frozen=True, slots=True)
class SequenceState:
    """Where everything lies in a state of `n_bytes`. `n_tokens` is the next position."""

    seq_id: int
    caches: tuple[CacheState, ...]
    recurrent: RecurrentPart | None
    n_tokens: int
    n_bytes: int

    @property
    def rows(self) -> tuple[Rows, ...]:
        """All rows of K and V, in the order in which they lie in the state."""
        return tuple(rows for cache in self.caches for rows in (*cache.k, *cache.v))


def parse(data: Bytes, layout: StateLayout) -> SequenceState:
    """Read the structure of a state; no row is touched. Raises CannotCarry (MALFORMED)."""
    reader = _Reader(data)
    magic, seq_id = reader.take(_HEAD)
    if magic != _MAGIC:
        raise _malformed(f"it begins with {magic:#x}, not {_MAGIC:#x}")
    caches = tuple(
        _parse_cache(reader, cache, layout.cell_ext_bytes, seq_id) for cache in layout.caches
    )
    recurrent = _parse_recurrent(reader) if layout.recurrent else None
    if reader.left:
        raise _malformed(f"{reader.left} bytes follow its end")
    ends = {cache.last_position for cache in caches}
    if recurrent is not None:
        ends.add(recurrent.last_position)
    if len(ends) != 1:
        raise _malformed("its parts end at different positions")
    last = ends.pop()
    n_tokens = 0 if last is None else last + 1
    return SequenceState(seq_id, caches, recurrent, n_tokens, len(data))


def retype(state: SequenceState, target: StateLayout) -> SequenceState:
    """Where everything will lie once the rows have the types of `target`.

    Raises CannotCarry (LAYOUT) where a row does not divide into blocks of the new type.
    """
    offset = _HEAD.size
    caches = []
    for cache, layout in zip(state.caches, target.caches, strict=True):
        offset += 2 * _COUNT.size
        if cache.n_cells == 0:
            caches.append(cache)
            continue
        offset += len(cache.cells) + _PAIR.size
        k, offset = _lay_out(_retype_rows(cache.k, layout.type_k), offset)
        v, offset = _lay_out(_retype_rows(cache.v, layout.type_v), offset)
        caches.append(replace(cache, k=k, v=v))
    recurrent = state.recurrent
    if recurrent is not None:
        recurrent = replace(recurrent, offset=offset)
        offset += recurrent.n_bytes
    return replace(state, caches=tuple(caches), recurrent=recurrent, n_bytes=offset)


def resize(state: SequenceState, positions: NDArray[np.int32], ext: Bytes) -> SequenceState:
    """Where everything will lie in a state with one cell at each of `positions`, in their order.

    `ext` are what cells hold beside their positions, shape (n_cells, cell_ext_bytes). Plain
    attention alone: one cache, no recurrent part.
    """
    (cache,) = state.caches
    assert state.recurrent is None
    n_cells = len(positions)
    cells = np.empty(n_cells, dtype=cell_form(ext.shape[1]))
    cells["pos"], cells["n_seq_id"], cells["seq_id"] = positions, 1, state.seq_id
    if ext.size:
        cells["ext"] = np.ascontiguousarray(ext).view(cells.dtype["ext"])[:, 0]
    offset = _HEAD.size + _PAIR.size + cells.nbytes + _PAIR.size
    k, offset = _lay_out((replace(rows, n_rows=n_cells) for rows in cache.k), offset)
    v, offset = _lay_out((replace(rows, n_rows=n_cells) for rows in cache.v), offset)
    first, last = int(positions.min()), int(positions.max())
    cache = CacheState(n_cells, cells.tobytes(), last, k, v, first)
    return replace(state, caches=(cache,), n_tokens=last + 1, n_bytes=offset)


def write_structure(state: SequenceState, out: Bytes) -> None:
    """Write all but the rows and the recurrent part into `out`, of `state.n_bytes`."""
    view = out.data
    _HEAD.pack_into(view, 0, _MAGIC, state.seq_id)
    offset = _HEAD.size
    for cache in state.caches:
        _PAIR.pack_into(view, offset, 1, cache.n_cells)
        offset += _PAIR.size
        if cache.n_cells == 0:
            continue
        view[offset : offset + len(cache.cells)] = cache.cells
        offset += len(cache.cells)
        _PAIR.pack_into(view, offset, 0, len(cache.k))
        offset += _PAIR.size
        for rows in (*cache.k, *cache.v):
            _ROWS.pack_into(view, offset, GGML_TYPES[rows.kv_type], rows.row_bytes)
            offset += _ROWS.size
            assert offset == rows.offset
            offset += rows.n_bytes


def cell_form(cell_ext_bytes: int) -> np.dtype[np.void]:
    """One cell, field by field."""
    return np.dtype(
        [("pos", "<i4"), ("n_seq_id", "<u4"), ("ext", f"V{cell_ext_bytes}"), ("seq_id", "<i4")]
    )


class _Reader:
    """Takes values from the front of a state; raises CannotCarry where it is too short."""

    def __init__(self, data: Bytes) -> None:
        self._data = data
        self.offset = 0

    @property
    def left(self) -> int:
        return len(self._data) - self.offset

    def take(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack_from(self._data.data, self.skip(form.size))

    def number(self) -> int:
        return self.take(_COUNT)[0]

    def view(self, n_bytes: int) -> Bytes:
        begin = self.skip(n_bytes)
        return self._data[begin : begin + n_bytes]

    def skip(self, n_bytes: int) -> int:
        """Returns the offset of the bytes skipped."""
        if n_bytes > self.left:
            raise _malformed(f"it ends {n_bytes - self.left} bytes early")
        begin = self.offset
        self.offset += n_bytes
        return begin


def _parse_cache(
    reader: _Reader, layout: CacheLayout, cell_ext_bytes: int, seq_id: int
) -> CacheState:
    n_stream, n_cells = reader.take(_PAIR)
    if n_stream != 1:
        raise _malformed(f"a cache of {n_stream} streams")
    if n_cells == 0:
        return CacheState(0, b"", None, (), ())
    cells, first_position, last_position = _parse_cells(reader, n_cells, cell_ext_bytes, seq_id)
    v_trans, n_layer = reader.take(_PAIR)
    if v_trans != 0:
        raise _malformed("V is transposed (flash attention is off)")
    if n_layer != layout.n_layer:
        raise _malformed(f"a cache of {n_layer} layers, not {layout.n_layer}")
    k = tuple(
        _parse_rows(reader, layout.type_k, n_cells, layout.head_k) for _ in range(layout.n_layer)
    )
    v: tuple[Rows, ...] = ()
    if layout.type_v is not None:
        v = tuple(
            _parse_rows(reader, layout.type_v, n_cells, layout.head_v)
            for _ in range(layout.n_layer)
        )
    return CacheState(n_cells, cells, last_position, k, v, first_position)


def _parse_cells(
    reader: _Reader, n_cells: int, cell_ext_bytes: int, seq_id: int
) -> tuple[bytes, int, int]:
    form = cell_form(cell_ext_bytes)
    data = reader.view(n_cells * form.itemsize).tobytes()
    cells = np.frombuffer(data, dtype=form)
    if (cells["n_seq_id"] != 1).any() or (cells["seq_id"] != seq_id).any():
        raise _malformed("a cell of another sequence")
    positions = cells["pos"]
    if positions.min() < 0:
        raise _malformed("a cell without a position")
    # np.unique would do, but its first call takes 50 ms, in the midst of some step.
    ordered = np.sort(positions)
    if (ordered[1:] == ordered[:-1]).any():
        raise _malformed("two cells of one position")
    return data, int(positions.min()), int(positions.max())


def _parse_rows(reader: _Reader, kv_type: KvType, n_rows: int, head_size: int | None) -> Rows:
    ggml_type, row_size = reader.take(_ROWS)
    if ggml_type != GGML_TYPES[kv_type]:
        raise _malformed(f"rows of ggml type {ggml_type}, not {kv_type}")
    n_elements, rest = divmod(row_size * BLOCK_ELEMENTS, kv_type.block_bytes)
    heads_fit = head_size is None or n_elements % head_size == 0
    blocks_fit = not kv_type.quantized or n_elements % BLOCK_ELEMENTS == 0
    if rest or not 0 < row_size <= _LARGEST_ROW_BYTES or not (heads_fit and blocks_fit):
        raise _malformed(f"{kv_type} rows of {row_size} bytes")
    return Rows(kv_type, row_size, n_rows, reader.skip(n_rows * row_size))


def _parse_recurrent(reader: _Reader) -> RecurrentPart:
    begin = reader.offset
    n_cells = reader.number()
    if n_cells > 1:
        raise _malformed(f"a recurrent state of {n_cells} cells")
    last_position: int | None = None
    if n_cells == 1:
        last_position, n_seq_id = reader.take(_RECURRENT_CELL)
        if last_position < 0 or n_seq_id != 0:
            raise _malformed("a recurrent cell of another sequence")
    s_trans, n_layer = reader.take(_PAIR)
    if s_trans != 0:
        raise _malformed("a transposed recurrent state")
    if n_layer > LARGEST_LAYER_COUNT:
        raise _malformed(f"a recurrent state of {n_layer} layers")
    n_rows = 0
    while reader.left and n_rows < 2 * n_layer:
        ggml_type, row_size = reader.take(_ROWS)
        if ggml_type != GGML_TYPES[KvType.F32] or row_size % 4:
            raise _malformed("a recurrent state that is not f32")
        reader.skip(n_cells * row_size)
        n_rows += 1
    if n_rows % 2 or (n_cells and not n_rows):
        raise _malformed(f"a recurrent state of {n_rows} rows")
    return RecurrentPart(begin, reader.offset - begin, last_position)


def _retype_rows(every: tuple[Rows, ...], kv_type: KvType | None) -> list[Rows]:
    retyped = []
    for rows in every:
        assert kv_type is not None
        try:
            row_size = row_bytes(kv_type, rows.n_elements)
        except ValueError as error:
            raise CannotCarry(Reason.LAYOUT, str(error)) from None
        retyped.append(replace(rows, kv_type=kv_type, row_bytes=row_size))
    return retyped


def _lay_out(every: Iterable[Rows], offset: int) -> tuple[tuple[Rows, ...], int]:
    """Rows one after another from `offset` on, and where they end."""
    placed = []
    for rows in every:
        offset += _ROWS.size
        placed.append(replace(rows, offset=offset))
        offset += rows.n_bytes
    return tuple(placed), offset


def _malformed(why: str) -> CannotCarry:
    return CannotCarry(Reason.MALFORMED, f"the state cannot be read: {why}")
