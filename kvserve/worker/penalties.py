"""What lowers the logits of tokens that were there before: penalties and DRY."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Sampling

Row = NDArray[np.float32]
Tokens = NDArray[np.int32]

_MAX_LOG = 88.7228391
"""log(FLT_MAX): where llama.cpp bounds the exponent of DRY."""


def bounded(value: float, low: float, high: float, default: float) -> float:
    """`value` within its limits; `default` for what is not finite. No NaN may reach C."""
    return min(max(value, low), high) if math.isfinite(value) else default


class Penalties:
    """The OpenAI presence and frequency penalties, and llama.cpp's repeat penalty.

    Presence and frequency look at the generated tokens, repeat at the last `repeat_last_n` of
    prompt and answer (-1: all).
    """

    __slots__ = ("_counts", "_frequency", "_presence", "_repeat", "_window")

    def __init__(self, sampling: Sampling) -> None:
        self._repeat = bounded(sampling.repeat_penalty, 0.01, 100.0, 1.0)
        self._window = sampling.repeat_last_n
        self._presence = bounded(sampling.presence_penalty, -100.0, 100.0, 0.0)
        self._frequency = bounded(sampling.frequency_penalty, -100.0, 100.0, 0.0)
        self._counts: dict[int, int] | None = (
            {} if self._presence != 0 or self._frequency != 0 else None
        )

    @property
    def lower(self) -> bool:
        """Whether there is anything that `apply` does."""
        return self._counts is not None or (self._repeat != 1 and self._window != 0)

    def accept(self, token: int) -> None:
        """Count a generated token."""
        if self._counts is not None:
            self._counts[token] = self._counts.get(token, 0) + 1

    def apply(self, row: Row, tokens: Tokens) -> None:
        """Lower the logits; `tokens` are prompt and answer so far."""
        if self._repeat != 1 and self._window != 0:
            recent = tokens[-self._window :] if self._window > 0 else tokens
            values = row[recent]
            # A negative logit is multiplied, as in llama.cpp: dividing would favour the token.
            row[recent] = np.where(values > 0, values / self._repeat, values * self._repeat)
        if self._counts:
            n = len(self._counts)
            seen = np.fromiter(self._counts.keys(), dtype=np.int64, count=n)
            counts = np.fromiter(self._counts.values(), dtype=np.float32, count=n)
            row[seen] -= counts * self._frequency + self._presence


class Dry:
    """DRY: a token that would go on with a repetition loses `dry_multiplier` times `dry_base` to
    the power of the tokens by which the repetition is longer than `dry_allowed_length`
    (p-e-w, text-generation-webui pull request 5677; llama_sampler_dry_apply in llama.cpp's
    src/llama-sampler.cpp).

    A repetition lies within the last `dry_penalty_last_n` tokens (-1: all) and holds no breaker.
    `piece` gives a token's bytes.
    """

    def __init__(self, sampling: Sampling, tokens: Tokens, piece: Callable[[int], bytes]) -> None:
        self._multiplier = bounded(sampling.dry_multiplier, 0.0, 100.0, 0.0)
        self._base = bounded(sampling.dry_base, 1.0, 100.0, 1.75)
        self._allowed = max(sampling.dry_allowed_length, 1)
        self._window = sampling.dry_penalty_last_n
        self._breakers = tuple(text.encode() for text in sampling.dry_sequence_breakers if text)
        self._longest_breaker = max(map(len, self._breakers), default=1)
        self._piece = piece
        self._is_breaker: dict[int, bool] = {}
        self._tail = b""
        self._n_since_breaker = 0
        steep = self._base > 1.000001
        self._max_exponent = int(_MAX_LOG / math.log(self._base)) if steep else 0
        for token in self._recent(tokens).tolist():
            self.accept(token)

    def accept(self, token: int) -> None:
        """Note a token of prompt or answer."""
        text = self._tail + self._piece(token)
        broken = any(breaker in text for breaker in self._breakers)
        self._n_since_breaker = 0 if broken else self._n_since_breaker + 1
        keep = 0 if broken else self._longest_breaker - 1
        self._tail = text[len(text) - min(keep, len(text)) :]

    def apply(self, row: Row, tokens: Tokens) -> None:
        """Lower the logits; `tokens` are prompt and answer so far."""
        if self._multiplier == 0:
            return
        for token, length in self._repetitions(self._recent(tokens)[::-1]).items():
            if self._breaks(token):
                continue
            exponent = length - self._allowed
            if self._max_exponent:
                exponent = min(exponent, self._max_exponent)
            row[token] -= self._multiplier * self._base**exponent

    def _recent(self, tokens: Tokens) -> Tokens:
        return tokens[max(0, len(tokens) - self._window) :] if self._window >= 0 else tokens

    def _repetitions(self, backwards: Tokens) -> dict[int, int]:
        """For each token that would go on with a repetition, how long the longest one is."""
        n = len(backwards)
        longest = min(self._n_since_breaker, n, self._allowed + max(self._max_exponent, 1))
        if n <= self._allowed or longest < self._allowed:
            return {}
        found: dict[int, int] = {}
        # Each start is one place before the end where the text so far may be found again.
        starts = np.flatnonzero(backwards[1:] == backwards[0]) + 1
        length = 1
        while len(starts):
            if length >= self._allowed:
                found.update(dict.fromkeys(backwards[starts - 1].tolist(), length))
            if length == longest:
                break
            starts = starts[starts + length < n]
            starts = starts[backwards[starts + length] == backwards[length]]
            length += 1
        return found

    def _breaks(self, token: int) -> bool:
        known = self._is_breaker.get(token)
        if known is None:
            text = self._piece(token)
            known = self._is_breaker[token] = any(breaker in text for breaker in self._breakers)
        return known
