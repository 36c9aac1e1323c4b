"""Between the KV cache and host memory: what is given up is stored, what comes back is restored.

Both are copies of 1 to 5 GB/s, and a long conversation has gigabytes. Plain attention is copied in
parts between steps: as many cells as others need just now, or as the streams that run can wait for.
"""

import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.parts import ArrivingSequence, LeavingSequence, Scratch, Writer
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.cell_rules import Operation, Store
from kvserve.worker.cell_tree import CachedSequence, Tokens, n_common
from kvserve.worker.cold_store import ColdStore, Stored
from kvserve.worker.llama import Context
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.scheduler import Scheduler

_LEAST = 64
_MOST_COPIED = 8
"""A token that need not be decoded again is worth the copy of so many."""
_MOST_LEAVING = 4
"""Sequences that are stored in part."""
_FIRST_CELLS, _LEAST_CELLS = 64, 16
"""Cells that are restored at a time, before it is known how long one takes, and at least."""
_SMOOTHING = 0.3


@dataclass(slots=True)
class _Arriving:
    """The first `n_tokens` of what is `stored` come back as `sequence`, for one request."""

    stored: Stored
    parts: ArrivingSequence
    sequence: CachedSequence
    n_tokens: int

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
        self._scratch = Scratch()
        self._writer = Writer()
        self._leaving: dict[LeavingSequence, int] = {}
        self._arriving: _Arriving | None = None
        self._seconds_per_cell = 0.0
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

    def keep(self, operation: Store) -> None:
        """Copy cells that are about to leave the cache. What cannot be copied is lost, as it would
        be without this tier."""
        leaving = self._find_leaving(operation.tokens, operation.salt)
        try:
            if leaving is not None:
                self._add(leaving, operation)
            elif not self.store.covers(operation.tokens, operation.salt):
                self._begin(operation)
        except (CannotCarry, OSError) as error:
            print(f"not stored: {error}", file=sys.stderr, flush=True)

    def restore(self, scheduler: Scheduler, seconds: float) -> None:
        """Bring back what the requests that are admitted next begin with. Where streams run, as
        much of it as can be copied in so many `seconds`; the request is held until all is there."""
        if self._arriving is not None:
            self._advance(self._arriving, scheduler, seconds)
            return
        # What is about to be stored may be what comes back.
        self._change(self._cache.take_operations())
        if not (len(self.store) or self._leaving):
            return
        for request, tokens, salt in scheduler.next_admissible():
            self._complete(tokens, salt)
            found = self.store.find(tokens, salt)
            if found is None:
                continue
            reuse = self._cache.find(tokens, salt)
            n_won = found[1] - (reuse.n_tokens if reuse is not None else 0)
            n_copied = len(found[0].tokens)
            if n_won >= max(_LEAST, n_copied // _MOST_COPIED) and scheduler.has_room(n_copied):
                if scheduler.n_decoding and self._begin_arrival(*found):
                    scheduler.held = request
                    return
                self._bring_back(*found)

    def _find_leaving(self, tokens: Tokens, salt: str) -> LeavingSequence | None:
        for leaving in self._leaving:
            n_same = n_common(leaving.tokens, tokens)
            if leaving.salt == salt and n_same == len(tokens) == leaving.n_missing:
                return leaving
        return None

    def _begin(self, operation: Store) -> None:
        """Store a sequence, or the first cells that it loses."""
        slot, tokens, salt = operation.slot, operation.tokens, operation.salt
        n_bytes = self._context.state_bytes(slot)
        if n_bytes > self.store.limit_bytes:
            return
        if not operation.n_left or not self._cache.free_ids:
            state = export_sequence(self._context, slot, tokens, salt=salt)
            self.store.put(Stored(state, tokens, salt))
            return
        while len(self._leaving) >= _MOST_LEAVING or not self.store.reserve(n_bytes):
            if not self._leaving:
                return
            self._forget(next(iter(self._leaving)))
        try:
            leaving = LeavingSequence(self._context, slot, tokens, salt, self._writer)
        except BaseException:
            self.store.reserved_bytes -= n_bytes
            raise
        self._leaving[leaving] = n_bytes
        self._add(leaving, operation)

    def _add(self, leaving: LeavingSequence, operation: Store) -> None:
        through = next(iter(self._cache.free_ids), None) if operation.n_left else None
        try:
            if operation.n_left and through is None:
                # All ids are taken: what is left is copied now, and not again.
                leaving.add(operation.slot, 0, None)
            else:
                leaving.add(operation.slot, operation.n_left, through)
            if not leaving.n_missing:
                self._put(leaving)
        except BaseException:
            self._forget(leaving)
            raise

    def _put(self, leaving: LeavingSequence) -> None:
        state = leaving.finish()
        self.store.reserved_bytes -= self._leaving.pop(leaving)
        self.store.put(Stored(state, leaving.tokens, leaving.salt))

    def _forget(self, leaving: LeavingSequence) -> None:
        if leaving in self._leaving:
            self.store.reserved_bytes -= self._leaving.pop(leaving)
            leaving.close()

    def _complete(self, tokens: Tokens, salt: str) -> None:
        """Copy what is missing of a sequence that a request begins with, if the cache has it."""
        for leaving in list(self._leaving):
            n_missing = leaving.n_missing
            if leaving.salt != salt or n_common(leaving.tokens, tokens) <= n_missing:
                continue
            reuse = self._cache.find(tokens, salt)
            through = next(iter(self._cache.free_ids), None)
            if reuse is None or reuse.n_tokens < n_missing or through is None:
                continue
            try:
                leaving.add(reuse.source.slot, 0, through)
                self._put(leaving)
            except (CannotCarry, OSError) as error:
                self._forget(leaving)
                print(f"not stored: {error}", file=sys.stderr, flush=True)

    def _begin_arrival(self, stored: Stored, n_tokens: int) -> bool:
        """Let a sequence come back in parts; False where that is not possible."""
        cache, spare = self._cache, self._cache.spare_id
        if spare is None or not cache.rules.cuts_anywhere:
            return False
        assert isinstance(stored.state, ExportedState)
        try:
            parts = ArrivingSequence(self._context, stored.state, self._scratch)
        except CannotCarry:
            return False
        self.store.take(stored)  # or what is stored to make room may push it out
        sequence = cache.receive(spare, stored.tokens[:n_tokens], stored.salt)
        self._arriving = _Arriving(stored, parts, sequence, n_tokens)
        return True

    def _advance(self, arriving: _Arriving, scheduler: Scheduler, seconds: float) -> None:
        """Bring the next part back."""
        n_cells = arriving.n_left
        if not scheduler.has_room(n_cells):
            self._stop_arrival(arriving, scheduler)
            return
        if scheduler.n_decoding:
            if scheduler.n_reading:
                return
            n_most = _FIRST_CELLS
            if self._seconds_per_cell:
                n_most = max(int(seconds / self._seconds_per_cell), _LEAST_CELLS)
            n_cells = min(n_cells, n_most)
        begun = time.monotonic()
        sequence, cache = arriving.sequence, self._cache
        through = cache.claim(n_cells)
        self._change(cache.take_operations())
        if through is None:
            self._stop_arrival(arriving, scheduler)
            return
        n_before = sequence.n_cells
        try:
            arriving.parts.take(sequence.slot, through, n_before, n_before + n_cells)
        except CannotCarry as error:
            print(f"not restored: {error}", file=sys.stderr, flush=True)
            self._stop_arrival(arriving, scheduler, broken=True)
            return
        cache.append(sequence, n_cells)
        measured = (time.monotonic() - begun) / n_cells
        known = self._seconds_per_cell or measured
        self._seconds_per_cell = known + _SMOOTHING * (measured - known)
        if not arriving.n_left:
            cache.arrived(sequence, n_stored=arriving.n_tokens)
            self._end_arrival(arriving, scheduler)

    def _stop_arrival(
        self, arriving: _Arriving, scheduler: Scheduler, *, broken: bool = False
    ) -> None:
        """Do without: the request is read like any other."""
        self._cache.drop(arriving.sequence)
        self._change(self._cache.take_operations())
        self._end_arrival(arriving, scheduler, broken=broken)

    def _end_arrival(
        self, arriving: _Arriving, scheduler: Scheduler, *, broken: bool = False
    ) -> None:
        self._arriving = scheduler.held = None
        if broken:
            arriving.stored.state.close()
        else:
            self.store.put(arriving.stored)

    def _bring_back(self, stored: Stored, n_tokens: int) -> None:
        context, cache = self._context, self._cache
        n_stored = len(stored.tokens)
        self.store.take(stored)  # or what is stored to make room may push it out
        slot = cache.claim(n_stored)
        self._change(cache.take_operations())
        if slot is None:
            self.store.put(stored)
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
        cache.adopt(slot, stored.tokens[:n_tokens], stored.salt, n_stored=n_tokens)
        self.store.put(stored)
