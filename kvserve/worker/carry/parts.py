"""A sequence's state written a few cells at a time, and read so: no step waits for a whole one.

What comes of the parts is the state of the whole, with its cells in the order of their positions.
Plain attention alone.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np

from kvserve.worker.carry.memory_file import (
    HEADER_BYTES,
    Blank,
    Contents,
    ExportedState,
    LogProbs,
    Tokens,
    write_state,
)
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import (
    Span,
    check_origin,
    exportable,
    origin_of,
    write_sequence,
)
from kvserve.worker.carry.structure import (
    Bytes,
    Rows,
    SequenceState,
    cell_form,
    parse,
    resize,
    write_structure,
)
from kvserve.worker.llama import Context, page_locked

_MOST_SCRATCH_BYTES = 2**27
PART_BYTES = 2**25
"""A part should be no larger."""


class Scratch:
    """Memory that is used again, so that its pages are there; more than `_MOST_SCRATCH_BYTES` are
    given back. Where `page_locked`, a GPU copies to and from it by itself, if it can."""

    def __init__(self, *, page_locked: bool = False) -> None:
        self._memory: Bytes = np.empty(0, dtype=np.uint8)
        self._page_locked = page_locked

    def take(self, n_bytes: int) -> Bytes:
        """`n_bytes` of it; whatever was taken before is written over."""
        if n_bytes > _MOST_SCRATCH_BYTES:
            return np.empty(n_bytes, dtype=np.uint8)
        if len(self._memory) < n_bytes:
            self._memory = self._allocate(n_bytes)
        return self._memory[:n_bytes]

    def _allocate(self, n_bytes: int) -> Bytes:
        if not self._page_locked:
            return np.empty(n_bytes, dtype=np.uint8)
        self._memory = np.empty(0, dtype=np.uint8)
        # It takes the driver milliseconds, so not a little more each time.
        n_bytes = max(1 << (n_bytes - 1).bit_length(), PART_BYTES)
        found = page_locked(n_bytes)
        return np.empty(n_bytes, dtype=np.uint8) if found is None else found


class Writer:
    """A thread that writes what was read into files, with the memory that it is read into: fresh
    pages of a file take twice as long to fill as llama.cpp's copy."""

    def __init__(self, *, page_locked: bool = False) -> None:
        self._scratch = Scratch(page_locked=page_locked)
        self._pool = ThreadPoolExecutor(1, "writer")
        self._last: Future[None] | None = None

    def buffer(self, n_bytes: int) -> Bytes:
        """Memory to read into. Waits for what is written out of it."""
        self.wait()
        return self._scratch.take(n_bytes)

    def begin(self, task: Callable[[], None]) -> None:
        """Have a task write what is in the buffer."""
        self._last = self._pool.submit(task)

    def wait(self) -> None:
        """Return when all is written."""
        last, self._last = self._last, None
        if last is not None:
            last.result()


class LeavingSequence:
    """The state of a sequence with cells for all `tokens`, copied from its end to its beginning.

    The cells of the first `n_missing` are not there yet; `n_bytes` is about what all will take.
    Raises CannotCarry where the memory's form is not known, OSError where the kernel gives no
    memory.
    """

    def __init__(
        self, context: Context, slot: int, tokens: Tokens, salt: str, writer: Writer
    ) -> None:
        self.tokens = tokens
        self.salt = salt
        self.n_missing = len(tokens)
        self._positions = np.arange(len(tokens), dtype=np.int32)
        self._context = context
        self._writer = writer
        self._failure: OSError | CannotCarry | None = None
        self.n_bytes = context.state_bytes(slot) + 8 * len(tokens) + HEADER_BYTES
        self._layout = exportable(context, slot, salt)
        self._ext: Bytes = np.zeros((len(tokens), self._layout.cell_ext_bytes), dtype=np.uint8)
        self._whole: SequenceState | None = None
        self._blank: Blank | None = Blank(0, populated=False)

    def add(self, slot: int, n_left: int, through: int | None) -> None:
        """Copy the cells from the first `n_left` tokens on to the first `n_missing`, from `slot`,
        by way of the free id `through`; None where `slot` has these cells alone.

        Raises CannotCarry or OSError, also for what was added before; the state is of no use then.
        """
        span = Span(slot, n_left, self.n_missing, through)
        with span.held(self._context) as held:
            out = self._writer.buffer(span.state_bytes(self._context, held))
            self._check()
            part = span.read(self._context, held, self._layout, out)
        positions, ext = cells_of(part, self._layout.cell_ext_bytes)
        self._ext[positions] = ext
        if self._whole is None:
            self._whole = resize(part, self._positions, self._ext)
        whole = self._whole
        self._writer.begin(lambda: self._write_rows(out, part, positions, whole))
        self.n_missing = n_left

    def finish(self) -> ExportedState:
        """The whole state, when nothing is missing. Raises CannotCarry or OSError."""
        self._writer.wait()
        self._check()
        whole = self._whole
        assert whole is not None
        assert not self.n_missing
        whole = resize(whole, self._positions, self._ext)

        def fill(out: Bytes) -> LogProbs | None:
            write_structure(whole, out)
            parse(out, self._layout)
            return None

        n_tokens = len(self.tokens)
        origin = origin_of(self._context)
        contents = Contents(origin, self._layout, whole.n_bytes, n_tokens, n_tokens, salt=self.salt)
        blank, self._blank = self._blank, None
        return write_state(contents, self.tokens, fill, blank)

    def arriving(self, scratch: Scratch) -> "ArrivingSequence":
        """What was copied, to be taken into the context again behind the first `n_missing` tokens.
        Raises CannotCarry or OSError."""
        self._writer.wait()
        self._check()
        assert self._blank is not None
        assert self._whole is not None
        data = self._blank.view(HEADER_BYTES + self._whole.n_bytes)[HEADER_BYTES:]
        return ArrivingSequence(
            self._context, data, self._whole, self._positions, self._ext, scratch
        )

    def close(self) -> None:
        """Give the memory back, of a state that is not finished."""
        self._writer.wait()
        if self._blank is not None:
            self._blank.close()
            self._blank = None

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write_rows(
        self, out: Bytes, part: SequenceState, positions: Tokens, whole: SequenceState
    ) -> None:
        first = int(positions.min())
        ascending = positions[0] == first and bool((np.diff(positions) == 1).all())
        order = None if ascending else np.argsort(positions)
        try:
            for rows, place in zip(part.rows, whole.rows, strict=True):
                found = _rows_of(out, rows)
                if order is not None:
                    found = found[order]
                self._write(found, place.offset + first * place.row_bytes)
        except OSError as error:
            self._failure = error
        except Exception as error:
            self._failure = CannotCarry(Reason.EXPORT, f"writing a part failed: {error!r}")

    def _write(self, rows: Bytes, offset: int) -> None:
        assert self._blank is not None
        left = rows.data.cast("B")
        begin = HEADER_BYTES + offset
        while left:
            n_written = os.pwrite(self._blank.fd, left, begin)
            left, begin = left[n_written:], begin + n_written


class ArrivingSequence:
    """A state that is taken into `context` from its beginning to its end.

    `data` has the rows that `state` tells of, of cells at `positions` with `ext` beside them.
    """

    def __init__(
        self,
        context: Context,
        data: Bytes,
        state: SequenceState,
        positions: Tokens,
        ext: Bytes,
        scratch: Scratch,
    ) -> None:
        self._context = context
        self._scratch = scratch
        self._data = data
        self._state = state
        self._positions = positions
        self._ext = ext

    @classmethod
    def of(cls, context: Context, exported: ExportedState, scratch: Scratch) -> Self:
        """Of an exported state. Raises CannotCarry: IDENTITY, LAYOUT or MALFORMED; OSError or
        ValueError where it cannot be mapped."""
        check_origin(context, exported)
        data = exported.view()
        state = parse(data, exported.layout)
        positions, ext = cells_of(state, exported.layout.cell_ext_bytes)
        return cls(context, data, state, positions, ext, scratch)

    def take(self, slot: int, through: int, begin: int, end: int) -> None:
        """Give sequence `slot`, which holds the cells of the first `begin` tokens, those up to the
        first `end`, by way of the free id `through`, which batches may use.

        Raises CannotCarry (IMPORT); the sequence is as it was then.
        """
        places = np.flatnonzero((self._positions >= begin) & (self._positions < end))
        if len(places) != end - begin or self._context.n_cached(slot) != begin:
            raise CannotCarry(Reason.IMPORT, f"no cells for the tokens from {begin} to {end}")
        part = resize(self._state, self._positions[places], self._ext[places])
        data = self._scratch.take(part.n_bytes)
        write_structure(part, data)
        first, n_found = int(places[0]), len(places)
        together = int(places[-1]) == first + n_found - 1
        for rows, place in zip(self._state.rows, part.rows, strict=True):
            every = _rows_of(self._data, rows)
            _rows_of(data, place)[:] = every[first : first + n_found] if together else every[places]
        write_sequence(self._context, through, data)
        self._context.copy_cells(through, slot, begin, end)
        self._context.clear_slot(through)


def cells_of(state: SequenceState, cell_ext_bytes: int) -> tuple[Tokens, Bytes]:
    """The positions of a state's cells, shape (n_cells,), and what else they hold, shape
    (n_cells, cell_ext_bytes)."""
    (cache,) = state.caches
    cells = np.frombuffer(cache.cells, dtype=cell_form(cell_ext_bytes))
    ext = np.ascontiguousarray(cells["ext"]).view(np.uint8).reshape(cache.n_cells, cell_ext_bytes)
    return np.ascontiguousarray(cells["pos"]), ext


def _rows_of(state: Bytes, rows: Rows) -> Bytes:
    """Rows of a state as they lie there, shape (n_rows, row_bytes)."""
    end = rows.offset + rows.n_bytes
    return state[rows.offset : end].reshape(rows.n_rows, rows.row_bytes)
