"""The requests of the scheduler, and how a step's prompt tokens are shared out among them."""

from dataclasses import dataclass

from kvserve.worker.batches import Chunk
from kvserve.worker.cell_tree import CachedSequence, Tokens


@dataclass(slots=True, eq=False)
class Entry:
    """A request. `tokens[:n_tokens]` are known. It has a `sequence` from its first chunk on;
    until then it may wait for the `n_shared` first tokens that `leader` is about to decode. The
    outputs of its first `n_to_score` tokens are wanted; those of `n_scored` were computed before
    it was preempted."""

    id: int
    tokens: Tokens
    n_tokens: int
    salt: str
    sequence: CachedSequence | None = None
    leader: "Entry | None" = None
    n_shared: int = 0
    n_cached: int | None = None
    decoding: bool = False
    n_to_score: int = 0
    n_scored: int = 0

    @property
    def known(self) -> Tokens:
        """The tokens that are known."""
        return self.tokens[: self.n_tokens]

    @property
    def reusable(self) -> Tokens:
        """The tokens that a cached beginning may stand for, and one more."""
        return self.known if self.all_scored else self.tokens[: self.n_scored + 1]

    @property
    def all_scored(self) -> bool:
        """Whether no outputs are wanted but that of the last token."""
        return max(self.n_past, self.n_scored) >= self.n_to_score

    @property
    def n_past(self) -> int:
        """Tokens in the cache."""
        return self.sequence.n_cells if self.sequence is not None else 0

    @property
    def n_left(self) -> int:
        """Known tokens that are not in the cache."""
        return self.n_tokens - self.n_past

    @property
    def n_promised(self) -> int:
        """Cells that its known tokens still need."""
        return self.n_left - self.n_shared


def share(prefilling: list[Entry], budget: int, n_outputs_each: int) -> list[tuple[Entry, int]]:
    """Half of the budget to the oldest, the rest to those with the fewest tokens left, so that a
    short prompt passes a long one and a long one still moves. A chunk that is scored has
    `n_outputs_each` tokens at most."""
    if not prefilling or budget <= 0:
        return []

    def most(entry: Entry) -> int:
        if entry.all_scored:
            return entry.n_left
        return min(entry.n_to_score - entry.n_past, n_outputs_each)

    oldest = prefilling[0]
    first = min(most(oldest), -(-budget // 2))
    left = budget - first
    shares = []
    for entry in sorted(prefilling[1:], key=lambda entry: entry.n_left):
        count = min(most(entry), left)
        if count:
            shares.append((entry, count))
        left -= count
    first += min(most(oldest) - first, left)
    return [(oldest, first), *shares]


def chunk_of(entry: Entry, count: int, draft: tuple[int, ...] = ()) -> Chunk:
    """The next `count` tokens of an entry, and what it drafts."""
    assert entry.sequence is not None
    start = entry.n_past
    last = start + count == entry.n_tokens
    return Chunk(entry.id, entry.sequence.slot, start, count, last, not entry.all_scored, draft)
