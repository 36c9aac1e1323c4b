"""The likelihoods of a prompt's own tokens, for requests that ask for an echo of it."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kvserve.ipc.messages import Echo, TokenLogprobs
from kvserve.worker.logprobs import token_logprobs

Tokens = NDArray[np.int32]


class PromptEcho:
    """A prompt on its way back to its caller, with likelihoods where `n_logprobs` is a number.

    The logits of a whole prompt would not fit the output buffer, which has a row for each place in
    the batch: they come in pieces, in order, and all that is kept of a row are its likelihoods.
    `piece` gives a token's bytes.
    """

    def __init__(
        self, request: int, prompt: Tokens, n_logprobs: int | None, piece: Callable[[int], bytes]
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._n_logprobs = n_logprobs
        self._piece = piece
        self._logprobs: list[TokenLogprobs] = []

    @property
    def n_to_score(self) -> int:
        """How many of the prompt's first tokens must give their logits: each tells about the token
        after it, so all but the last."""
        return 0 if self._n_logprobs is None else len(self._prompt) - 1

    @property
    def complete(self) -> bool:
        """Whether no logits are missing."""
        return len(self._logprobs) >= self.n_to_score

    def take(self, start: int, rows: NDArray[np.float32]) -> None:
        """Read the logits that the tokens at `start` and on left, one row each; those that were
        read before a preemption are skipped."""
        assert self._n_logprobs is not None
        for position, row in enumerate(rows, start):
            if position == len(self._logprobs) < self.n_to_score:
                following = int(self._prompt[position + 1])
                self._logprobs.append(
                    token_logprobs(self._request, row, following, self._n_logprobs, self._piece)
                )

    def message(self) -> Echo:
        """What the caller gets."""
        pieces = tuple(map(self._piece, self._prompt.tolist()))
        return Echo(self._request, pieces, tuple(self._logprobs))
