"""Between the KV cache and host memory: what is given up is stored, what comes back is restored.

Both are copies of 1 to 5 GB/s, and a long conversation has gigabytes. Plain attention is copied in
parts between steps, where that can be: as many cells as the streams that run can wait for, or as
others need just now. A sequence that has to go as a whole, for its id, is copied at once.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.parts import (
    PART_BYTES,
    ArrivingSequence,
    LeavingSequence,
    Scratch,
    Writer,
)
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.cell_rules import Operation, Store
from kvserve.worker.cell_tree import CachedSequence, Tokens, n_common
from kvserve.worker.cold_store import ColdStore, Stored
from kvserve.worker.llama import Context
from kvserve.worker.prefix_cache import PrefixCache, Reuse
from kvserve.worker.scheduler import Scheduler

_LEAST = 64
_MOST_COPIED = 8
"""A token that need not be decoded again is worth the copy of so many."""
_MOST_LEAVING = 4
"""Sequences that are stored in part."""
_FIRST_CELLS, _LEAST_CELLS, _MOST_CELLS = 64, 16, 512
"""Cells that are copied at a time before it is known how long one takes, at least and at most."""
_PROBED_CELLS = 32
"""Cells of a sequence that leave at first: what streams have drawn side by side lies in single
cells, each of which is copied by itself, 20 times as slowly as those of a prompt."""
_SMOOTHING = 0.3


class _Speed:
    """How long cells take one way, a part of them with what any part takes."""

    def __init__(self, n_first: int = _FIRST_CELLS) -> None:
        self._n_first = n_first
        self._begun = False
        self._seconds_per_cell = 0.0

    def observe(self, n_cells: int, seconds: float) -> None:
        """Note a part. The first one needs memory that the others have."""
        if not self._begun:
            self._begun = True
            return
        measured = seconds / n_cells
        known = self._seconds_per_cell or measured
        self._seconds_per_cell = known + _SMOOTHING * (measured - known)

    def cells_in(self, seconds: float) -> int:
        """As many as should be copied in so many `seconds`."""
        if not self._seconds_per_cell:
            return self._n_first
        return min(max(int(seconds / self._seconds_per_cell), _LEAST_CELLS), _MOST_CELLS)


@dataclass(slots=True)
class _Arriving:
    """The first `n_tokens` of a sequence come back for `request`, of what was `stored` or, None,
    had only begun to leave, under `key`. `n_bytes` of host memory are set aside for it."""

    request: int
    parts: ArrivingSequence
    sequence: CachedSequence
    n_tokens: int
    n_bytes: int
    stored: Stored | None
    key: int = 0

    @property
    def n_left(self) -> int:
        return self.n_tokens - self.sequence.n_cells


class ColdTier:
    """Stores and restores sequences of `context`, on the thread that decodes."""

    def __init__(
        self,
        context: Context,
        cache: PrefixCache,
        limit_bytes: int,
        change: Callable[[tuple[Operation, ...]], None],
    ) -> None:
        self._context = context
        self._cache = cache
        self._change = change
        on_gpu = context.asynchronous
        self._scratch, self._writer = Scratch(page_locked=on_gpu), Writer(page_locked=on_gpu)
        self._most_cells = _MOST_CELLS
        self._leaving: dict[int, LeavingSequence] = {}
        self._settled: set[int] = set()
        self._arriving: _Arriving | None = None
        self._speeds_out: dict[int, _Speed] = {}
        self._speed_in = _Speed()
        # The kernel takes 60 ms to get the memory of a long conversation back.
        closing = ThreadPoolExecutor(1, "closing")
        self.store = ColdStore(
            limit_bytes,
            whole=not cache.rules.cuts_anywhere,
            close=lambda state: closing.submit(state.close),
        )

    @property
    def restoring(self) -> bool:
        """Whether a part comes back before each step."""
        return self._arriving is not None

    def n_leaving(self, seconds: float) -> int:
        """Cells that `keep` copies in about so many `seconds`, of the sequence that leaves next."""
        speed = self._speeds_out.get(self._cache.next_to_leave)
        n_cells = _PROBED_CELLS if speed is None else speed.cells_in(seconds)
        return min(n_cells, self._most_cells)

    def keep(self, operation: Store) -> None:
        """Copy cells that are about to leave the cache. What cannot be copied is lost, as it would
        be without this tier."""
        key = operation.key
        leaving = self._leaving.get(key)
        try:
            if leaving is not None:
                self._add(leaving, operation)
            elif key not in self._settled:
                self._begin(operation)
        except (CannotCarry, OSError) as error:
            self._settled.add(key)
            print(f"not stored: {error}", file=sys.stderr, flush=True)
        if key in self._settled:
            self._cache.settle(key)

    def restore(self, scheduler: Scheduler, seconds: float) -> None:
        """Bring back what the requests that are admitted next begin with. Where streams run, as
        much of it as can be copied in so many `seconds`; the request is held until all is there."""
        # What is about to be stored may be what comes back.
        self._change(self._cache.take_operations())
        self._forget_abandoned()
        if self._arriving is not None:
            self._advance(self._arriving, scheduler, seconds)
        if self._arriving is not None or not (len(self.store) or self._leaving):
            return
        for request, tokens, salt in scheduler.next_admissible():
            self._bring_back_for(request, tokens, salt, scheduler)
            if self._arriving is not None:
                return

    def _begin(self, operation: Store) -> None:
        """Store a sequence, or the first cells that it loses."""
        slot, tokens, salt = operation.slot, operation.tokens, operation.salt
        if self._context.state_bytes(slot) > self.store.limit_bytes or self.store.covers(
            tokens, salt
        ):
            self._settled.add(operation.key)
            return
        if not operation.n_left or self._free_id() is None:
            state = export_sequence(self._context, slot, tokens, salt=salt)
            self._put(Stored(state, tokens, salt))
            self._settled.add(operation.key)
            return
        leaving = LeavingSequence(self._context, slot, tokens, salt, self._writer)
        self._size_parts(leaving.n_bytes, len(tokens))
        while len(self._leaving) >= _MOST_LEAVING or not self.store.reserve(leaving.n_bytes):
            if not self._leaving:
                leaving.close()
                self._settled.add(operation.key)
                return
            self._forget(next(iter(self._leaving)))
        self._leaving[operation.key] = leaving
        self._add(leaving, operation)

    def _add(self, leaving: LeavingSequence, operation: Store) -> None:
        through, n_left = self._free_id(), operation.n_left
        try:
            if through is None:
                # All ids are taken: what there is, is copied now.
                leaving.add(operation.slot, 0, None)
            while (n_before := leaving.n_missing) > n_left:
                begun = time.monotonic()
                leaving.add(operation.slot, max(n_left, n_before - self._most_cells), through)
                speed = self._speeds_out.setdefault(operation.key, _Speed(_PROBED_CELLS))
                speed.observe(n_before - leaving.n_missing, time.monotonic() - begun)
            if leaving.n_missing:
                return
            state = leaving.finish()
        except BaseException:
            self._forget(operation.key)
            raise
        self._forget(operation.key)
        self._settled.add(operation.key)
        self._put(Stored(state, leaving.tokens, leaving.salt))

    def _size_parts(self, n_bytes: int, n_cells: int) -> None:
        self._most_cells = min(max(PART_BYTES * n_cells // n_bytes, _LEAST_CELLS), _MOST_CELLS)

    def _free_id(self) -> int | None:
        """A sequence id that nothing has now, whatever is still to be done."""
        return next((one for one in self._cache.free_ids if not self._context.n_cached(one)), None)

    def _put(self, stored: Stored) -> bool:
        """Keep what is whole, rather than what is not."""
        store = self.store
        while self._leaving and stored.state.n_bytes > store.limit_bytes - store.reserved_bytes:
            self._forget(next(iter(self._leaving)))
        return store.put(stored)

    def _forget(self, key: int) -> None:
        self._speeds_out.pop(key, None)
        leaving = self._leaving.pop(key, None)
        if leaving is not None:
            self._cache.store_anew(key)
            self.store.reserved_bytes -= leaving.n_bytes
            leaving.close()

    def _forget_abandoned(self) -> None:
        """Of sequences that have left otherwise the beginning will never come."""
        if self._leaving or self._settled:
            alive = self._cache.leaving
            self._settled &= alive
            for key in self._leaving.keys() - alive:
                self._forget(key)

    def _bring_back_for(
        self, request: int, tokens: Tokens, salt: str, scheduler: Scheduler
    ) -> None:
        """Bring back, or begin to, what a request begins with and the cache does not have."""
        reuse = self._cache.find(tokens, salt)
        n_here = reuse.n_tokens if reuse is not None else 0
        found = self.store.find(tokens, salt)
        n_stored = found[1] if found is not None else 0
        end = self._find_leaving(tokens, salt, n_here)
        if reuse is not None and end is not None and end[1] >= n_stored:
            key, n_tokens = end
            n_copied = n_tokens - self._leaving[key].n_missing
            if self._is_worth(n_tokens - n_here, n_copied) and scheduler.has_room(n_copied):
                self._begin_end(key, n_tokens, reuse, request, scheduler)
        elif found is not None:
            n_copied = len(found[0].tokens)
            if not self._is_worth(n_stored - n_here, n_copied) or not scheduler.has_room(n_copied):
                return
            if not (scheduler.n_decoding and self._begin_whole(*found, request, scheduler)):
                self._bring_back(*found)

    @staticmethod
    def _is_worth(n_won: int, n_copied: int) -> bool:
        return n_won >= max(_LEAST, n_copied // _MOST_COPIED)

    def _find_leaving(self, tokens: Tokens, salt: str, n_here: int) -> tuple[int, int] | None:
        """The sequence that `tokens` begin with the most of, whose end has left and whose beginning
        is here; its key, and how much that is."""
        best: tuple[int, int] | None = None
        for key, leaving in self._leaving.items():
            n_both = min(n_common(leaving.tokens, tokens), len(tokens) - 1)
            follows = leaving.salt == salt and leaving.n_missing <= n_here
            if follows and n_both > max(leaving.n_missing, best[1] if best is not None else 0):
                best = key, n_both
        return best

    def _begin_end(
        self, key: int, n_tokens: int, reuse: Reuse, request: int, scheduler: Scheduler
    ) -> None:
        """Let the end of a sequence come back to its beginning, which has not left yet."""
        cache, leaving = self._cache, self._leaving[key]
        spare = cache.spare_id
        if spare is None:
            return
        try:
            parts = leaving.arriving(self._scratch)
        except (CannotCarry, OSError) as error:
            self._forget(key)
            print(f"not restored: {error}", file=sys.stderr, flush=True)
            return
        n_here, text = leaving.n_missing, leaving.tokens[:n_tokens]
        sequence = cache.receive(spare, text, leaving.salt, reuse, n_here)
        self._change(cache.take_operations())
        self._forget(key)
        self._settled.add(key)  # what is still there of it is there once more
        # The file is gone with its last view.
        self.store.reserved_bytes += leaving.n_bytes
        self._arriving = _Arriving(request, parts, sequence, n_tokens, leaving.n_bytes, None, key)
        self._hold(scheduler)

    def _begin_whole(
        self, stored: Stored, n_tokens: int, request: int, scheduler: Scheduler
    ) -> bool:
        """Let a sequence come back in parts; False where that is not possible."""
        cache, spare = self._cache, self._cache.spare_id
        if spare is None or not cache.rules.cuts_anywhere:
            return False
        assert isinstance(stored.state, ExportedState)
        try:
            parts = ArrivingSequence.of(self._context, stored.state, self._scratch)
        except (CannotCarry, OSError, ValueError):
            return False
        self.store.take(stored)  # or what is stored to make room may push it out
        n_bytes = stored.state.n_bytes
        self.store.reserved_bytes += n_bytes
        sequence = cache.receive(spare, stored.tokens[:n_tokens], stored.salt)
        self._arriving = _Arriving(request, parts, sequence, n_tokens, n_bytes, stored)
        self._size_parts(n_bytes, len(stored.tokens))
        self._hold(scheduler)
        return True

    def _hold(self, scheduler: Scheduler) -> None:
        """Hold the request for which something arrives, or let all of it come where nobody's
        stream waits for it."""
        arriving = self._arriving
        assert arriving is not None
        scheduler.held = arriving.request
        if not scheduler.n_decoding:
            self._advance(arriving, scheduler, 0.0)

    def _advance(self, arriving: _Arriving, scheduler: Scheduler, seconds: float) -> None:
        """Bring the next part back; without streams all parts."""
        if not scheduler.is_waiting(arriving.request) or not scheduler.has_room(arriving.n_left):
            self._end_arrival(arriving, scheduler, whole=False)
        elif not scheduler.n_decoding:
            while self._arriving is arriving:
                self._take(arriving, self._most_cells, scheduler)
        elif not scheduler.n_reading:
            n_most = min(self._speed_in.cells_in(seconds), self._most_cells)
            self._take(arriving, n_most, scheduler)

    def _take(self, arriving: _Arriving, n_most: int, scheduler: Scheduler) -> None:
        begun = time.monotonic()
        sequence, cache = arriving.sequence, self._cache
        n_before, n_cells = sequence.n_cells, min(arriving.n_left, n_most)
        through = cache.claim(n_cells)
        self._change(cache.take_operations())
        if through is None:
            self._end_arrival(arriving, scheduler, whole=False)
            return
        try:
            arriving.parts.take(sequence.slot, through, n_before, n_before + n_cells)
        except CannotCarry as error:
            print(f"not restored: {error}", file=sys.stderr, flush=True)
            self._end_arrival(arriving, scheduler, whole=False, broken=True)
            return
        cache.append(sequence, n_cells)
        self._speed_in.observe(n_cells, time.monotonic() - begun)
        if not arriving.n_left:
            self._end_arrival(arriving, scheduler, whole=True)

    def _end_arrival(
        self, arriving: _Arriving, scheduler: Scheduler, *, whole: bool, broken: bool = False
    ) -> None:
        """Keep what is there as a `whole`, or do without: the request is read like any other."""
        self._arriving = scheduler.held = None
        self.store.reserved_bytes -= arriving.n_bytes
        stored, kept = arriving.stored, False
        if stored is not None and broken:
            stored.state.close()
        elif stored is not None:
            kept = self._put(stored)
        if whole:
            self._cache.arrived(arriving.sequence, arriving.n_tokens if kept else 0)
            return
        self._settled.discard(arriving.key)
        self._cache.drop(arriving.sequence)
        self._change(self._cache.take_operations())

    def _bring_back(self, stored: Stored, n_tokens: int) -> None:
        context, cache = self._context, self._cache
        n_stored = len(stored.tokens)
        self.store.take(stored)  # or what is stored to make room may push it out
        n_bytes = stored.state.n_bytes
        self.store.reserved_bytes += n_bytes
        slot = cache.claim(n_stored)
        self._change(cache.take_operations())
        self.store.reserved_bytes -= n_bytes
        if slot is None:
            self._put(stored)
            return
        assert isinstance(stored.state, ExportedState)
        try:
            import_sequence(context, slot, stored.state)
        except (CannotCarry, OSError, ValueError) as error:
            print(f"not restored: {error}", file=sys.stderr, flush=True)
            context.clear_slot(slot)
            stored.state.close()
            return
        if n_tokens < n_stored:
            context.cut_slot(slot, n_tokens)
        kept = self._put(stored)
        cache.adopt(slot, stored.tokens[:n_tokens], stored.salt, n_stored=n_tokens if kept else 0)
