"""Proposals from the sequence's own text."""

from collections.abc import Sequence

from kvserve.worker.speculation.ngram import NgramIndex
from kvserve.worker.speculation.proposal import Ask, Proposal

_KIND_FROM = (3, 4, 6, 9, 13, 20)
"""The match lengths at which the kinds begin."""


class LookupProposer:
    """Has an index for each sequence that it was asked about. Not thread-safe."""

    batched = False

    def __init__(self) -> None:
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """See `Proposer`."""
        return [self._propose(ask) for ask in asks]

    def forget(self, request: int) -> None:
        """See `Proposer`."""
        self._indices.pop(request, None)

    def _propose(self, ask: Ask) -> Proposal | None:
        index = self._indices.get(ask.id)
        if index is None:
            index = self._indices[ask.id] = NgramIndex(ask.tokens)
        match = index.find(ask.n_tokens)
        if match is None or ask.n_most < 1:
            return None
        tokens = index.following(match, ask.n_tokens, ask.n_most).tolist()
        # What was accepted before a token makes the match longer.
        return Proposal(tuple(tokens), tuple(_kind(match.length + n) for n in range(len(tokens))))


def _kind(length: int) -> int:
    return sum(length >= first for first in _KIND_FROM) - 1
