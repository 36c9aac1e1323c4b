"""Rewrites a sequence's state for a cache of other types, on many threads.

Each block of rows goes f32 <- source type, rotation undone or applied where the two caches differ
in it, target type. Scratch memory is 4 MiB a thread, whatever the state's size; rows that are
alike in both caches are copied.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from kvserve.worker.carry.hadamard import Values, rotate
from kvserve.worker.carry.layout import StateLayout
from kvserve.worker.carry.memory_file import ExportedState, LogProbs, write_state
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.row_codec import RowCodec, row_codec
from kvserve.worker.carry.structure import (
    Bytes,
    Rows,
    SequenceState,
    parse,
    retype,
    write_structure,
)

_BLOCK_ELEMENTS = 2**19
"""Shorter blocks cost more of the interpreter's lock, which all threads share: on 16 cores 4 GB of
f16 took 3.2 s to q8_0 in blocks of 2^17, 1.9 s in 2^18, 1.3 s in 2^19."""
_LOW_PRIORITY = 10
"""As `nice` counts."""


def transcode(
    source: ExportedState, target: StateLayout, n_threads: int, *, aside: bool = False
) -> ExportedState:
    """Write the state in the types and rotations of `target`. `source` stays as it is. Done
    `aside`, it leaves the processors to whoever else needs them.

    Raises CannotCarry: MALFORMED for a state that is not what its header says, LAYOUT where the
    two differ in more than types and rotation. Raises OSError where there is no memory.
    """
    if source.layout.rowless != target.rowless:
        raise CannotCarry(Reason.LAYOUT, "the new cache has other layers, heads or parts")
    data = source.view()
    state = parse(data, source.layout)
    retyped = retype(state, target)

    def fill(out: Bytes) -> LogProbs | None:
        write_structure(retyped, out)
        if state.recurrent is not None and retyped.recurrent is not None:
            begin, end = state.recurrent.offset, retyped.recurrent.offset
            n_bytes = state.recurrent.n_bytes
            out[end : end + n_bytes] = data[begin : begin + n_bytes]
        blocks = _blocks(_conversions(state, source.layout, retyped, target))
        _run(blocks, data.ctypes.data, out.ctypes.data, n_threads, aside=aside)
        return source.expected

    contents = replace(source.contents, layout=target, state_bytes=retyped.n_bytes)
    return write_state(contents, source.tokens, fill)


@dataclass(frozen=True, slots=True)
class _Conversion:
    """What the rows of one layer need: `rotations` are chunks, multiplied by in this order."""

    source: Rows
    target: Rows
    rotations: tuple[int, ...]

    @property
    def copies(self) -> bool:
        return self.source.kv_type is self.target.kv_type and not self.rotations


@dataclass(frozen=True, slots=True)
class _Scratch:
    values: Values
    other: Values

    def at_least(self, n_elements: int) -> "_Scratch":
        if len(self.values) >= n_elements:
            return self
        return _Scratch(np.empty(n_elements, np.float32), np.empty(n_elements, np.float32))


@dataclass(frozen=True, slots=True)
class _Block:
    conversion: _Conversion
    first_row: int
    n_rows: int


def _conversions(
    state: SequenceState, layout: StateLayout, retyped: SequenceState, target: StateLayout
) -> Iterator[_Conversion]:
    for cache, old, new_cache, new in zip(
        state.caches, layout.caches, retyped.caches, target.caches, strict=True
    ):
        rotations = _rotations(old.rot_k, new.rot_k)
        for rows, new_rows in zip(cache.k, new_cache.k, strict=True):
            yield _Conversion(rows, new_rows, rotations)
        rotations = _rotations(old.rot_v, new.rot_v)
        for rows, new_rows in zip(cache.v, new_cache.v, strict=True):
            yield _Conversion(rows, new_rows, rotations)


def _rotations(old: int | None, new: int | None) -> tuple[int, ...]:
    return () if old == new else tuple(chunk for chunk in (old, new) if chunk is not None)


def _blocks(conversions: Iterator[_Conversion]) -> Iterator[_Block]:
    for conversion in conversions:
        n_rows = conversion.source.n_rows
        rows_at_once = max(1, _BLOCK_ELEMENTS // conversion.source.n_elements)
        for first in range(0, n_rows, rows_at_once):
            yield _Block(conversion, first, min(rows_at_once, n_rows - first))


def _run(
    blocks: Iterator[_Block], source: int, target: int, n_threads: int, *, aside: bool
) -> None:
    """Convert all blocks, from the state at address `source` to the one at `target`."""
    queue = deque(blocks)
    converter = partial(_convert_all, queue, row_codec(), source, target)
    n_threads = min(n_threads, len(queue))
    if n_threads <= 1 and not aside:
        converter()
        return
    with ThreadPoolExecutor(max(1, n_threads), "transcode", _yield if aside else None) as pool:
        for done in [pool.submit(converter) for _ in range(n_threads)]:
            done.result()


def _yield() -> None:
    """Put the calling thread behind others; Linux has a priority for each."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)


def _convert_all(queue: deque[_Block], codec: RowCodec, source: int, target: int) -> None:
    """Take blocks until none is left; several threads share the queue."""
    scratch = _Scratch(np.empty(0, np.float32), np.empty(0, np.float32))
    while queue:
        try:
            block = queue.popleft()
        except IndexError:
            return
        conversion = block.conversion
        rows, new_rows = conversion.source, conversion.target
        begin = source + rows.offset + block.first_row * rows.row_bytes
        new_begin = target + new_rows.offset + block.first_row * new_rows.row_bytes
        if conversion.copies:
            ctypes.memmove(new_begin, begin, block.n_rows * rows.row_bytes)
            continue
        n_elements = block.n_rows * rows.n_elements
        scratch = scratch.at_least(n_elements)
        values, other = scratch.values[:n_elements], scratch.other[:n_elements]
        codec.to_f32[rows.kv_type](begin, values.ctypes.data, n_elements)
        for chunk in conversion.rotations:
            values, other = rotate(values, chunk, other)
        codec.from_f32[new_rows.kv_type](values.ctypes.data, new_begin, n_elements)
