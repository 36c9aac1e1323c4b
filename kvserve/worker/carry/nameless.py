"""States of sequences whose id is `n_seq_max` or above, as the prefix cache keeps them.

llama_kv_cache::state_write_meta (llama.cpp src/llama-kv-cache.cpp) names only ids below
`n_seq_max` in a cell. Cells of others say that they are in no sequence, and no context would take
them: here they get their id back. Only plain attention caches keep such sequences.
"""

import struct

import numpy as np

from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.structure import Bytes, cell_form

_FRONT = struct.Struct("<IiII")
"""Magic, seq_id, n_stream, n_cells."""


def name_cells(state: Bytes, n_cells: int, cell_ext_bytes: int, seq_id: int) -> None:
    """Write the id into the cells of a state, in place.

    `state` begins with a gap of `4 * n_cells` bytes, then come llama.cpp's; afterwards it is full.
    Raises CannotCarry (EXPORT) where the state has other cells.
    """
    gap = 4 * n_cells
    front = _FRONT.unpack_from(state.data, gap)
    form = cell_form(cell_ext_bytes)
    nameless = np.dtype([(name, form[name]) for name in form.names or () if name != "seq_id"])
    begin = gap + _FRONT.size
    end = begin + n_cells * nameless.itemsize
    if front[3] != n_cells or end > len(state):
        raise CannotCarry(Reason.EXPORT, f"{front[3]} cells of a sequence of {n_cells} tokens")
    found = state[begin:end].view(nameless)
    cells = np.empty(n_cells, dtype=form)
    cells["pos"], cells["ext"], cells["seq_id"] = found["pos"], found["ext"], seq_id
    cells["n_seq_id"] = found["n_seq_id"] + 1
    _FRONT.pack_into(state.data, 0, *front)
    state[_FRONT.size : end] = cells.view(np.uint8)
