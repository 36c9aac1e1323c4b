"""The text's own repetitions first, and a draft model where there are none."""

from collections.abc import Sequence

from kvserve.worker.speculation.proposal import Ask, Proposal, Proposer

_SURE_KIND = 3
"""What follows a match of this kind or a better one is hardly ever bettered by a small model."""


class EitherProposer:
    """Asks `second` about the sequences for which `first` has no proposal of much weight."""

    batched = True

    def __init__(self, first: Proposer, second: Proposer) -> None:
        self._first = first
        self.second = second

    def propose(self, asks: Sequence[Ask]) -> list[Proposal | None]:
        """See `Proposer`."""
        proposals = self._first.propose(asks)
        open_ones = [
            index for index, one in enumerate(proposals) if one is None or one.kinds[0] < _SURE_KIND
        ]
        if not open_ones:
            return proposals
        found = self.second.propose([asks[index] for index in open_ones])
        for index, one in zip(open_ones, found, strict=True):
            proposals[index] = one or proposals[index]
        return proposals

    def forget(self, request: int) -> None:
        """See `Proposer`."""
        self._first.forget(request)
        self.second.forget(request)
