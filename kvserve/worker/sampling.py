"""Drawing a token from one row of logits.

Biases, penalties and bans are written into the row with NumPy, and only the draw itself is
llama.cpp's: its own penalty step looks every token of the vocabulary up in a hash map (0.17 ms
against 0.01 ms with 262,144 tokens), and a ban can be lifted without rebuilding a chain.
"""

import math
import secrets
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Sampling

if TYPE_CHECKING:
    from kvserve.worker.grammar import Constraint
    from kvserve.worker.llama import Context
    from kvserve.worker.sequences import Generation

_BANNED = -1e9
_RANDOM_SEED = 0xFFFFFFFF
"""The seed that llama.cpp takes for "draw one yourself" (LLAMA_DEFAULT_SEED)."""
_GREEDY_BELOW = 1e-4

Row = NDArray[np.float32]


def bounded(value: float, low: float, high: float, default: float) -> float:
    """`value` within its limits; `default` for what is not finite. No NaN may reach C."""
    return min(max(value, low), high) if math.isfinite(value) else default


def fold_seed(seed: int | None) -> int:
    """A seed that llama.cpp takes literally: 32 bits, not its "random" one. None draws one."""
    if seed is None:
        seed = secrets.randbits(32)
    folded = (seed ^ (seed >> 32)) & 0xFFFFFFFF
    return folded if folded != _RANDOM_SEED else 0


class Penalties:
    """The OpenAI presence and frequency penalties, and llama.cpp's repeat penalty.

    Presence and frequency look at the generated tokens, repeat at the last `repeat_last_n` of
    prompt and answer (-1: all).
    """

    __slots__ = ("_frequency", "_penalty", "_presence", "_repeat", "_seen", "_window")

    def __init__(self, sampling: Sampling, n_vocab: int) -> None:
        self._repeat = bounded(sampling.repeat_penalty, 0.01, 100.0, 1.0)
        self._window = sampling.repeat_last_n
        self._presence = bounded(sampling.presence_penalty, -100.0, 100.0, 0.0)
        self._frequency = bounded(sampling.frequency_penalty, -100.0, 100.0, 0.0)
        counted = self._presence != 0 or self._frequency != 0
        self._penalty = np.zeros(n_vocab, dtype=np.float32) if counted else None
        self._seen: set[int] = set()

    def accept(self, token: int) -> None:
        """Count a generated token."""
        if self._penalty is None:
            return
        self._penalty[token] += self._frequency
        if token not in self._seen:
            self._seen.add(token)
            self._penalty[token] += self._presence

    def apply(self, row: Row, tokens: NDArray[np.int32]) -> None:
        """Lower the logits; `tokens` are prompt and answer so far."""
        if self._repeat != 1 and self._window != 0:
            recent = tokens[-self._window :] if self._window > 0 else tokens
            values = row[recent]
            # A negative logit is multiplied, as in llama.cpp: dividing would favour the token.
            row[recent] = np.where(values > 0, values / self._repeat, values * self._repeat)
        if self._penalty is not None:
            row -= self._penalty


class Sampler:
    """Draws the tokens of one generation, of those that `constraint` allows.

    `forbidden` are never drawn, `end_tokens` not before `min_tokens` or with `ignore_eos`.
    A generation with a seed gives the same tokens after it was resumed as without: the generator
    goes on where the tokens already generated left it.
    """

    def __init__(
        self,
        sampling: Sampling,
        generation: "Generation",
        *,
        n_vocab: int,
        forbidden: NDArray[np.int64],
        end_tokens: NDArray[np.int64],
        constraint: "Constraint | None" = None,
    ) -> None:
        self._constraint = constraint
        self._generation = generation
        self._forbidden = forbidden
        self._end_tokens = end_tokens
        self._penalties = Penalties(sampling, n_vocab)
        for token in generation.tokens[generation.n_prompt :].tolist():
            self._penalties.accept(token)
        bias = sampling.logit_bias
        self._biased = np.fromiter(bias.keys(), dtype=np.int64, count=len(bias))
        self._bias = np.fromiter(
            (bounded(value, _BANNED, 1e9, 0.0) for value in bias.values()),
            dtype=np.float32,
            count=len(bias),
        )
        temperature = bounded(sampling.temperature, 0.0, 100.0, 1.0)
        self._chain = None
        if temperature >= _GREEDY_BELOW:
            from kvserve.worker.llama import Chain  # noqa: PLC0415 tests here need no llama.cpp

            self._chain = Chain(
                top_k=min(max(sampling.top_k, 0), n_vocab),
                typical_p=bounded(sampling.typical_p, 0.0, 1.0, 1.0),
                top_p=bounded(sampling.top_p, 0.0, 1.0, 1.0),
                min_p=bounded(sampling.min_p, 0.0, 1.0, 0.0),
                temperature=temperature,
                seed=fold_seed(sampling.seed),
                n_drawn=generation.n_generated,
            )

    @property
    def greedy(self) -> bool:
        """Whether the draw is an argmax: microseconds, not worth a thread."""
        return self._chain is None

    def sample(self, context: "Context", output: int, row: Row) -> int:
        """Draw the next token. `row` is the view of the batch's token `output` in
        `Context.logits`, and is changed. Thread-safe for different generations."""
        self.edit(row)
        chain = self._chain
        token = int(row.argmax()) if chain is None else chain.sample(context, output)
        self._penalties.accept(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def edit(self, row: Row) -> None:
        """Write biases, penalties, bans and the grammar into the logits, in llama.cpp's order."""
        limits = self._generation.limits
        row[self._biased] += self._bias
        self._penalties.apply(row, self._generation.tokens)
        row[self._forbidden] = _BANNED
        if limits.ignore_eos or self._generation.n_generated < limits.min_tokens:
            row[self._end_tokens] = _BANNED
        if self._constraint is not None:
            self._constraint.apply(row)
