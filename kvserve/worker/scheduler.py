"""Which tokens go into the next batch: values in, values out, no model.

Waiting requests are admitted first come, first served, into a free sequence slot and into free
cells of the one KV cache that all sequences share. Every admitted request has cells set aside for
all its known tokens, so a prefill that began can always be completed; each generated token asks
for one cell more. When the cells do not suffice, the youngest goes back to the head of the line
and is prefilled again later; the oldest alone always fits, so it always makes progress.
"""

from collections import deque
from dataclasses import dataclass, field

_GROWTH_CELLS = 16
"""Cells kept free for each running request at admission, lest it be undone a few steps later."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + count` of request `id`, for sequence slot `slot`.

    `last` says that these are the last tokens known, so the model's output is wanted.
    """

    id: int
    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True, slots=True)
class Preempted:
    """A request that lost its cells; slot `slot` must be cleared before the next decode."""

    id: int
    slot: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One decode call, `n_prefill` of its tokens from prompts. `admitted` are the requests that
    have their place from now on, in the order of their arrival, those that come back after a
    preemption included."""

    chunks: tuple[Chunk, ...]
    n_prefill: int = 0
    admitted: tuple[int, ...] = ()
    preempted: tuple[Preempted, ...] = ()

    @property
    def n_tokens(self) -> int:
        """Tokens in the batch."""
        return sum(chunk.count for chunk in self.chunks)


@dataclass(slots=True)
class _Entry:
    id: int
    n_tokens: int
    n_past: int = 0
    slot: int = -1
    decoding: bool = False

    @property
    def n_left(self) -> int:
        return self.n_tokens - self.n_past


@dataclass(slots=True)
class Scheduler:
    """Places requests in `n_slots` sequences and `n_cells` KV cells, `n_batch` tokens a step.

    `n_batch` must be at least `n_slots`. Each request's tokens never exceed `n_cells`: the caller
    refuses longer prompts and ends longer answers.
    """

    n_cells: int
    n_slots: int
    n_batch: int
    _waiting: deque[_Entry] = field(default_factory=deque)
    _running: list[_Entry] = field(default_factory=list)
    _free_slots: list[int] = field(default_factory=list)
    _closed: bool = False

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.n_slots - 1, -1, -1))

    @property
    def has_work(self) -> bool:
        """Whether `plan` would return tokens."""
        return bool(self._waiting or self._running)

    @property
    def n_cells_used(self) -> int:
        """Cells filled so far."""
        return sum(entry.n_past for entry in self._running)

    @property
    def n_decoding(self) -> int:
        """Requests that generate."""
        return sum(entry.decoding for entry in self._running)

    def add(self, request: int, n_tokens: int) -> None:
        """Put a request of `n_tokens` known tokens at the end of the line."""
        if not 0 < n_tokens <= self.n_cells:
            raise ValueError(f"{n_tokens} tokens do not fit {self.n_cells} cells")
        self._waiting.append(_Entry(request, n_tokens))

    def remove(self, request: int) -> int | None:
        """Forget a request; returns its slot, to be cleared, or None where it had none."""
        for entry in self._waiting:
            if entry.id == request:
                self._waiting.remove(entry)
                return None
        entry = self._find(request)
        self._running.remove(entry)
        self._free_slots.append(entry.slot)
        self._closed = False
        return entry.slot

    def grow(self, request: int) -> None:
        """A token was drawn for a running request: it goes into the next batch."""
        entry = self._find(request)
        entry.n_tokens += 1
        entry.decoding = True

    def plan(self, n_prefill_max: int) -> Batch:
        """The next batch: one token of every generating request, then up to `n_prefill_max`
        prompt tokens. Empty only where nothing waits or runs."""
        preempted = self._make_room()
        admitted = self._admit()
        decoding = [entry for entry in self._running if entry.decoding and entry.n_left == 1]
        prefilling = [entry for entry in self._running if not entry.decoding]
        chunks = [_chunk(entry, 1) for entry in decoding]
        budget = min(max(n_prefill_max, 1), self.n_batch - len(decoding))
        shares = _share(prefilling, budget)
        chunks += [_chunk(entry, count) for entry, count in shares]
        n_prefill = sum(count for _, count in shares)
        return Batch(tuple(chunks), n_prefill, admitted, preempted)

    def commit(self, batch: Batch) -> None:
        """The batch was decoded: its tokens are in the cache now."""
        entries = {entry.id: entry for entry in self._running}
        for chunk in batch.chunks:
            entries[chunk.id].n_past += chunk.count

    def preempt_youngest(self) -> Preempted | None:
        """For a cache that is fuller than its cells tell: take the youngest request out.

        Nobody is admitted until another request ends. None where only one runs, which can then
        not be helped.
        """
        if len(self._running) < 2:
            return None
        self._closed = True
        return self._preempt()

    def _find(self, request: int) -> _Entry:
        for entry in self._running:
            if entry.id == request:
                return entry
        raise KeyError(request)

    def _preempt(self) -> Preempted:
        entry = self._running.pop()
        taken = Preempted(entry.id, entry.slot)
        self._free_slots.append(entry.slot)
        entry.n_past, entry.slot, entry.decoding = 0, -1, False
        self._waiting.appendleft(entry)
        return taken

    def _make_room(self) -> tuple[Preempted, ...]:
        preempted = []
        while len(self._running) > 1 and self._n_cells_promised() > self.n_cells:
            preempted.append(self._preempt())
        return tuple(preempted)

    def _admit(self) -> tuple[int, ...]:
        admitted = []
        while self._waiting and self._free_slots and not self._closed:
            entry = self._waiting[0]
            growth = _GROWTH_CELLS * len(self._running)
            if self._running and (
                self._n_cells_promised() + entry.n_tokens + growth > self.n_cells
            ):
                break
            self._waiting.popleft()
            entry.slot = self._free_slots.pop()
            self._running.append(entry)
            admitted.append(entry.id)
        return tuple(admitted)

    def _n_cells_promised(self) -> int:
        return sum(entry.n_tokens for entry in self._running)


def _share(prefilling: list[_Entry], budget: int) -> list[tuple[_Entry, int]]:
    """Half of the budget to the oldest, the rest to those with the fewest tokens left, so that a
    short prompt passes a long one and a long one still moves."""
    if not prefilling or budget <= 0:
        return []
    oldest = prefilling[0]
    first = min(oldest.n_left, -(-budget // 2))
    left = budget - first
    shares = []
    for entry in sorted(prefilling[1:], key=lambda entry: entry.n_left):
        count = min(entry.n_left, left)
        if count:
            shares.append((entry, count))
        left -= count
    first += min(oldest.n_left - first, left)
    return [(oldest, first), *shares]


def _chunk(entry: _Entry, count: int) -> Chunk:
    return Chunk(entry.id, entry.slot, entry.n_past, count, entry.n_past + count == entry.n_tokens)
