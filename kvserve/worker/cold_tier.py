"""Between the KV cache and host memory: what is given up is stored, what comes back is restored."""

import sys
from collections.abc import Callable

from kvserve.worker.carry.memory_file import ExportedState
from kvserve.worker.carry.refusal import CannotCarry
from kvserve.worker.carry.sequence import export_sequence, import_sequence
from kvserve.worker.cell_rules import Operation, Store
from kvserve.worker.cold_store import ColdStore, Stored
from kvserve.worker.llama import Context
from kvserve.worker.prefix_cache import PrefixCache
from kvserve.worker.scheduler import Scheduler

_LEAST = 64
_MOST_COPIED = 8
"""A token that need not be decoded again is worth the copy of so many."""


class ColdTier:
    """Stores and restores sequences of `context`, on the thread that decodes.

    Both take as long as the copy: about 1 GB/s into fresh memory, more out of it.
    """

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
        self.store = ColdStore(limit_bytes, whole=not cache.rules.cuts_anywhere)

    def keep(self, operation: Store) -> None:
        """Copy a sequence that is about to leave the cache. What cannot be copied is lost, as it
        would be without this tier."""
        tokens = operation.tokens
        context = self._context
        if context.state_bytes(operation.slot) > self.store.limit_bytes:
            return
        try:
            state = export_sequence(context, operation.slot, tokens, salt=operation.salt)
        except (CannotCarry, OSError) as error:
            print(f"not stored: {error}", file=sys.stderr, flush=True)
            return
        self.store.put(Stored(state, tokens, operation.salt))

    def restore(self, scheduler: Scheduler) -> None:
        """Bring back what the requests that are admitted next begin with."""
        if not len(self.store):
            return
        for tokens, salt in scheduler.next_admissible():
            found = self.store.find(tokens, salt)
            if found is None:
                continue
            reuse = self._cache.find(tokens, salt)
            n_won = found[1] - (reuse.n_tokens if reuse is not None else 0)
            n_copied = len(found[0].tokens)
            if n_won >= max(_LEAST, n_copied // _MOST_COPIED) and scheduler.has_room(n_copied):
                self._bring_back(*found)

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
