"""Sequences that stay in the KV cache after their request, for later ones that begin alike.

What a running request needs always goes before what is kept: kept cells and sequence ids are given
up as soon as they are wanted, the least recently used first. Nothing here touches llama.cpp: what
is to be done to its memory comes out as `Operation`s, to be carried out in order before the next
decode.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from kvserve.worker.cell_rules import Clear, Copy, Cut, Operation, Rules, Store
from kvserve.worker.cell_tree import CachedSequence, CellTree, Match, Tokens
from kvserve.worker.cold_store import SHORTEST
from kvserve.worker.worth import Worth

_SHORTEST = 16
"""Fewer tokens are not worth the walk over all cells that sharing takes."""
_NO_ID = -1
_EVICTED_SHARE = 64
"""At least a 64th of all cells is given up at a time, lest a running request ask at every step."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """`match` can be reused; running sequences use `n_pinned` of its cells.

    `source` holds them; where `takes`, it is a kept one and becomes the new sequence.
    """

    match: Match
    source: CachedSequence
    n_pinned: int
    takes: bool

    @property
    def n_tokens(self) -> int:
        """Tokens that need not be decoded again."""
        return self.match.n_tokens


class PrefixCache:
    """The sequences of a KV cache with `n_cells`, whose batches use the ids below `n_slots`.

    `first_position` tells the lowest position of a sequence that the cache really holds, -1 for
    none. Beginnings shorter than `shortest` are not reused. With `stores` what others need the
    cells of is stored first, where reuse has been paying or its own request comes back.
    """

    def __init__(
        self,
        n_cells: int,
        n_slots: int,
        rules: Rules,
        first_position: Callable[[int], int],
        shortest: int = _SHORTEST,
        *,
        stores: bool = False,
    ) -> None:
        self.shortest = shortest
        self.rules = rules
        self._n_cells = n_cells
        self._n_slots = n_slots
        self._first_position = first_position
        self._tree = CellTree()
        self._worth = Worth(n_cells)
        self._stores = stores
        self._kept: dict[CachedSequence, None] = {}
        self._free_slots = list(range(n_slots - 1, -1, -1))
        self._free_spares = list(range(n_slots + rules.n_spare - 1, n_slots - 1, -1))
        self._operations: list[Operation] = []
        self._keys = itertools.count(1)

    @property
    def n_used(self) -> int:
        """Cells that something is in."""
        return self._tree.n_cells

    @property
    def n_pinned(self) -> int:
        """Cells that running sequences use; a shared one counts once."""
        return self._tree.n_pinned

    @property
    def n_kept(self) -> int:
        """Cells that only kept sequences use: free for the asking."""
        return self._tree.n_cells - self._tree.n_pinned

    @property
    def n_free(self) -> int:
        """Cells that nothing uses."""
        return self._n_cells - self._tree.n_cells

    @property
    def kept(self) -> tuple[CachedSequence, ...]:
        """The kept sequences, the most recently used first."""
        return tuple(reversed(self._kept))

    def take_operations(self) -> tuple[Operation, ...]:
        """What is to be done to the memory, since the last call."""
        operations = tuple(self._operations)
        self._operations.clear()
        return operations

    def find(self, tokens: Tokens, salt: str) -> Reuse | None:
        """The longest beginning of `tokens` that can be reused.

        At least the last token is left to be decoded: its logits are wanted.
        """
        for found in self._tree.match(tokens, salt):
            match = self._tree.shorten(found, min(found.n_tokens, len(tokens) - 1))
            if match.n_tokens < self.shortest:
                break
            reuse = self._judge(match)
            if reuse is not None:
                return reuse
        return None

    def observe(self, tokens: Tokens, salt: str, n_reused: int) -> None:
        """Tell of a new request, and how many of its tokens were in the cache: how much is kept
        follows from that."""
        self._worth.observe(tokens, salt, n_reused)

    def open(self, tokens: Tokens, salt: str, reuse: Reuse | None) -> CachedSequence:
        """Begin a running sequence, on top of what is reused. The caller has at most `n_slots`
        running."""
        if reuse is None:
            return self._tree.open(self._take_slot(), tokens, salt)
        source = reuse.source
        if source in self._kept:
            self._touch(source)
        if reuse.takes:
            return self._take_over(reuse, tokens)
        # In the tree before it has an id: to find one, others may have to leave, and the branch
        # that matched would be joined with another.
        sequence = self._tree.open(_NO_ID, tokens, salt, reuse.match)
        sequence.slot = self._take_slot()
        self._operations.append(Copy(source.slot, sequence.slot, reuse.n_tokens))
        return sequence

    def append(self, sequence: CachedSequence, n_tokens: int) -> None:
        """A decode filled cells for the next `n_tokens` tokens of a running sequence."""
        self._tree.append(sequence, n_tokens)

    def cut_back(self, sequence: CachedSequence) -> None:
        """Give up what a decode filled after the cells that are known of."""
        self._operations.append(Cut(sequence.slot, sequence.n_cells))

    def keep(self, sequence: CachedSequence, *, wanted: bool = False) -> None:
        """A sequence's request ended, or waits again (`wanted`): its cells stay until others need
        them."""
        self._tree.stop(sequence)
        sequence.wanted = wanted
        known = self._known(sequence)
        if sequence.n_cells < self.shortest or known is not None:
            self._drop(sequence)
            if known is not None:
                self._touch(known)
            return
        self._kept[sequence] = None
        self._trim()

    def drop(self, sequence: CachedSequence) -> None:
        """Forget a running sequence, whose cells may be wrong."""
        self._tree.stop(sequence)
        self._drop(sequence)

    @property
    def free_ids(self) -> tuple[int, ...]:
        """Sequence ids that nothing has, those that batches cannot use first."""
        return (*self._free_spares, *self._free_slots)

    def claim(self, n_tokens: int) -> int | None:
        """Give up what must go for `n_tokens` more cells, and for an id that batches may use;
        returns a free one. None where all run."""
        # First the id: what is stored to make room goes by way of a free one.
        if not self._free_slots:
            if not any(kept.slot < self._n_slots for kept in self._kept):
                return None
            self._free_slots.append(self._take_slot())
        self.make_room(n_tokens, n_tokens)
        return self._free_slots[-1]

    @property
    def leaving(self) -> set[int]:
        """The keys of the sequences whose end is given up to be stored, and whose beginning is
        still here."""
        return {kept.leaving for kept in self._kept if kept.leaving}

    @property
    def next_to_leave(self) -> int:
        """The key of the sequence that is to be stored next; 0 where none is, or nothing of it
        yet."""
        next_ones = (kept for kept in self._kept if self._is_to_store(kept))
        return next((kept.leaving for kept in next_ones if self._tree.n_freeable(kept)), 0)

    @property
    def spare_id(self) -> int | None:
        """A free sequence id that batches cannot use."""
        return self._free_spares[-1] if self._free_spares else None

    def adopt(self, slot: int, tokens: Tokens, salt: str, n_stored: int = 0) -> None:
        """Keep a sequence that was read from elsewhere under a free id. `n_stored` of its tokens
        are in host memory already."""
        sequence = self.receive(slot, tokens, salt)
        self.append(sequence, len(tokens))
        self.arrived(sequence, n_stored)

    def receive(
        self, slot: int, tokens: Tokens, salt: str, reuse: Reuse | None = None, n_here: int = 0
    ) -> CachedSequence:
        """Begin a sequence that is read from elsewhere under a free id, on top of the first
        `n_here` tokens of what is reused. What is `append`ed is not given up before it has
        `arrived`."""
        (self._free_slots if slot < self._n_slots else self._free_spares).remove(slot)
        if reuse is None:
            return self._tree.open(slot, tokens, salt)
        self._operations.append(Copy(reuse.source.slot, slot, n_here))
        return self._tree.open(slot, tokens, salt, self._tree.shorten(reuse.match, n_here))

    def arrived(self, sequence: CachedSequence, n_stored: int = 0) -> None:
        """Keep a sequence that is there as far as it is wanted. `n_stored` of its tokens are in
        host memory already."""
        self._tree.stop(sequence)
        sequence.n_stored = n_stored
        self._kept[sequence] = None

    @property
    def is_storing(self) -> bool:
        """Whether something is to be stored already, among what is to be done to the memory."""
        return any(isinstance(operation, Store) for operation in self._operations)

    def stores_for(self, n_tokens: int) -> bool:
        """Whether kept cells may have to be stored before `n_tokens` more fit."""
        n_missing = self._tree.n_cells + n_tokens - self._n_cells
        for kept in self._kept:
            if n_missing <= 0:
                return False
            if self._is_to_store(kept) and self._tree.n_freeable(kept):
                return True
            # What others hold too is not free yet.
            if not kept.is_shared:
                n_missing -= kept.tail.n_cells
        return False

    def settle(self, key: int) -> None:
        """Of the sequence whose end was to be stored under `key` nothing more is: it is stored, or
        cannot be."""
        for kept in self._kept:
            if kept.leaving == key:
                kept.stay()
                kept.n_stored = kept.n_cells

    def store_anew(self, key: int) -> None:
        """What was stored under `key` is gone before it was whole."""
        for kept in self._kept:
            if kept.leaving == key:
                kept.n_uncopied = 0

    def make_room(self, n_tokens: int, n_stored: int = 0) -> None:
        """Give up kept cells until `n_tokens` more fit, or no more are kept. Of those that are
        stored first no fewer than `n_stored` at a time, up to a 64th of all; what others hold too
        is stored before it is theirs alone, half as many at a time."""
        passed: list[CachedSequence] = []
        while (n_missing := self._tree.n_cells + n_tokens - self._n_cells) > 0:
            victims = (kept for kept in self._kept if self._tree.n_freeable(kept))
            victim = next((kept for kept in victims if kept not in passed), None)
            if victim is None and passed:
                victim = passed.pop(0)  # at once: there is nothing else to give up
            elif victim is not None and self._n_to_copy_on(victim, n_stored):
                if not passed:
                    self._copy_on(victim, n_stored)
                passed.append(victim)
                continue
            if victim is None:
                return
            least = self._n_cells // _EVICTED_SHARE
            if self._is_to_store(victim):
                least = min(least, n_stored)
            self._shrink(victim, max(n_missing, least), stores=True)

    def evict_oldest(self) -> bool:
        """Give the least recently used kept sequence up; False where none is kept."""
        for oldest in self._kept:
            self._store(oldest, 0)
            self._evict(oldest)
            return True
        return False

    def _judge(self, match: Match) -> Reuse | None:
        held = sorted(match.branch.sequences, key=lambda sequence: sequence.slot)
        kept = [sequence for sequence in held if sequence in self._kept]
        whole = next((one for one in kept if one.n_cells == match.n_tokens), None)
        source: CachedSequence | None
        if self.rules.cuts_anywhere:
            may_move = bool(self._free_slots or self.rules.n_spare)
            source = whole or (held if may_move else [*kept, *held])[0]
            takes = whole is not None or (not may_move and bool(kept))
        elif self.rules.recurrent:
            source = whole
            takes = not (self.rules.shares and self._free_slots)
        else:
            source = next((one for one in kept if self._may_cut(one, match.n_tokens)), None)
            takes = True
        if source is None:
            return None
        return Reuse(match, source, self._tree.n_pinned_in(match), takes)

    def _may_cut(self, sequence: CachedSequence, n_tokens: int) -> bool:
        """Whether all cells that the token after the first `n_tokens` looks back to are there
        (is_masked_swa in llama.cpp's src/llama-hparams.h; a chunked window is never longer), and
        no more is given up than is won."""
        assert self.rules.n_window is not None
        if 2 * n_tokens < sequence.n_cells:
            return False
        first = self._first_position(sequence.slot)
        return 0 <= first <= max(0, n_tokens - self.rules.n_window + 1)

    def _take_over(self, reuse: Reuse, tokens: Tokens) -> CachedSequence:
        sequence = reuse.source
        del self._kept[sequence]
        if reuse.n_tokens < sequence.n_cells:
            self._operations.append(Cut(sequence.slot, reuse.n_tokens))
            self._tree.cut(sequence, reuse.n_tokens)
        sequence.n_stored = min(sequence.n_stored, sequence.n_cells)
        sequence.stay()
        self._tree.resume(sequence, tokens)
        if sequence.slot >= self._n_slots:
            self._move(sequence, self._take_slot())
        return sequence

    def _take_slot(self) -> int:
        """A free id that batches may use; the kept sequence that has it moves away or goes."""
        if not self._free_slots and self.rules.n_spare and not self._free_spares:
            self.evict_oldest()
        if not self._free_slots:
            oldest = next(kept for kept in self._kept if kept.slot < self._n_slots)
            if self._free_spares:
                self._move(oldest, self._free_spares.pop())
            else:
                self._store(oldest, 0)
                self._evict(oldest)
        return self._free_slots.pop()

    def _move(self, sequence: CachedSequence, slot: int) -> None:
        self._operations.append(Copy(sequence.slot, slot, sequence.n_cells))
        self._operations.append(Clear(sequence.slot))
        self._release_slot(sequence.slot)
        sequence.slot = slot

    def _known(self, sequence: CachedSequence) -> CachedSequence | None:
        """A kept sequence that makes this one superfluous."""
        tokens = sequence.tokens[: sequence.n_cells]
        for match in self._tree.match(tokens, sequence.salt):
            if match.n_tokens < len(tokens):
                break
            for kept in match.branch.sequences & self._kept.keys():
                if self.rules.cuts_anywhere or kept.n_cells == len(tokens):
                    return kept
        return None

    def _trim(self) -> None:
        """Keep no more than is worth it, but always the sequence used last."""
        while len(self._kept) > 1 and (n_over := self.n_kept - self._worth.n_cells) > 0:
            oldest = next(iter(self._kept))
            if self._is_to_store(oldest) and oldest.leaving:
                return  # it goes as others need its cells: all at once would be a long copy
            self._worth.remember(oldest.tokens[: oldest.n_cells], oldest.salt)
            self._shrink(oldest, n_over)

    def _shrink(self, victim: CachedSequence, n_cells: int, *, stores: bool = False) -> None:
        """Take some of a kept sequence's own cells away, from its end, or all of it."""
        n_left = victim.n_cells - n_cells
        own = None if victim.is_shared else victim.tail
        if stores and own is not None and n_left < own.start:
            n_left = own.start  # the rest is others' too
        if not self.rules.cuts_anywhere or own is None or n_left < max(own.start, self.shortest):
            n_left = 0
        if stores:
            self._store(victim, n_left)
        else:
            victim.stay()
        if not n_left:
            self._evict(victim)
            return
        self._operations.append(Cut(victim.slot, n_left))
        self._tree.cut(victim, n_left)

    def _n_to_copy_on(self, victim: CachedSequence, n_stored: int) -> int:
        """How many of its first tokens are left to be stored after the next ones, of a sequence
        that has none of its own."""
        shared = self.rules.cuts_anywhere and victim.is_shared
        if not (shared and n_stored and self._is_to_store(victim)):
            return 0
        return max((victim.n_uncopied or victim.n_cells) - max(n_stored // 2, 1), 0)

    def _copy_on(self, victim: CachedSequence, n_stored: int) -> None:
        victim.n_uncopied = self._n_to_copy_on(victim, n_stored)
        self._store(victim, victim.n_uncopied)

    def _is_to_store(self, sequence: CachedSequence) -> bool:
        """Whether a sequence is stored before others get its cells: it is not yet, or its end is
        and the rest follows."""
        worth = sequence.wanted or self._worth.pays
        new = sequence.n_cells >= max(SHORTEST, sequence.n_stored + 1)
        return self._stores and worth and (sequence.leaving > 0 or new)

    def _store(self, sequence: CachedSequence, n_left: int) -> None:
        """Have what a sequence loses stored, if it is to be."""
        if self._is_to_store(sequence):
            sequence.leaving = sequence.leaving or next(self._keys)
            tokens = sequence.tokens[: sequence.n_cells].copy()
            self._operations.append(
                Store(sequence.slot, tokens, sequence.salt, n_left, sequence.leaving)
            )
        else:
            sequence.stay()

    def _evict(self, sequence: CachedSequence) -> None:
        del self._kept[sequence]
        self._drop(sequence)

    def _drop(self, sequence: CachedSequence) -> None:
        self._operations.append(Clear(sequence.slot))
        self._release_slot(sequence.slot)
        self._tree.remove(sequence)

    def _release_slot(self, slot: int) -> None:
        (self._free_slots if slot < self._n_slots else self._free_spares).append(slot)

    def _touch(self, sequence: CachedSequence) -> None:
        del self._kept[sequence]
        self._kept[sequence] = None
