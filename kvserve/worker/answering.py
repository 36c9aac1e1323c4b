"""Completes task prompts greedily, with each pair."""

# llama_cpp before numpy, see kvserve/worker/llama.py
from kvserve.worker.llama import Context, LoadError  # isort: skip

from collections.abc import Callable

import numpy as np

from kvserve.ipc.evaluating import Answered, EvalAnswer, Finished, Prompted, Skipped
from kvserve.worker.contexts import Tokens, Weights, read_tokens, score_single

Emit = Callable[[EvalAnswer], None]


class Answering:
    """All prompts with all pairs; a unit is one task with one pair."""

    def __init__(
        self, weights: Weights, prompts: tuple[Prompted, ...], pairs: tuple[str, ...]
    ) -> None:
        self._weights = weights
        self._pairs = pairs
        vocab = weights.vocab
        self._prompts = [
            (p, vocab.tokenize(p.prompt, add_special=True, parse_special=False)) for p in prompts
        ]

    @property
    def costs(self) -> dict[str, int]:
        """Units in order, with their tokens."""
        costs: dict[str, int] = {}
        for pair in self._pairs:
            for prompt, tokens in self._prompts:
                unit = _unit(prompt.task, pair)
                costs[unit] = costs.get(unit, 0) + len(tokens) + 4 * prompt.max_tokens
        return costs

    def run(self, done: frozenset[str], emit: Emit) -> None:
        """Answer what is not done. A pair that the context refuses is skipped with the reason."""
        n_ctx = max(len(tokens) + prompt.max_tokens for prompt, tokens in self._prompts)
        tasks = list(dict.fromkeys(prompt.task for prompt, _ in self._prompts))
        for pair in self._pairs:
            left = [task for task in tasks if _unit(task, pair) not in done]
            if not left:
                continue
            try:
                with self._weights.context(pair, n_ctx) as context:
                    for task in left:
                        self._answer(context, task, pair, emit)
                        emit(Finished(_unit(task, pair)))
            except LoadError as error:
                for task in left:
                    emit(Skipped(_unit(task, pair), pair, error.message))
                    emit(Finished(_unit(task, pair)))

    def _answer(self, context: Context, task: str, pair: str, emit: Emit) -> None:
        for prompt, tokens in self._prompts:
            if prompt.task == task:
                text = self._complete(context, prompt, tokens)
                emit(Answered(_unit(task, pair), pair, task, prompt.index, text))

    def _complete(self, context: Context, prompt: Prompted, tokens: Tokens) -> str:
        context.clear_slot(0)
        read_tokens(context, tokens, 0)
        token = int(context.logits(1)[0].argmax())
        data, stop = b"", prompt.stop.encode()
        for position in range(len(tokens), len(tokens) + prompt.max_tokens):
            if self._weights.vocab.ends(token):
                break
            data += self._weights.vocab.piece(token)
            if stop and stop in data:
                break
            one = np.array([token], dtype=np.int32)
            [row] = score_single(context, one, position)
            token = int(row.argmax())
        text = data.decode("utf-8", "replace")
        return text.partition(prompt.stop)[0] if prompt.stop else text


def _unit(task: str, pair: str) -> str:
    return f"task/{task}/{pair}"
