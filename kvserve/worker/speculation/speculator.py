"""Decides at each step which sequences propose how many tokens, and learns from what came of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from kvserve.worker.speculation.acceptance import Acceptance
from kvserve.worker.speculation.allotment import allot
from kvserve.worker.speculation.ledger import SHARE, Ledger
from kvserve.worker.speculation.proposal import Ask, Proposal, Proposer
from kvserve.worker.speculation.step_costs import StepCosts

_PRIOR = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Shares of accepted tokens by kind, before anything was measured."""
_MORE = 2
"""A batched proposer, whose tokens take time, is asked for so many more than were of use lately."""
_USE_SMOOTHING = 0.1
_ENGINE_MEMORY = 0.99
_SEQUENCE_MEMORY = 0.9

Draft = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brought one sequence: the tokens drawn, of which all but the last are accepted
    proposals, after `n_drafted` proposed ones were in the batch."""

    drawn: Sequence[int]
    n_drafted: int


class Speculator:
    """At most `n_each` proposed tokens of a sequence and `n_all` of all in a batch, which takes as
    long as one of `whole` rows.

    Proposals that do not go into a batch are compared with what is drawn all the same: what they
    would have brought is known at no cost. Not thread-safe.
    """

    def __init__(
        self,
        proposer: Proposer,
        n_each: int,
        n_all: int,
        clock: Callable[[], float] = time.perf_counter,
        whole: Callable[[int], int] = int,
    ) -> None:
        self._proposer = proposer
        self._n_each = n_each
        self._n_all = n_all
        self._whole = whole
        self._clock = clock
        self._costs = StepCosts()
        self._ledger = Ledger()
        self._overall = Acceptance(_PRIOR, _ENGINE_MEMORY)
        self._acceptance: dict[int, Acceptance] = {}
        self._proposals: dict[int, Proposal] = {}
        self._spent_seconds = 0.0
        self._look_seconds = 0.0
        self._step_seconds = 0.0
        self._turn = 0
        self._n_useful = float(n_each)

    @property
    def foresees(self) -> bool:
        """Whether `propose` is quick enough to be asked one token early."""
        return not self._proposer.batched

    def propose(self, asks: Sequence[Ask]) -> dict[int, Draft]:
        """The tokens to be checked beside the last token of each of `asks`, which are all the
        sequences that generate."""
        self._proposals.clear()
        # In debt nothing is tried, but looking goes on where it costs next to nothing.
        cheap = self._look_seconds <= SHARE / 2 * self._step_seconds
        self._spent_seconds = 0.0
        if not asks or not (self._ledger.solvent or cheap):
            return {}
        begun = self._clock()
        self._look(asks, begun)
        drafts = self._choose(asks) if self._proposals and self._ledger.solvent else {}
        self._spent_seconds = self._look_seconds = self._clock() - begun
        return drafts

    def observe(
        self, outcomes: Mapping[int, Outcome], seconds: float, n_prefill: int, n_pad: int = 0
    ) -> None:
        """Learn from a step: what came of each sequence that generates, and the time that decoding
        and drawing took, `n_pad` rows for nothing among them."""
        for request, outcome in outcomes.items():
            proposal = self._proposals.get(request)
            if proposal is not None:
                n_right = self._note_trials(self._acceptance_of(request), proposal, outcome.drawn)
                self._n_useful += _USE_SMOOTHING * (n_right - self._n_useful)
        n, n_drafted = len(outcomes), sum(one.n_drafted for one in outcomes.values())
        if not n:
            return
        if n_prefill:
            self._ledger.observe(seconds, 0.0, self._spent_seconds)
            return
        n_beside = n_drafted + n_pad if n_drafted else 0
        self._costs.observe(n + n_beside, seconds, plain=not n_drafted)
        plain, *_, wide = self._costs.curve(n, n + max(n_beside, 1))
        self._step_seconds = plain
        won = 0.0
        if n_drafted:
            n_accepted = sum(min(len(o.drawn) - 1, o.n_drafted) for o in outcomes.values())
            # More than its tokens one by one takes only a step that something else held up.
            lost = min(wide, plain * (n + n_beside) / n)
            won = plain * (n + n_accepted) / n - lost
        self._ledger.observe(plain, won, self._spent_seconds)

    def forget(self, request: int) -> None:
        """A request ended, or has left the batch for a while."""
        self._acceptance.pop(request, None)
        self._proposals.pop(request, None)
        self._proposer.forget(request)

    def _look(self, asks: Sequence[Ask], begun: float) -> None:
        """Collect proposals, as far as the time allows, from another sequence on each time."""
        self._turn += 1
        if self._proposer.batched:
            n_most = min(self._n_each, round(self._n_useful) + _MORE)
            able = [replace(ask, n_most=min(ask.n_most, n_most)) for ask in asks if ask.n_most > 0]
            found = self._proposer.propose(able)
            self._proposals = {
                ask.id: one for ask, one in zip(able, found, strict=True) if one is not None
            }
            return
        first = self._turn % len(asks)
        allowed_seconds = max(self._ledger.balance_seconds, SHARE / 2 * self._step_seconds)
        for n_seen, ask in enumerate((*asks[first:], *asks[:first])):
            # Also where nothing is found: the next of many sequences have their turn next time.
            if n_seen and self._clock() - begun > allowed_seconds:
                return
            if ask.n_most < 1:
                continue
            [proposal] = self._proposer.propose(
                [replace(ask, n_most=min(ask.n_most, self._n_each))]
            )
            if proposal is not None:
                self._proposals[ask.id] = proposal

    def _choose(self, asks: Sequence[Ask]) -> dict[int, Draft]:
        n = len(asks)
        if self._costs.lacks(n):
            return {}
        rates: list[list[float]] = []
        for ask in asks:
            proposal = self._proposals.get(ask.id)
            if proposal is None:
                rates.append([])
                continue
            acceptance = self._acceptance_of(ask.id)
            rates.append([acceptance.rate(kind) for kind in proposal.kinds])
        counts = allot(rates, self._costs.curve(n, n + self._n_all), self._whole)
        return {
            ask.id: self._proposals[ask.id].tokens[:count]
            for ask, count in zip(asks, counts, strict=True)
            if count
        }

    def _acceptance_of(self, request: int) -> Acceptance:
        known = self._acceptance.get(request)
        if known is None:
            known = self._acceptance[request] = Acceptance(self._overall, _SEQUENCE_MEMORY)
        return known

    @staticmethod
    def _note_trials(acceptance: Acceptance, proposal: Proposal, drawn: Sequence[int]) -> int:
        """How many of the proposed tokens were right."""
        n_right = 0
        for token, kind, real in zip(proposal.tokens, proposal.kinds, drawn, strict=False):
            acceptance.observe(kind, accepted=token == real)
            if token != real:
                break
            n_right += 1
        return n_right
