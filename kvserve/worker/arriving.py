"""Sequences that an earlier worker left: transcoded for this one's cache while it loads, or before,
imported, and proven before they count. What cannot be carried is prefilled again."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile

import numpy as np

from kvserve.core.dtypes import CachePair, KvType
from kvserve.ipc import messages
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import ExportedState, Tokens
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import import_piece, import_sequence, prove_sequence
from kvserve.worker.carry.structure import Bytes
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.llama import Context

Paths = tuple[str, ...]
"""The files of one sequence: the beginning in pieces, if there are any, then the rest."""

_BENCH = 0
"""The sequence id that pieces come in by, and that proofs run in: one that batches may use."""
_CORES_TO_SHARE = 4
"""With so many, one is left to whoever loads the weights."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A sequence that is in the cache, under the id `slot`: `tokens` are in its cells, the first
    `n_ahead` of them from pieces."""

    slot: int
    tokens: Tokens
    salt: str
    n_ahead: int


@dataclass(frozen=True, slots=True)
class _File:
    """A state in this worker's types, and its bytes, mapped."""

    state: ExportedState
    data: Bytes


@dataclass(slots=True)
class _Begun:
    """A sequence of which the files `paths` were read; each ends after so many tokens as `ends`
    says, and `tokens` are all of them."""

    slot: int
    paths: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    tokens: Tokens = field(default_factory=lambda: np.empty(0, np.int32))
    salt: str = ""

    def precedes(self, salt: str, tokens: Tokens) -> bool:
        """Whether a file with these tokens may follow."""
        return salt == self.salt and np.array_equal(tokens[: len(self.tokens)], self.tokens)

    def cut(self, n_files: int) -> None:
        """Keep the first `n_files`, at least one."""
        del self.paths[n_files:], self.ends[n_files:]
        self.tokens = self.tokens[: self.ends[-1]]


class Incoming:
    """The carried sequences of a worker, for a cache of the types `pair`.

    `begin` may be called before there is a context; all else is for the thread that decodes.
    """

    def __init__(self, pair: CachePair) -> None:
        self.pair = pair
        self._files: dict[str, Future[_File]] = {}
        self._begun: list[_Begun] = []
        self._abandoned = threading.Event()
        self._pool = ThreadPoolExecutor(1, "incoming")
        self._waited = _Stopwatch()
        self._read = _Stopwatch()
        self._proven = _Stopwatch()

    def begin(self, sequences: Sequence[Paths], *, ahead: bool = False) -> None:
        """Transcode files, those that are not begun yet; returns at once. What is done `ahead`
        leaves the processors to whoever else needs them."""
        for path in (path for paths in sequences for path in paths):
            if path not in self._files:
                self._files[path] = self._pool.submit(self._transcode, path, ahead)

    def then(self, call: Callable[[], None]) -> None:
        """Call when everything begun so far is done, on a thread."""
        self._pool.submit(call)

    def abandon(self) -> None:
        """Nobody will import them: stop, and give their memory back. Returns at once."""
        self._abandoned.set()
        self._forget(list(self._files))
        self._pool.shutdown(wait=False)

    def take_ahead(self, context: Context, ids: Sequence[int], sequences: Sequence[Paths]) -> None:
        """Read the pieces of sequences into the cache as far as they go, under the free `ids`; the
        rest follows. What goes wrong is told when it does."""
        self.begin(sequences, ahead=True)
        taken = {one.slot for one in self._begun}
        free = [one for one in ids if one not in taken and one != _BENCH]
        for paths, slot in zip(sequences, free, strict=False):
            begun = _Begun(slot)
            try:
                for path in paths:
                    self._read_piece(context, begun, path)
            except CannotCarry as error:
                print(f"not taken ahead: {error}", file=sys.stderr, flush=True)
            self._forget(begun.paths)
            if begun.paths:
                self._begun.append(begun)

    def import_into(
        self, context: Context, ids: Sequence[int], sequences: Sequence[Paths]
    ) -> tuple[list[Arrived], messages.CarryReport]:
        """Read the sequences into the cache in their order, under the free `ids`, while there are
        some. What was taken ahead and is no beginning of any of them is cleared."""
        began = time.monotonic()
        self.begin(sequences)
        wanted = {path for paths in sequences for path in paths}
        self._forget([path for path in self._files if path not in wanted])
        self._clear_begun(context, sequences)
        taken = {one.slot for one in self._begun}
        free = [one for one in ids if one not in taken]
        arrived: list[Arrived] = []
        refused: list[str] = []
        for paths in sequences:
            begun = self._find_begun(paths)
            try:
                one = self._take_in(context, paths, begun, free)
            except CannotCarry as error:
                refused.append(str(error))
                continue
            finally:
                self._forget(paths)
            if begun is None:
                free.remove(one.slot)
            arrived.append(one)
        self._pool.shutdown(wait=False)
        report = messages.CarryReport(
            n_sequences=len(arrived),
            n_tokens=sum(len(one.tokens) for one in arrived),
            refused=tuple(refused),
            seconds=time.monotonic() - began,
            n_tokens_ahead=sum(one.n_ahead for one in arrived),
            transcode_seconds=self._waited.seconds,
            import_seconds=self._read.seconds,
            proof_seconds=self._proven.seconds,
        )
        return arrived, report

    def _transcode(self, path: str, ahead: bool) -> _File:
        """On the pool's thread. Raises CannotCarry."""
        state = self._open(path)
        try:
            target = forecast(state.layout, self.pair)
            if target != state.layout:
                n_threads = len(os.sched_getaffinity(0))
                n_threads -= n_threads >= _CORES_TO_SHARE
                source, state = state, transcode(state, target, n_threads, aside=ahead)
                source.close()
            return _File(state, state.view(mapped=True))
        except (CannotCarry, OSError, ValueError) as error:
            state.close()
            raise CannotCarry(Reason.IMPORT, str(error)) from error

    def _open(self, path: str) -> ExportedState:
        if self._abandoned.is_set():
            raise CannotCarry(Reason.IMPORT, "nobody wants it any more")
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CannotCarry(Reason.IMPORT, f"cannot be opened: {error.strerror}") from error
        try:
            return ExportedState.open(descriptor)
        except CannotCarry:
            os.close(descriptor)
            raise

    def _file(self, path: str) -> _File:
        """A file in this worker's types. Raises CannotCarry."""
        with self._waited.running():
            return self._files[path].result()

    def _forget(self, paths: Sequence[str]) -> None:
        """Give files back, on a thread: gigabytes take the kernel a while to free."""
        for path in paths:
            future = self._files.pop(path, None)
            if future is not None and not future.cancel():
                self._pool.submit(_close, future)

    def _find_begun(self, paths: Paths) -> _Begun | None:
        return next((one for one in self._begun if one.paths[0] == paths[0]), None)

    def _clear_begun(self, context: Context, sequences: Sequence[Paths]) -> None:
        """Give up what was taken ahead and is not wanted, or not to its end."""
        kept = []
        for begun in self._begun:
            paths = next((one for one in sequences if one[0] == begun.paths[0]), ())
            pairs = zip(begun.paths, paths[:-1], strict=False)
            n_wanted = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            if n_wanted == 0:
                context.clear_slot(begun.slot)
                continue
            if n_wanted < len(begun.paths):
                begun.cut(n_wanted)
                context.cut_slot(begun.slot, begun.ends[-1])
            kept.append(begun)
        self._begun = kept

    def _take_in(
        self, context: Context, paths: Paths, begun: _Begun | None, free: Sequence[int]
    ) -> Arrived:
        """One sequence, to where `begun` has its beginning or to the first free id. Raises
        CannotCarry; nothing of it is in the cache then."""
        if begun is None and not free:
            raise CannotCarry(Reason.IMPORT, "no free sequence id")
        slot = free[0] if begun is None else begun.slot
        try:
            if len(paths) == 1:
                return self._take_whole(context, slot, self._file(paths[0]))
            if _BENCH not in free or slot == _BENCH:
                raise CannotCarry(Reason.IMPORT, "no free sequence id")
            return self._take_pieces(context, begun or _Begun(slot), paths)
        except CannotCarry:
            context.clear_slot(slot)
            raise

    def _take_whole(self, context: Context, slot: int, file: _File) -> Arrived:
        state = file.state
        n_cached = state.contents.n_cached
        place = slot if slot < context.n_seq_max else _BENCH
        with self._read.running():
            import_sequence(context, place, state, file.data)
        self._prove(context, place, state)
        with self._read.running():
            # The token of the proof is decoded again when its turn comes.
            if state.layout.recurrent:
                import_sequence(context, place, state, file.data)
            else:
                context.cut_slot(place, n_cached)
            if place != slot:
                context.copy_slot(place, slot, n_cached)
                context.clear_slot(place)
        return Arrived(slot, state.tokens[:n_cached], state.contents.salt, 0)

    def _take_pieces(self, context: Context, begun: _Begun, paths: Paths) -> Arrived:
        for path in paths[len(begun.paths) :]:
            self._read_piece(context, begun, path)
        last = self._file(paths[-1]).state
        context.copy_slot(begun.slot, _BENCH, last.contents.n_cached)
        self._prove(context, _BENCH, last)
        context.clear_slot(_BENCH)
        tokens = last.tokens[: last.contents.n_cached]
        return Arrived(begun.slot, tokens, last.contents.salt, last.contents.n_before)

    def _read_piece(self, context: Context, begun: _Begun, path: str) -> None:
        """Add a file to what was read before it. Raises CannotCarry; what was read stays."""
        file = self._file(path)
        contents, tokens = file.state.contents, file.state.tokens
        if begun.paths and not begun.precedes(contents.salt, tokens):
            raise CannotCarry(Reason.IMPORT, "its pieces are of several sequences")
        with self._read.running():
            import_piece(context, begun.slot, file.state, _BENCH, file.data)
        begun.paths.append(path)
        begun.ends.append(contents.n_cached)
        begun.salt, begun.tokens = contents.salt, tokens[: contents.n_cached]

    def _prove(self, context: Context, place: int, state: ExportedState) -> None:
        with self._proven.running():
            if prove_sequence(context, place, state) is None:
                context.clear_slot(place)
                raise CannotCarry(Reason.CANARY, "came without proof")


class _Stopwatch:
    """Adds up the seconds that pass while it runs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began


def _close(future: "Future[_File]") -> None:
    if future.exception() is None:
        future.result().state.close()


def incoming_for(message: messages.Transcode | messages.TakeAhead | messages.TakeIn) -> Incoming:
    """What a message's sequences come in by."""
    return Incoming(CachePair(KvType(message.type_k), KvType(message.type_v)))


def log_refusals(report: messages.CarryReport) -> None:
    """Write why sequences stayed behind to the worker's log."""
    for reason in report.refused:
        print(f"not carried: {reason}", file=sys.stderr, flush=True)
