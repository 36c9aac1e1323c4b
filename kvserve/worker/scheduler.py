"""Which tokens go into the next batch: values in, values out, no model.

Waiting requests are admitted first come, first served, into a free place and into free cells of
the one KV cache that all sequences share. Every admitted request has cells set aside for all its
known tokens, so a prefill that began can always be completed; each generated token asks for one
cell more. When the cells do not suffice, the youngest goes back to the head of the line; the
oldest alone always fits, so it always makes progress. Cells that are only kept for later requests
(`prefix_cache`) count as free.
"""

import itertools
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvserve.worker.batches import Batch, Chunk, shortened
from kvserve.worker.cell_tree import CachedSequence, Tokens, n_common
from kvserve.worker.entries import Entry, chunk_of, share
from kvserve.worker.prefix_cache import PrefixCache, Reuse
from kvserve.worker.step_rows import StepRows, left_over

_GROWTH_CELLS = 16
"""Cells kept free for each running request at admission, lest it be undone a few steps later."""
_MOST_PADDED_CELLS = 8192
"""Attention of more rows may read all cells in use once more (ntiles_x in ggml-cuda's
fattn-common.cuh): so far it was measured that this costs less than is won."""


@dataclass(slots=True)
class Scheduler:
    """Places up to `n_slots` requests in the `n_cells` of `cache`, `n_batch` tokens a step.

    `n_batch` must be at least `n_slots`. Each request's tokens never exceed `n_cells`: the caller
    refuses longer prompts and ends longer answers. A step checks at most `n_draft` drafted tokens;
    with a sliding window they must be in one micro-batch of `n_ubatch`. `rows` knows which numbers
    of rows take less time than smaller ones. The request `held` is not admitted yet, nor are those
    behind it.
    """

    n_cells: int
    n_slots: int
    n_batch: int
    cache: PrefixCache
    n_draft: int = 0
    n_ubatch: int = 0
    rows: StepRows = field(default_factory=StepRows)
    held: int | None = None
    _waiting: deque[Entry] = field(default_factory=deque)
    _running: list[Entry] = field(default_factory=list)
    _closed: bool = False
    _copied: bool = False

    @property
    def has_work(self) -> bool:
        """Whether `plan` would return tokens."""
        return bool(self._waiting or self._running)

    @property
    def n_decoding(self) -> int:
        """Requests that generate."""
        return sum(entry.decoding for entry in self._running)

    @property
    def n_reading(self) -> int:
        """Requests that have a place and no token yet."""
        return len(self._running) - self.n_decoding

    @property
    def n_unanswered(self) -> int:
        """Requests that wait for their first token and have a place, or can get one."""
        return min(self.n_slots, len(self._running) + len(self._waiting)) - self.n_decoding

    @property
    def n_unread(self) -> int:
        """Prompt tokens that those `n_unanswered` have left, cached or not."""
        waiting = itertools.islice(self._waiting, self.n_slots - len(self._running))
        n_begun = sum(entry.n_left for entry in self._running if not entry.decoding)
        return n_begun + sum(entry.n_tokens for entry in waiting)

    @property
    def decoding(self) -> tuple[int, ...]:
        """The requests that generate, the oldest first."""
        return tuple(entry.id for entry in self._running if entry.decoding)

    @property
    def sequences(self) -> tuple[CachedSequence, ...]:
        """All that is in the cache: of running requests, the oldest first, then what is kept, the
        most recently used first."""
        running = (entry.sequence for entry in self._running if entry.sequence is not None)
        return (*running, *self.cache.kept)

    def add(
        self, request: int, tokens: Tokens, n_tokens: int, salt: str = "", n_to_score: int = 0
    ) -> None:
        """Put a request at the end of the line. `tokens[:n_tokens]` are known; the caller writes
        every token drawn behind them before it calls `grow`. The outputs of the first `n_to_score`
        tokens, not the last known one, are wanted too."""
        if not 0 < n_tokens <= self.n_cells:
            raise ValueError(f"{n_tokens} tokens do not fit {self.n_cells} cells")
        self._waiting.append(Entry(request, tokens, n_tokens, salt, n_to_score=n_to_score))

    def n_cached(self, request: int) -> int:
        """Tokens of a running request that were in the cache when it was admitted first."""
        return self._find(request).n_cached or 0

    def remove(self, request: int, *, broken: bool = False) -> None:
        """Forget a request. Its cells are kept for others, unless they are `broken`."""
        for entry in self._waiting:
            if entry.id == request:
                self._waiting.remove(entry)
                return
        entry = self._find(request)
        self._running.remove(entry)
        self._closed = False
        self._leave_cache(entry, broken=broken)

    def settle(self, chunk: Chunk, n_accepted: int) -> None:
        """The first `n_accepted` drafted tokens of a chunk that was committed are right, and the
        caller has written them: their cells are kept, the others given up."""
        sequence = self._find(chunk.id).sequence
        assert sequence is not None
        if n_accepted:
            self.cache.append(sequence, n_accepted)
        if n_accepted < len(chunk.draft):
            self.cache.cut_back(sequence)

    def grow(self, request: int, n_tokens: int = 1) -> None:
        """Tokens were drawn for a running request: the last one goes into the next batch."""
        entry = self._find(request)
        entry.n_tokens += n_tokens
        entry.decoding = True

    def is_waiting(self, request: int) -> bool:
        """Whether a request waits for a place."""
        return any(entry.id == request for entry in self._waiting)

    def next_admissible(self) -> list[tuple[int, Tokens, str]]:
        """Ids, beginnings and salts of the requests that the next `plan` admits whatever is
        cached."""
        found = []
        n_promised, n_running = self._n_cells_promised(), len(self._running)
        for entry in self._waiting:
            n_promised += entry.n_left
            growth = _GROWTH_CELLS * n_running
            fits = n_running == 0 or n_promised + growth <= self.n_cells
            if self._closed or n_running >= self.n_slots or not fits:
                break
            found.append((entry.id, entry.reusable, entry.salt))
            n_running += 1
        return found

    def has_room(self, n_tokens: int) -> bool:
        """Whether so many cells are free beside what the running requests need."""
        growth = _GROWTH_CELLS * len(self._running)
        return self._n_cells_promised() + n_tokens + growth <= self.n_cells

    def plan(
        self,
        n_prefill_max: int,
        drafts: Mapping[int, tuple[int, ...]] | None = None,
        n_stored: int = 0,
    ) -> Batch:
        """The next batch: one token of every generating request, with as much of its draft as there
        is room for, then up to `n_prefill_max` prompt tokens. Empty only where nothing waits or
        runs.

        Where prompts need cells that have to be stored first, about `n_stored` are, and streams
        have that step for themselves: they wait for a copy or for a prompt. The next step reads
        what there is room for.
        """
        self._begin_followers()
        preempted = self._make_room()
        admitted = self._admit()
        decoding = [entry for entry in self._running if entry.decoding]
        prefilling = [entry for entry in self._running if entry.sequence and not entry.decoding]
        n_free = self._n_free_for_drafts(len(decoding), prefilling=bool(prefilling))
        chunks, n_drafted = [], 0
        for entry in decoding:
            draft = (drafts or {}).get(entry.id, ())[: n_free - n_drafted]
            chunks.append(chunk_of(entry, 1, draft))
            n_drafted += len(draft)
        n_most = self.n_batch
        if n_drafted and not self.cache.rules.cuts_anywhere:
            n_most = min(n_most, self.n_ubatch)
        n_rows = len(decoding) + n_drafted
        budget = min(max(n_prefill_max, 1), n_most - n_rows)
        shares = self._read_or_copy(prefilling, n_rows, budget, n_stored)
        read = [chunk_of(entry, count) for entry, count in shares]
        if self.rows.learns and read and read[-1].last:
            chunks = self._whole(chunks, read)
        chunks += read
        n_prefill = sum(count for _, count in shares)
        n_pad = 0
        if not n_prefill and (self.rows.learns or not n_drafted):
            n_pad = self._n_pad(n_rows)
            # With a sliding window, rows that are taken back must not be in another micro-batch.
            n_most_rows = self.n_batch if self.cache.rules.n_window is None else self.n_ubatch
            if n_rows + n_pad > min(self.cache.n_free, n_most_rows):
                n_pad = 0
        n_idle = self._n_idle(chunks) if n_prefill else 0
        operations = self.cache.take_operations()
        return Batch(tuple(chunks), n_prefill, admitted, preempted, operations, n_pad, n_idle)

    def may_repeat(self, n_chunks: int, n_padded: int) -> bool:
        """Whether, after a batch with one token of each of `n_chunks` requests and `n_padded` rows
        more that is not committed yet, `plan` would choose the same again where none of the
        requests ends: all of those that run are among them, and nothing must leave the cache for
        them."""
        n_pad, n_used = self._n_pad(n_chunks), self.cache.n_used
        if n_pad != n_padded:
            return False
        if n_pad and not self.rows.learns and n_used + n_chunks > _MOST_PADDED_CELLS:
            return False
        n_cells = 2 * n_chunks + n_pad
        return n_chunks == len(self._running) and self.cache.n_free >= n_cells

    def commit(self, batch: Batch) -> None:
        """The batch was decoded: its tokens are in the cache now."""
        entries = {entry.id: entry for entry in self._running}
        for chunk in batch.chunks:
            sequence = entries[chunk.id].sequence
            assert sequence is not None
            self.cache.append(sequence, chunk.count)

    def relieve(self) -> bool:
        """For a cache that is fuller than its cells tell: give up what is kept, oldest first, then
        the youngest request, after which nobody is admitted until another one ends.

        False where only one request runs, which can then not be helped.
        """
        if self.cache.evict_oldest():
            return True
        if len(self._running) < 2:
            return False
        self._closed = True
        self._preempt(broken=True)
        return True

    def _read_or_copy(
        self, prefilling: list[Entry], n_rows: int, budget: int, n_stored: int
    ) -> list[tuple[Entry, int]]:
        """What of the prompts is read beside `n_rows` of streams; there is room for all then.
        Nothing where cells must be stored for it: that is done, as far as it may take, for the next
        step."""
        cache = self.cache
        just_copied, self._copied = self._copied, False
        if n_rows and just_copied:
            budget = min(budget, max(cache.n_free - n_rows, 1))
        shares = share(prefilling, budget, self._n_outputs_each())
        n_prefill = sum(count for _, count in shares)
        may_copy = n_rows and n_prefill and not just_copied
        if not may_copy or not (cache.is_storing or cache.stores_for(n_rows + n_prefill)):
            cache.make_room(n_rows + n_prefill, n_stored)
            return shares
        self._copied = True
        n_more = min(n_rows + n_prefill, cache.n_free + max(n_stored, n_rows + 1))
        cache.make_room(n_rows + n_more, n_stored)
        return []

    @staticmethod
    def _whole(streams: list[Chunk], read: list[Chunk]) -> list[Chunk]:
        """The chunks of streams without the drafted tokens that are left over of whole groups of
        outputs, now that it is known how many prompts end beside them."""
        n_over = left_over(sum(chunk.n_outputs for chunk in (*streams, *read)))
        n_drafted = sum(len(chunk.draft) for chunk in streams)
        return shortened(streams, n_over) if n_over <= n_drafted else streams

    def _n_pad(self, n_rows: int) -> int:
        if not self.rows.learns and self.cache.n_used > _MOST_PADDED_CELLS:
            return 0
        return self.rows.wanted(n_rows) - n_rows

    def _n_idle(self, chunks: list[Chunk]) -> int:
        """Outputs more of a batch that ends with a part of a prompt."""
        last = chunks[-1]
        if last.n_outputs or any(chunk.scored for chunk in chunks):
            return 0
        n_outputs = sum(chunk.n_outputs for chunk in chunks)
        n_idle = self.rows.outputs(n_outputs) - n_outputs
        return n_idle if n_idle <= last.count else 0

    def _find(self, request: int) -> Entry:
        for entry in self._running:
            if entry.id == request:
                return entry
        raise KeyError(request)

    def _preempt(self, *, broken: bool = False) -> int:
        entry = self._running.pop()
        self._leave_cache(entry, broken=broken, wanted=True)
        entry.decoding = False
        self._waiting.appendleft(entry)
        return entry.id

    def _leave_cache(self, entry: Entry, *, broken: bool, wanted: bool = False) -> None:
        if entry.sequence is not None:
            entry.n_scored = max(entry.n_scored, entry.n_past)
            if broken:
                self.cache.drop(entry.sequence)
            else:
                self.cache.keep(entry.sequence, wanted=wanted)
        entry.sequence = entry.leader = None
        entry.n_shared = 0

    def _make_room(self) -> tuple[int, ...]:
        preempted = []
        while len(self._running) > 1 and self._n_cells_promised() > self.n_cells:
            preempted.append(self._preempt())
        return tuple(preempted)

    def _admit(self) -> tuple[int, ...]:
        admitted = []
        while self._waiting and len(self._running) < self.n_slots and not self._closed:
            entry = self._waiting[0]
            if entry.id == self.held:
                break
            reuse = self.cache.find(entry.reusable, entry.salt)
            self._follow(entry, self._running, reuse)
            n_new = entry.n_promised - (reuse.n_pinned if reuse and entry.leader is None else 0)
            growth = _GROWTH_CELLS * len(self._running)
            if self._running and self._n_cells_promised() + n_new + growth > self.n_cells:
                entry.leader, entry.n_shared = None, 0
                break
            self._waiting.popleft()
            self._running.append(entry)
            if entry.leader is None:
                self._begin(entry, reuse)
            admitted.append(entry.id)
        return tuple(admitted)

    def _begin(self, entry: Entry, reuse: Reuse | None) -> None:
        entry.sequence = self.cache.open(entry.tokens, entry.salt, reuse)
        if entry.n_cached is None:
            entry.n_cached = entry.sequence.n_cells
            if not entry.n_to_score:
                self.cache.observe(entry.known, entry.salt, entry.n_cached)

    def _follow(self, entry: Entry, others: list[Entry], reuse: Reuse | None) -> None:
        """Let a request wait for an older one that is decoding the same tokens just now, and share
        its cells then, where that saves more than what is cached already."""
        entry.leader, entry.n_shared = None, 0
        if not self.cache.rules.cuts_anywhere or not entry.all_scored:
            return
        n_worth = self.cache.shortest + (reuse.n_tokens if reuse else 0)
        for other in others:
            if other.n_left <= 1 or other.salt != entry.salt:
                continue
            n_both = min(n_common(other.known, entry.known), entry.n_tokens - 1)
            if n_both >= max(n_worth, entry.n_shared + 1):
                entry.leader, entry.n_shared = other, n_both

    def _begin_followers(self) -> None:
        for index, entry in enumerate(self._running):
            if entry.leader is None:
                continue
            older = self._running[:index]
            alive = any(entry.leader is other for other in older)
            if alive and entry.leader.n_past < entry.n_shared:
                continue
            reuse = self.cache.find(entry.reusable, entry.salt)
            self._follow(entry, older, reuse)
            if entry.leader is None:
                self._begin(entry, reuse)

    def _n_cells_promised(self) -> int:
        return self.cache.n_pinned + sum(entry.n_promised for entry in self._running)

    def _n_free_for_drafts(self, n_decoding: int, *, prefilling: bool) -> int:
        """Drafted tokens that the batch and the cells have room for, beside one of a prompt."""
        rules, n_most = self.cache.rules, self.n_batch
        if rules.recurrent:
            return 0
        if rules.n_window is not None:
            # A second micro-batch would overwrite the cells that only the first one's drafts have
            # moved out of the window (find_slot in llama.cpp's src/llama-kv-cache.cpp).
            if prefilling and self.n_ubatch < self.n_batch:
                return 0
            n_most = min(n_most, self.n_ubatch)
        n_places = n_most - n_decoding - int(prefilling)
        return max(0, min(self.n_draft, n_places, self.n_cells - self._n_cells_promised()))

    def _n_outputs_each(self) -> int:
        """The most outputs of one scored chunk: a batch makes at most `n_slots`, and everyone who
        runs may want one."""
        n_scoring = sum(not entry.all_scored for entry in self._running)
        return (self.n_slots - len(self._running) + n_scoring) // max(n_scoring, 1)
