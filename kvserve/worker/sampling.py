"""Drawing a token from one row of logits.

Biases, penalties, bans and grammars are written into the row with NumPy, the tokens that the draw
can fall on are looked up with NumPy (`shortlist`), and a llama.cpp chain decides between those.
llama.cpp's own steps over a whole vocabulary of 262,144 tokens take 3 to 100 times as long, and its
penalty step looks every token up in a hash map (0.17 ms against 0.01 ms).
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Sampling
from kvserve.worker.penalties import Dry, Penalties, bounded
from kvserve.worker.shortlist import BLOCK, NEVER, above, largest, most, nucleus, typical

if TYPE_CHECKING:
    from kvserve.worker.chains import Chain
    from kvserve.worker.grammar import Constraint
    from kvserve.worker.sequences import Generation

_RANDOM_SEED = 0xFFFFFFFF
"""The seed that llama.cpp takes for "draw one yourself" (LLAMA_DEFAULT_SEED)."""
_GREEDY_BELOW = 1e-4

Row = NDArray[np.float32]
Draw = Callable[[Row], int]


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
    what they cost, and XTC counts a draw for each of them.)
    """

    def __init__(
        self,
        sampling: Sampling,
        generation: "Generation",
        *,
        n_vocab: int,
        forbidden: NDArray[np.int64],
        end_tokens: NDArray[np.int64],
        piece: Callable[[int], bytes],
        constraint: "Constraint | None" = None,
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
        self._draw = _argmax if self.greedy else _draw(sampling, temperature, generation, n_vocab)

    def sample(self, row: Row) -> int:
        """Draw the next token from a row of logits, which is changed. Thread-safe for different
        generations."""
        self.edit(row)
        token = self._draw(row)
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


def _argmax(row: Row) -> int:
    return int(row.argmax())


class _From:
    """Lets a chain choose between the tokens that `shortlist` finds."""

    def __init__(self, shortlist: Callable[[Row], NDArray[np.intp]], chain: "Chain") -> None:
        self._shortlist = shortlist
        self._chain = chain

    def __call__(self, row: Row) -> int:
        ids = self._shortlist(row)
        return self._chain.draw(ids, row[ids])


class _Whole:
    """Draws from all tokens: first a block of them, then one in there."""

    def __init__(self, draw: "Chain", temperature: float) -> None:
        self._chain = draw
        self._temperature = np.float32(temperature)

    def __call__(self, row: Row) -> int:
        logits = (row - row.max()) / self._temperature
        weights = np.exp(logits)
        starts = np.arange(0, len(row), BLOCK)
        with np.errstate(divide="ignore"):
            blocks = np.log(np.add.reduceat(weights, starts))
        start = int(starts[self._chain.draw(np.arange(len(starts)), blocks)])
        inside = logits[start : start + BLOCK]
        return start + self._chain.draw(np.arange(len(inside)), inside)


def _draw(sampling: Sampling, temperature: float, generation: "Generation", n_vocab: int) -> Draw:
    """The fastest exact way to draw as `sampling` asks."""
    # Here since tests of all else need no llama.cpp.
    from kvserve.worker.chains import Chain, Steps  # noqa: PLC0415
    from kvserve.worker.mirostat import Mirostat  # noqa: PLC0415

    seed, n_drawn = fold_seed(sampling.seed), generation.n_generated
    if sampling.mirostat in (1, 2):
        tau = bounded(sampling.mirostat_tau, 0.0, 100.0, 5.0)
        eta = bounded(sampling.mirostat_eta, 0.0, 1.0, 0.1)
        return Mirostat(sampling.mirostat, tau, eta, temperature, seed, n_drawn).sample
    steps = Steps(
        top_k=min(max(sampling.top_k, 0), n_vocab),
        typical_p=bounded(sampling.typical_p, 0.0, 1.0, 1.0),
        top_p=bounded(sampling.top_p, 0.0, 1.0, 1.0),
        min_p=bounded(sampling.min_p, 0.0, 1.0, 0.0),
        xtc_probability=bounded(sampling.xtc_probability, 0.0, 1.0, 0.0),
        xtc_threshold=bounded(sampling.xtc_threshold, 0.0, 1.0, 0.1),
        temperature=temperature,
    )
    if 0 < steps.top_k <= most(n_vocab):
        return _From(lambda row: largest(row, steps.top_k), Chain(steps, seed, n_drawn))
    if steps.top_k == 0:
        # The chain would take its share of what is left, not of the whole.
        if steps.typical_p < 1:
            chain = Chain(replace(steps, typical_p=1.0), seed, n_drawn)
            return _From(lambda row: typical(row, steps.typical_p), chain)
        if steps.top_p < 1:
            chain = Chain(replace(steps, top_p=1.0), seed, n_drawn)
            return _From(lambda row: nucleus(row, steps.top_p), chain)
        if steps.min_p > 0:
            depth = float(np.log(steps.min_p))
            chain = Chain(steps, seed, n_drawn)
            return _From(lambda row: above(row, float(row.max()) + depth), chain)
        if steps.xtc_probability == 0:
            return _Whole(Chain(Steps(), seed, 2 * n_drawn), temperature)
    everything = np.arange(n_vocab)
    return _From(lambda _row: everything, Chain(steps, seed, n_drawn))
