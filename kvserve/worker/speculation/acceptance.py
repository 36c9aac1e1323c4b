"""How often a proposed token is the one that is drawn, by the kind of proposal."""

from collections.abc import Sequence

DRAFT_KINDS = 6
"""The first kind of what a draft model proposes; those before are for what the text had."""
N_KINDS = 12
"""Kinds of proposal, in both halves by how much speaks for them, the least first."""
_PRIOR_WEIGHT = 2.0
"""What is known beforehand counts like so many trials."""


class Acceptance:
    """Shares of accepted tokens, of late trials more than of early ones.

    A trial counts `memory` times less with each later one of its kind. Where there are few, the
    rate is mostly `prior`'s: one share for each kind, or another instance, as it is then.
    """

    __slots__ = ("_hits", "_memory", "_prior", "_trials")

    def __init__(self, prior: "Sequence[float] | Acceptance", memory: float) -> None:
        self._prior = prior
        self._memory = memory
        self._hits = [0.0] * N_KINDS
        self._trials = [0.0] * N_KINDS

    def rate(self, kind: int) -> float:
        """The expected share of accepted tokens of this kind, 0 to 1."""
        prior = self._prior
        expected = prior.rate(kind) if isinstance(prior, Acceptance) else prior[kind]
        hits = self._hits[kind] + _PRIOR_WEIGHT * expected
        return hits / (self._trials[kind] + _PRIOR_WEIGHT)

    def observe(self, kind: int, *, accepted: bool) -> None:
        """Note a trial, here and in the prior instance."""
        self._hits[kind] = self._hits[kind] * self._memory + accepted
        self._trials[kind] = self._trials[kind] * self._memory + 1
        if isinstance(self._prior, Acceptance):
            self._prior.observe(kind, accepted=accepted)
