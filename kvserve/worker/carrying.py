"""Sequences leave their worker: exported at a pause, as far as they were not copied ahead of it.
What cannot be carried is prefilled again."""

import time
from collections.abc import Sequence

import numpy as np

from kvserve.ipc import messages
from kvserve.worker.blanks import Blanks
from kvserve.worker.carry.memory_file import ExportedState, Tokens
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence
from kvserve.worker.cell_tree import CachedSequence
from kvserve.worker.copying_ahead import Copies, worth_a_file
from kvserve.worker.llama import CacheFull, Context, DecodeError
from kvserve.worker.prefix_cache import PrefixCache

_GROWTH_TOKENS = 512
"""About what a running sequence grows by while memory for its export is made ready."""


class ExportFiles:
    """Memory files for an export to come, made by a thread while the engine still decodes.

    `sequences` are those of now; the running ones grow until `ready`. Of what was copied ahead
    only the rest needs one.
    """

    def __init__(
        self,
        context: Context,
        sequences: Sequence[CachedSequence],
        limit_bytes: int,
        copies: Copies,
    ) -> None:
        self.limit_bytes = limit_bytes
        sizes: dict[CachedSequence, int] = {}
        left_bytes = limit_bytes
        done: set[CachedSequence] = set()
        for sequence in sequences:
            n_bytes = context.state_bytes(sequence.slot)
            if not 0 < n_bytes <= left_bytes or not worth_a_file(sequence, done):
                continue
            copied = copies.find(sequence)
            n_tokens = sequence.n_cells + _GROWTH_TOKENS - _n_in(copied)
            sizes[sequence] = n_bytes * n_tokens // max(sequence.n_cells, 1)
            left_bytes -= n_bytes
            done.add(sequence)
        self.blanks = Blanks(sizes)

    @property
    def ready(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.blanks.ready


def export(
    context: Context,
    sequences: Sequence[CachedSequence],
    files: ExportFiles,
    copies: Copies,
    cache: PrefixCache,
) -> messages.Paused:
    """Export sequences in the order given, up to the limit of `files` in all; those too short to
    be kept in `cache` are not worth it. Of those in `copies` what has come since.

    The context is of no use for anything else afterwards. The files stay open until this process
    ends. Whatever cannot be exported stays behind, with its reason.
    """
    began = time.monotonic()
    outlet = _Outlet(context, sequences, files, copies, cache.free_ids)
    for sequence in sequences:
        if sequence.n_cells >= cache.shortest:
            outlet.export(sequence)
    files.blanks.close()
    seconds = time.monotonic() - began
    return messages.Paused(tuple(outlet.states), seconds, tuple(outlet.refused))


class _Outlet:
    """An export under way."""

    def __init__(
        self,
        context: Context,
        sequences: Sequence[CachedSequence],
        files: ExportFiles,
        copies: Copies,
        free_ids: Sequence[int],
    ) -> None:
        self.states: list[messages.ExportedState] = []
        self.refused: list[str] = []
        self._context = context
        self._blanks = files.blanks
        self._copies = copies
        # What was copied in vain counts too, until this process ends.
        self._left_bytes = files.limit_bytes - copies.n_bytes
        self._done: set[CachedSequence] = set()
        taken = {sequence.slot for sequence in sequences}
        self._free_slot = next(
            (slot for slot in range(context.n_seq_max) if slot not in taken), None
        )
        others = (one for one in free_ids if one not in taken and one != self._free_slot)
        self._through = next(others, None)

    def export(self, sequence: CachedSequence) -> None:
        """Export one sequence, and free its slot."""
        context = self._context
        if not worth_a_file(sequence, self._done):
            self.refused.append("shares its cells with a carried one")
            return
        copied = self._copies.take(sequence) if self._through is not None else ()
        n_copied = _n_in(copied)
        n_bytes = context.state_bytes(sequence.slot)
        if n_bytes * (sequence.n_cells - n_copied) > self._left_bytes * sequence.n_cells:
            self.refused.append("over the memory for carrying (carry_ram)")
            return
        slot = self._decodable_slot(sequence)
        try:
            # An unproven state is not imported, so every one takes its canary along.
            state = export_sequence(
                context,
                slot,
                _with_pending(sequence),
                salt=sequence.salt,
                canary=True,
                blank=self._blanks.take(sequence),
                n_before=n_copied,
                through=self._through if copied else None,
            )
        except (CannotCarry, CacheFull, DecodeError, OSError) as error:
            self.refused.append(str(error) or repr(error))
            return
        finally:
            context.clear_slot(slot)
            self._free_slot = slot if slot < context.n_seq_max else self._free_slot
        self._done.add(sequence)
        self._left_bytes -= state.n_bytes
        n_tokens = state.contents.n_cached
        ahead = tuple(piece.fd for piece in copied)
        self.states.append(
            messages.ExportedState(state.fd, state.n_bytes, n_tokens, ahead, n_copied)
        )

    def _decodable_slot(self, sequence: CachedSequence) -> int:
        """A slot that the canary can be decoded in: kept sequences may have ids that none can."""
        slot = sequence.slot
        if slot < self._context.n_seq_max or self._free_slot is None:
            return slot
        self._context.copy_slot(slot, self._free_slot, sequence.n_cells)
        self._context.clear_slot(slot)
        return self._free_slot


def _n_in(pieces: Sequence[ExportedState]) -> int:
    return pieces[-1].contents.n_cached if pieces else 0


def _with_pending(sequence: CachedSequence) -> Tokens:
    """The tokens in the cache and the one that the canary decodes: the next one of a running
    sequence; of a kept one, whose next is not known, its last once more."""
    n_cells = sequence.n_cells
    if sequence.running and len(sequence.tokens) > n_cells:
        return sequence.tokens[: n_cells + 1].copy()
    known = sequence.tokens[:n_cells]
    return np.append(known, known[-1]).astype(np.int32)
