"""Drawing a token from one row of logits.

Biases, penalties, bans and grammars are written into the row with NumPy, and the tokens that the
draw can fall on are looked up with NumPy, alone (`shortlist`) or with other rows (`together`).
llama.cpp's own chains take 2 to 20 times as long over a whole vocabulary of 262,144 tokens, and
its penalty step looks every token up in a hash map (0.17 ms against 0.01 ms).
"""

import math
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Sampling
from kvserve.worker import together
from kvserve.worker.dice import Dice, weighted
from kvserve.worker.mirostat import Mirostat
from kvserve.worker.penalties import Dry, Penalties, bounded
from kvserve.worker.shortlist import (
    BLOCK,
    NEVER,
    above,
    largest,
    nucleus,
    typical,
    without_top_choices,
)
from kvserve.worker.together import Plain

if TYPE_CHECKING:
    from kvserve.worker.grammar import Constraining
    from kvserve.worker.sequences import Generation

_RANDOM_SEED = 0xFFFFFFFF
"""The seed that llama.cpp takes for "draw one yourself" (LLAMA_DEFAULT_SEED)."""
_GREEDY_BELOW = 1e-4

Row = NDArray[np.float32]
Ids = NDArray[np.intp]
Draw = Callable[[Row, float], int]
"""Draws from a row with a number in [0, 1)."""
MakesDice = Callable[..., Dice]
"""Makes the generator of a `stream`."""


def fold_seed(seed: int | None) -> int:
    """A seed that llama.cpp takes literally: 32 bits, not its "random" one. None draws one."""
    if seed is None:
        seed = secrets.randbits(32)
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != _RANDOM_SEED else 0


class Sampler:
    """Draws the tokens of one generation, of those that `constraint` allows.

    `forbidden` are never drawn, `end_tokens` not before `min_tokens` or with `ignore_eos`; `piece`
    gives a token's bytes. A generation with a seed gives the same tokens after it was resumed as
    without: the generator goes on where the tokens already generated left it. (Mirostat forgets
    what they cost.)
    """

    def __init__(
        self,
        sampling: Sampling,
        generation: "Generation",
        *,
        forbidden: NDArray[np.int64],
        end_tokens: NDArray[np.int64],
        piece: Callable[[int], bytes],
        constraint: "Constraining | None" = None,
    ) -> None:
        self._constraint = constraint
        self._generation = generation
        self._forbidden = forbidden
        self._end_tokens = end_tokens
        self._penalties = Penalties(sampling)
        for token in generation.tokens[generation.n_prompt :].tolist():
            self._penalties.accept(token)
        dry = sampling.dry_multiplier > 0
        self._dry = Dry(sampling, generation.tokens, piece) if dry else None
        bias = sampling.logit_bias
        self._biased = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self._bias = np.fromiter(
            (bounded(value, NEVER, 1e9, 0.0) for value in bias.values()),
            dtype=np.float32,
            count=len(bias),
        )
        temperature = bounded(sampling.temperature, 0.0, 100.0, 1.0)
        self.greedy = temperature < _GREEDY_BELOW
        dice = partial(Dice, fold_seed(sampling.seed), generation.n_generated)
        self._dice = None if self.greedy else dice()
        self._draw = _argmax if self.greedy else _draw(sampling, temperature, dice)
        self._plain = _plain(sampling, temperature)

    def plain(self, n_vocab: int) -> Plain | None:
        """The settings of a draw that can be made together with others; None where it cannot."""
        plain = self._plain
        return plain if plain is not None and plain.suits(n_vocab) else None

    def bans(self) -> Ids | None:
        """The tokens that `edit` bans in every row, whatever was drawn before, where it does
        nothing else; None where it does."""
        limits = self._generation.limits
        if (
            len(self._biased)
            or self._penalties.lower
            or self._dry is not None
            or self._constraint is not None
            or (limits.min_tokens > 0 and not limits.ignore_eos)
        ):
            return None
        if not limits.ignore_eos:
            return self._forbidden
        return np.concatenate((self._forbidden, self._end_tokens))

    def number(self) -> float:
        """The random number of the next draw; 0 for a greedy one."""
        return self._dice.uniform() if self._dice is not None else 0.0

    def give_back(self, numbers: Sequence[float]) -> None:
        """Nothing was drawn with the last `numbers`: they are the next ones again."""
        if self._dice is not None:
            self._dice.give_back(numbers)

    def sample(self, row: Row) -> int:
        """Draw the next token from a row of logits, which is changed. Thread-safe for different
        generations."""
        self.edit(row)
        number, plain = self.number(), self.plain(len(row))
        token = -1 if plain is None else together.draw_one(row, plain, number)
        return self.settle(row, number, token)

    def settle(self, row: Row, number: float, token: int) -> int:
        """Take the `token` that was drawn together with others' from an edited row, or draw it
        with the same `number` where that gave -1; returns it."""
        if token < 0:
            token = self._draw(row, number)
        self._penalties.accept(token)
        if self._dry is not None:
            self._dry.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def edit(self, row: Row) -> None:
        """Write biases, penalties, bans and the grammar into the logits, in llama.cpp's order."""
        limits = self._generation.limits
        row[self._biased] += self._bias
        self._penalties.apply(row, self._generation.tokens)
        if self._dry is not None:
            self._dry.apply(row, self._generation.tokens)
        row[self._forbidden] = NEVER
        if limits.ignore_eos or self._generation.n_generated < limits.min_tokens:
            row[self._end_tokens] = NEVER
        if self._constraint is not None:
            self._constraint.apply(row)


def _argmax(row: Row, _number: float) -> int:
    return int(row.argmax())


class _Shortlisted:
    """Shortens the list of tokens as llama.cpp does and in its order, and draws from it."""

    def __init__(self, sampling: Sampling, temperature: float, dice: MakesDice) -> None:
        self._top_k = max(sampling.top_k, 0)
        self._typical_p = bounded(sampling.typical_p, 0.0, 1.0, 1.0)
        self._top_p = bounded(sampling.top_p, 0.0, 1.0, 1.0)
        self._depth = _depth(sampling)
        self._xtc_probability = bounded(sampling.xtc_probability, 0.0, 1.0, 0.0)
        self._xtc_threshold = bounded(sampling.xtc_threshold, 0.0, 1.0, 0.1)
        self._temperature = np.float32(temperature)
        self._xtc_dice = dice(stream=1) if self._xtc_probability > 0 else None

    def __call__(self, row: Row, number: float) -> int:
        ids = largest(row, self._top_k) if self._top_k else None
        logits = row if ids is None else row[ids]
        if self._typical_p < 1:
            ids, logits = _keep(typical(logits, self._typical_p), ids, logits)
        if self._top_p < 1:
            ids, logits = _keep(nucleus(logits, self._top_p), ids, logits)
        if self._depth > -math.inf:
            ids, logits = _keep(above(logits, float(logits.max()) + self._depth), ids, logits)
        if self._xtc_dice is not None and self._xtc_dice.happens(self._xtc_probability):
            kept = without_top_choices(logits, self._xtc_threshold)
            ids, logits = _keep(kept, ids, logits)
        drawn = weighted(logits / self._temperature, number)
        return drawn if ids is None else int(ids[drawn])


def _keep(kept: Ids, ids: Ids | None, logits: Row) -> tuple[Ids, Row]:
    return (kept if ids is None else ids[kept]), logits[kept]


class _Whole:
    """Draws from all tokens: first a block of them, then one in there."""

    def __init__(self, temperature: float, dice: MakesDice) -> None:
        self._temperature = np.float32(temperature)
        self._dice = dice(stream=1)

    def __call__(self, row: Row, number: float) -> int:
        highest = row.max()
        if not np.isfinite(highest):
            return int(row.argmax())
        logits = (row - highest) / self._temperature
        starts = np.arange(0, len(row), BLOCK)
        with np.errstate(divide="ignore"):
            blocks = np.log(np.add.reduceat(np.exp(logits), starts))
        start = int(starts[weighted(blocks, number)])
        return start + weighted(logits[start : start + BLOCK], self._dice.uniform())


def _depth(sampling: Sampling) -> float:
    min_p = bounded(sampling.min_p, 0.0, 1.0, 0.0)
    return math.log(min_p) if min_p > 0 else -math.inf


def _plain(sampling: Sampling, temperature: float) -> Plain | None:
    if temperature < _GREEDY_BELOW:
        return Plain(top_k=1, top_p=1.0, depth=-math.inf, temperature=1.0)
    if (
        sampling.top_k <= 0
        or sampling.typical_p < 1
        or sampling.xtc_probability > 0
        or sampling.mirostat in (1, 2)
    ):
        return None
    top_p = bounded(sampling.top_p, 0.0, 1.0, 1.0)
    return Plain(sampling.top_k, top_p, _depth(sampling), temperature)


def _draw(sampling: Sampling, temperature: float, dice: MakesDice) -> Draw:
    if sampling.mirostat in (1, 2):
        tau = bounded(sampling.mirostat_tau, 0.0, 100.0, 5.0)
        eta = bounded(sampling.mirostat_eta, 0.0, 1.0, 0.1)
        return Mirostat(sampling.mirostat, tau, eta, temperature).sample
    shortens = (
        sampling.top_k > 0
        or sampling.typical_p < 1
        or sampling.top_p < 1
        or sampling.min_p > 0
        or sampling.xtc_probability > 0
    )
    return _Shortlisted(sampling, temperature, dice) if shortens else _Whole(temperature, dice)
