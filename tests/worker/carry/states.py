"""Real states of all memory classes, and hand-made ones."""

from dataclasses import dataclass

import numpy as np

from kvserve.core.dtypes import KvType
from kvserve.worker import llama
from kvserve.worker.carry.layout import StateLayout
from kvserve.worker.carry.memory_file import Contents, ExportedState, Origin, write_state
from kvserve.worker.carry.structure import Bytes, Rows, SequenceState, parse, write_structure

MEMORIES = {
    "plain": ("llama", {}),
    "sliding": ("gpt-oss", {}),
    "sliding alone": ("gemma3", {}),
    "hybrid, M-RoPE": ("qwen35", {}),
    "latent": ("deepseek2", {}),
    "recurrent": ("mamba2", {}),
}
"""Architecture and dimensions for each memory class."""


@dataclass(frozen=True, slots=True)
class Raw:
    """llama.cpp's own bytes of a sequence."""

    data: Bytes
    layout: StateLayout

    @property
    def state(self) -> SequenceState:
        return parse(self.data, self.layout)

    def matrix(self, rows: Rows) -> Bytes:
        """One layer's K or V, shape (n_rows, row_bytes)."""
        return self.data[rows.offset : rows.offset + rows.n_bytes].reshape(rows.n_rows, -1)


def raw_state(context: llama.Context, slot: int = 0) -> Raw:
    data = np.empty(context.state_bytes(slot), dtype=np.uint8)
    assert context.read_state(slot, data.ctypes.data, len(data)) == len(data)
    assert context.state_layout is not None
    return Raw(data, context.state_layout)


def exported(raw: Raw) -> ExportedState:
    """A memory file around the bytes, whatever they are."""

    def fill(out: Bytes) -> None:
        out[:] = raw.data

    contents = Contents(Origin("model", "build"), raw.layout, len(raw.data), 1, 1)
    return write_state(contents, np.zeros(1, dtype=np.int32), fill)


def rewritten(raw: Raw) -> Bytes:
    """The state parsed, and written from what the parser gave."""
    state = raw.state
    out = np.zeros_like(raw.data)
    write_structure(state, out)
    for rows in state.rows:
        out[rows.offset : rows.offset + rows.n_bytes] = raw.matrix(rows).ravel()
    if state.recurrent is not None:
        begin, end = state.recurrent.offset, state.recurrent.offset + state.recurrent.n_bytes
        out[begin:end] = raw.data[begin:end]
    return out


def first_layer(raw: Raw) -> tuple[Rows, Rows | None]:
    """K and V of the model's first attention layer, whose rows no earlier attention has touched.

    With sliding windows the first layer slides.
    """
    cache = raw.state.caches[-1]
    return cache.k[0], cache.v[0] if cache.v else None


def steps(kv_type: KvType, rows: np.ndarray) -> np.ndarray:
    """The largest step of the type's grid in each block of 32, shape (n_blocks, 1)."""
    levels = {"q8_0": 254, "q5_1": 31, "q5_0": 31, "q4_1": 15, "q4_0": 15}[kv_type]
    return 2 * np.abs(rows.reshape(-1, 32)).max(axis=1, keepdims=True) / levels
