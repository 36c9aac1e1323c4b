"""Sequences that outlive their worker: exported at a pause, transcoded for the next cache while the
weights load, imported and proven before `Loaded`. What cannot be carried is prefilled again."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvserve.core.dtypes import CachePair, KvType
from kvserve.ipc import messages
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import Blank, ExportedState, Tokens
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence, import_sequence, prove_sequence
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.cell_tree import CachedSequence, n_shared
from kvserve.worker.llama import CacheFull, Context, DecodeError

_MOST_SHARED = 0.5
"""A sequence that shares more of its cells with an exported one stays behind: the import gives
every sequence cells of its own, and its own rest is soon prefilled again."""
_GROWTH_TOKENS = 512
"""About what a running sequence grows by while memory for its export is made ready."""


class Blanks:
    """Memory files for an export to come, made by a thread while the engine still decodes.

    `sequences` are those of now; the running ones grow until `ready`.
    """

    def __init__(
        self, context: Context, sequences: Sequence[CachedSequence], limit_bytes: int
    ) -> None:
        self.limit_bytes = limit_bytes
        self._files: dict[CachedSequence, Blank] = {}
        self._sizes: dict[CachedSequence, int] = {}
        left_bytes = limit_bytes
        done: set[CachedSequence] = set()
        for sequence in sequences:
            n_bytes = context.state_bytes(sequence.slot)
            if not 0 < n_bytes <= left_bytes or not _worth_a_file(sequence, done):
                continue
            n_tokens = sequence.n_cells + _GROWTH_TOKENS
            self._sizes[sequence] = n_bytes * n_tokens // max(sequence.n_cells, 1)
            left_bytes -= n_bytes
            done.add(sequence)
        self._thread = threading.Thread(target=self._make, name="blanks", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return not self._thread.is_alive()

    def take(self, sequence: CachedSequence) -> Blank | None:
        """A sequence's file; None where there is none. Waits until `ready`."""
        self._thread.join()
        return self._files.pop(sequence, None)

    def close(self) -> None:
        """Give back what was not taken."""
        self._thread.join()
        for blank in self._files.values():
            blank.close()
        self._files.clear()

    def _make(self) -> None:
        for sequence, n_bytes in self._sizes.items():
            try:
                self._files[sequence] = Blank(n_bytes)
            except OSError as error:
                print(f"no memory ahead: {error}", file=sys.stderr, flush=True)
                return


def export(
    context: Context, sequences: Sequence[CachedSequence], blanks: Blanks, shortest: int
) -> messages.Paused:
    """Export sequences in the order given, up to the limit of `blanks` in all; shorter ones than
    `shortest` tokens are not worth it.

    The context is of no use for anything else afterwards. The files stay open until this process
    ends. Whatever cannot be exported stays behind, with its reason.
    """
    began = time.monotonic()
    outlet = _Outlet(context, sequences, blanks)
    for sequence in sequences:
        if sequence.n_cells >= shortest:
            outlet.export(sequence)
    blanks.close()
    seconds = time.monotonic() - began
    return messages.Paused(tuple(outlet.states), seconds, tuple(outlet.refused))


class _Outlet:
    """An export under way."""

    def __init__(
        self, context: Context, sequences: Sequence[CachedSequence], blanks: Blanks
    ) -> None:
        self.states: list[messages.ExportedState] = []
        self.refused: list[str] = []
        self._context = context
        self._blanks = blanks
        self._left_bytes = blanks.limit_bytes
        self._done: set[CachedSequence] = set()
        taken = {sequence.slot for sequence in sequences}
        self._free_slot = next(
            (slot for slot in range(context.n_seq_max) if slot not in taken), None
        )

    def export(self, sequence: CachedSequence) -> None:
        """Export one sequence, and free its slot."""
        context = self._context
        if not _worth_a_file(sequence, self._done):
            self.refused.append("shares its cells with a carried one")
            return
        if context.state_bytes(sequence.slot) > self._left_bytes:
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
        self.states.append(messages.ExportedState(state.fd, state.n_bytes, n_tokens))

    def _decodable_slot(self, sequence: CachedSequence) -> int:
        """A slot that the canary can be decoded in: kept sequences may have ids that none can."""
        slot = sequence.slot
        if slot < self._context.n_seq_max or self._free_slot is None:
            return slot
        self._context.copy_slot(slot, self._free_slot, sequence.n_cells)
        self._context.clear_slot(slot)
        return self._free_slot


def _worth_a_file(sequence: CachedSequence, exported: set[CachedSequence]) -> bool:
    return n_shared(sequence, exported) <= _MOST_SHARED * sequence.n_cells


def _with_pending(sequence: CachedSequence) -> Tokens:
    """The tokens in the cache and the one that the canary decodes: the next one of a running
    sequence; of a kept one, whose next is not known, its last once more."""
    n_cells = sequence.n_cells
    if sequence.running and len(sequence.tokens) > n_cells:
        return sequence.tokens[: n_cells + 1].copy()
    known = sequence.tokens[:n_cells]
    return np.append(known, known[-1]).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Arrived:
    """A sequence that is in the cache, under the id `slot`: `tokens` are in its cells."""

    slot: int
    tokens: Tokens
    salt: str


class Incoming:
    """The carried sequences of a worker that loads. Transcoding begins at once, beside the load."""

    def __init__(self, paths: Sequence[str], pair: CachePair, n_threads: int) -> None:
        self._began = time.monotonic()
        self._pair = pair
        self._n_threads = n_threads
        self._refused: list[str] = []
        self._states: list[ExportedState] = []
        self._opened = [state for path in paths if (state := self._open(path)) is not None]
        self._abandoned = threading.Event()
        self._thread = threading.Thread(target=self._transcode, name="transcode", daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """Nobody will import them: stop, and give their memory back. Returns at once."""
        self._abandoned.set()

    def import_into(
        self, context: Context, ids: Sequence[int]
    ) -> tuple[list[Arrived], messages.CarryReport]:
        """Read the sequences into the cache in their order, under the free `ids`, while there are
        some. On the thread that decodes, after the context was made."""
        self._thread.join()
        arrived: list[Arrived] = []
        free = list(ids)
        for state in self._states:
            if not free:
                self._refused.append("no free sequence id")
            elif self._import(context, free[0], state, arrived):
                del free[0]
            state.close()
        report = messages.CarryReport(
            n_sequences=len(arrived),
            n_tokens=sum(len(one.tokens) for one in arrived),
            refused=tuple(self._refused),
            seconds=time.monotonic() - self._began,
        )
        return arrived, report

    def _open(self, path: str) -> ExportedState | None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._refused.append(f"cannot be opened: {error.strerror}")
            return None
        try:
            return ExportedState.open(descriptor)
        except CannotCarry as error:
            os.close(descriptor)
            self._refused.append(str(error))
            return None

    def _transcode(self) -> None:
        for state in self._opened:
            if self._abandoned.is_set():
                state.close()
                continue
            try:
                target = forecast(state.layout, self._pair)
                if target == state.layout:
                    self._states.append(state)
                    continue
                self._states.append(transcode(state, target, self._n_threads))
            except (CannotCarry, OSError, ValueError) as error:
                self._refused.append(str(error))
            state.close()
        if self._abandoned.is_set():
            for state in self._states:
                state.close()

    def _import(
        self, context: Context, slot: int, state: ExportedState, arrived: list[Arrived]
    ) -> bool:
        n_cached = state.contents.n_cached
        # Ids of n_seq_max and above are no part of a batch: the proof runs in slot 0.
        place = slot if slot < context.n_seq_max else 0
        try:
            import_sequence(context, place, state)
            if prove_sequence(context, place, state) is None:
                context.clear_slot(place)
                self._refused.append("came without proof")
                return False
            # The token of the proof is decoded again when its turn comes.
            if state.layout.recurrent:
                import_sequence(context, place, state)
            else:
                context.cut_slot(place, n_cached)
        except CannotCarry as error:
            self._refused.append(str(error))
            return False
        if place != slot:
            context.copy_slot(place, slot, n_cached)
            context.clear_slot(place)
        arrived.append(Arrived(slot, state.tokens[:n_cached], state.contents.salt))
        return True


def incoming_of(message: messages.Load | messages.Transcode | messages.TakeIn) -> Incoming | None:
    """Begin with the sequences that a message names, for the types it names; None without any."""
    if not message.carried:
        return None
    pair = CachePair(KvType(message.type_k), KvType(message.type_v))
    return Incoming(message.carried, pair, len(os.sched_getaffinity(0)))


def log_refusals(report: messages.CarryReport) -> None:
    """Write why sequences stayed behind to the worker's log."""
    for reason in report.refused:
        print(f"not carried: {reason}", file=sys.stderr, flush=True)
