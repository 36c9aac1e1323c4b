"""What the supervisor tells whoever counts: requests, tokens, phases, reloads, deaths.

`kvserve.metrics` listens; tests and the default do not.
"""

from typing import Protocol

from kvserve.core.lifecycle import Phase
from kvserve.supervisor.status import ReloadRecord


class Observer(Protocol):
    """Told of things when they happen, from the event loop's thread. Durations are seconds."""

    def step(self, n_prefilled: int, n_generated: int) -> None:
        """One decode step: prompt tokens that were computed, and tokens that were drawn."""
        ...

    def drafted(self, n_drafted: int, n_accepted: int) -> None:
        """A step checked so many tokens that speculation proposed, and accepted so many."""
        ...

    def first_token(self, seconds: float) -> None:
        """A request got its first token this long after it was submitted."""
        ...

    def next_tokens(self, n_tokens: int, seconds: float) -> None:
        """A request got more tokens, all together this long after those before."""
        ...

    def answered(self, n_prompt: int, n_cached: int, n_again: int) -> None:
        """A request is complete: tokens of its prompt, those of them that were found in the cache,
        and tokens that were computed again since its worker had been replaced."""
        ...

    def ended(self, outcome: str, seconds: float) -> None:
        """A request ended: `stop`, `length`, `cancelled`, or the code of its error."""
        ...

    def phase_left(self, phase: Phase, seconds: float) -> None:
        """The daemon left a phase of its life after this long."""
        ...

    def reloaded(self, record: ReloadRecord) -> None:
        """A load or a reload came to its end."""
        ...

    def worker_died(self, cause: str) -> None:
        """A worker ended without being told to; `cause` is `states.Exit.cause`."""
        ...


class Unobserved:
    """Nobody listens."""

    def step(self, n_prefilled: int, n_generated: int) -> None:
        """See `Observer`."""

    def drafted(self, n_drafted: int, n_accepted: int) -> None:
        """See `Observer`."""

    def first_token(self, seconds: float) -> None:
        """See `Observer`."""

    def next_tokens(self, n_tokens: int, seconds: float) -> None:
        """See `Observer`."""

    def answered(self, n_prompt: int, n_cached: int, n_again: int) -> None:
        """See `Observer`."""

    def ended(self, outcome: str, seconds: float) -> None:
        """See `Observer`."""

    def phase_left(self, phase: Phase, seconds: float) -> None:
        """See `Observer`."""

    def reloaded(self, record: ReloadRecord) -> None:
        """See `Observer`."""

    def worker_died(self, cause: str) -> None:
        """See `Observer`."""
