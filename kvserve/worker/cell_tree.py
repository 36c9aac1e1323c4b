"""Which tokens the KV cache holds: a radix tree in which sequences that share cells share a branch.

Two sequences that computed the same tokens on their own have cells of their own, and so branches
of their own: the tree counts cells, not texts. A branch refers to the token array of one of its
sequences by absolute position; any other with the same beginning would do, so branches are split,
joined and handed on without copying tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Branch:
    """The cells of `tokens[start:end]`, held by `sequences`, `n_running` of which run."""

    tokens: Tokens
    start: int
    end: int
    parent: "Branch | None"
    children: "dict[int, list[Branch]]" = field(default_factory=dict)
    sequences: "set[CachedSequence]" = field(default_factory=set)
    n_running: int = 0

    @property
    def n_cells(self) -> int:
        """Cells of this branch alone."""
        return self.end - self.start


@dataclass(slots=True, eq=False)
class CachedSequence:
    """One sequence of the cache: cells for `tokens[:n_cells]`, under llama.cpp's id `slot`.
    `n_stored` of them are in host memory too; `wanted` is one whose request comes back. One that
    loses its cells bit by bit, to be stored, has the number `leaving`, else 0; the first
    `n_uncopied` are not stored yet, where it still has some that are (0 where it has none)."""

    slot: int
    tokens: Tokens
    salt: str
    tail: Branch
    running: bool = True
    n_stored: int = 0
    wanted: bool = False
    leaving: int = 0
    n_uncopied: int = 0

    @property
    def n_cells(self) -> int:
        """Tokens in the cache."""
        return self.tail.end

    @property
    def is_shared(self) -> bool:
        """Whether others hold all of its cells too."""
        return len(self.tail.sequences) > 1

    def stay(self) -> None:
        """Nothing of it is on its way out any more."""
        self.leaving = self.n_uncopied = 0


@dataclass(frozen=True, slots=True)
class Match:
    """`branch` and what leads to it hold the first `n_tokens` tokens looked for."""

    branch: Branch
    n_tokens: int


class CellTree:
    """The sequences in the cache. `n_cells` are filled, `n_pinned` of them by running sequences.

    Sequences of different salts never meet.
    """

    def __init__(self) -> None:
        self.n_cells = 0
        self.n_pinned = 0
        self._roots: dict[str, Branch] = {}

    def match(self, tokens: Tokens, salt: str) -> list[Match]:
        """Where the cache holds the beginning of `tokens`, the longest beginning first."""
        found = []
        pending = [self._roots[salt]] if salt in self._roots else []
        while pending:
            branch = pending.pop()
            if branch.end >= len(tokens):
                continue
            for child in branch.children.get(int(tokens[branch.end]), ()):
                n_tokens = child.start + n_common(
                    child.tokens[child.start : child.end], tokens[child.start :]
                )
                if n_tokens > child.start:
                    found.append(Match(child, n_tokens))
                    if n_tokens == child.end:
                        pending.append(child)
        return sorted(found, key=lambda match: match.n_tokens, reverse=True)

    def shorten(self, match: Match, n_tokens: int) -> Match:
        """The same for fewer tokens."""
        branch = match.branch
        while branch.start >= n_tokens and branch.parent is not None:
            branch = branch.parent
        return Match(branch, n_tokens)

    def n_pinned_in(self, match: Match) -> int:
        """How many of a match's cells running sequences use."""
        return sum(
            min(branch.end, match.n_tokens) - branch.start
            for branch in _path(match.branch)
            if branch.n_running
        )

    def open(
        self, slot: int, tokens: Tokens, salt: str, shared: Match | None = None
    ) -> CachedSequence:
        """Add a running sequence that shares the cells of a match, or has none yet."""
        if shared is None:
            place = self._roots.setdefault(salt, Branch(tokens, 0, 0, None))
        else:
            place = self._split(shared.branch, shared.n_tokens)
        sequence = CachedSequence(slot, tokens, salt, place)
        for branch in _path(place):
            branch.sequences.add(sequence)
            self._count_running(branch, 1)
        return sequence

    def append(self, sequence: CachedSequence, n_tokens: int) -> None:
        """A running sequence filled cells for its next `n_tokens` tokens."""
        tail = sequence.tail
        if tail.parent is None or len(tail.sequences) > 1:
            first = int(sequence.tokens[tail.end])
            tail = Branch(sequence.tokens, tail.end, tail.end, tail)
            tail.sequences.add(sequence)
            tail.n_running = 1
            sequence.tail.children.setdefault(first, []).append(tail)
            sequence.tail = tail
        # Whoever the branch was taken over from had other tokens after its end.
        tail.tokens = sequence.tokens
        tail.end += n_tokens
        self.n_cells += n_tokens
        self.n_pinned += n_tokens

    def stop(self, sequence: CachedSequence) -> None:
        """A sequence runs no more: its cells are kept and may be given up."""
        sequence.running = False
        for branch in _path(sequence.tail):
            self._count_running(branch, -1)

    def resume(self, sequence: CachedSequence, tokens: Tokens) -> None:
        """A kept sequence runs on, with the tokens of another request that begins with its own."""
        sequence.running = True
        sequence.tokens = tokens
        for branch in _path(sequence.tail):
            self._count_running(branch, 1)

    def cut(self, sequence: CachedSequence, n_tokens: int) -> None:
        """Take the cells after the first `n_tokens` from a sequence."""
        while sequence.tail.start >= n_tokens and sequence.tail.parent is not None:
            self._leave(sequence)
        tail = sequence.tail
        if tail.end <= n_tokens:
            return
        if len(tail.sequences) > 1:
            self._split(tail, n_tokens)
            self._leave(sequence)
            return
        n_freed = tail.end - n_tokens
        tail.end = n_tokens
        self.n_cells -= n_freed
        self.n_pinned -= n_freed if tail.n_running else 0

    def remove(self, sequence: CachedSequence) -> None:
        """Forget a sequence, and the cells that no other one holds."""
        while sequence.tail.parent is not None:
            self._leave(sequence)
        root = sequence.tail
        root.sequences.remove(sequence)
        root.n_running -= sequence.running
        if not root.sequences:
            del self._roots[sequence.salt]

    def n_freeable(self, sequence: CachedSequence) -> int:
        """Cells of a sequence that no running one needs."""
        return sum(branch.n_cells for branch in _path(sequence.tail) if not branch.n_running)

    def _count_running(self, branch: Branch, change: int) -> None:
        was_running = branch.n_running > 0
        branch.n_running += change
        self.n_pinned += branch.n_cells * ((branch.n_running > 0) - was_running)

    def _leave(self, sequence: CachedSequence) -> None:
        """Take a sequence off its last branch."""
        branch = sequence.tail
        parent = branch.parent
        assert parent is not None
        branch.sequences.remove(sequence)
        if sequence.running:
            self._count_running(branch, -1)
        sequence.tail = parent
        if branch.sequences:
            _join(branch)
        else:
            self.n_cells -= branch.n_cells
            _detach(branch, parent)

    def _split(self, branch: Branch, n_tokens: int) -> Branch:
        """The branch that ends after `n_tokens` tokens, made out of `branch` where need be."""
        parent = branch.parent
        if n_tokens == branch.end or parent is None:
            return branch
        upper = Branch(branch.tokens, branch.start, n_tokens, parent, {}, set(branch.sequences))
        upper.n_running = branch.n_running
        siblings = parent.children[int(branch.tokens[branch.start])]
        siblings[siblings.index(branch)] = upper
        branch.start, branch.parent = n_tokens, upper
        upper.children[int(branch.tokens[n_tokens])] = [branch]
        return upper


def n_shared(sequence: CachedSequence, others: set[CachedSequence]) -> int:
    """How many cells of a sequence any of the others holds too."""
    return sum(branch.n_cells for branch in _path(sequence.tail) if branch.sequences & others)


def n_common(some: Tokens, other: Tokens) -> int:
    """How many tokens two arrays have in common from their beginning on."""
    n = min(len(some), len(other))
    differs = some[:n] != other[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def _path(tail: Branch) -> Iterator[Branch]:
    branch: Branch | None = tail
    while branch is not None:
        yield branch
        branch = branch.parent


def _detach(branch: Branch, parent: Branch) -> None:
    first = int(branch.tokens[branch.start])
    siblings = parent.children[first]
    siblings.remove(branch)
    if not siblings:
        del parent.children[first]


def _join(branch: Branch) -> None:
    """Undo a split that parts nothing any more."""
    if branch.parent is None or len(branch.children) != 1:
        return
    (children,) = branch.children.values()
    only = children[0]
    if len(children) > 1 or len(only.sequences) != len(branch.sequences):
        return
    siblings = branch.parent.children[int(branch.tokens[branch.start])]
    siblings[siblings.index(branch)] = only
    only.start, only.parent = branch.start, branch.parent
