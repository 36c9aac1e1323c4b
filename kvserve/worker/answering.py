"""Completes task prompts greedily, with each pair."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Context, LoadError  # isort: skip

from collections.abc import Callable

import numpy as np

from kvserve.errors import UsageError
from kvserve.ipc.evaluating import Answered, EvalAnswer, Finished, Prompted, Skipped
from kvserve.ipc.messages import ChatMessage, ChatPrompt
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.contexts import Tokens, Weights, read_tokens, score_single

Emit = Callable[[EvalAnswer], None]


class Answering:
    """All prompts with all pairs; a unit is one task with one pair.

    Raises UsageError where a prompt is longer than the model's context, InvalidRequest where its
    chat template refuses it.
    """

    def __init__(
        self, weights: Weights, prompts: tuple[Prompted, ...], pairs: tuple[str, ...]
    ) -> None:
        self._weights = weights
        self._pairs = pairs
        with weights.renderer() as renderer:
            self._prompts = [(prompt, _tokens(prompt, weights, renderer)) for prompt in prompts]
        self._n_ctx = max(len(tokens) + prompt.max_tokens for prompt, tokens in self._prompts)
        if self._n_ctx > weights.n_ctx_train:
            raise UsageError(
                f"a task needs {self._n_ctx} tokens and the model was trained for "
                f"{weights.n_ctx_train}: use --quick, or other --tasks",
                param="tasks",
            )

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
        tasks = list(dict.fromkeys(prompt.task for prompt, _ in self._prompts))
        for pair in self._pairs:
            left = [task for task in tasks if _unit(task, pair) not in done]
            if not left:
                continue
            try:
                with self._weights.context(pair, self._n_ctx) as context:
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
            if stop and stop in data.lstrip():
                break
            one = np.array([token], dtype=np.int32)
            [row] = score_single(context, one, position)
            token = int(row.argmax())
        text = data.decode("utf-8", "replace")
        return text.lstrip().partition(prompt.stop)[0] if prompt.stop else text


def _tokens(prompt: Prompted, weights: Weights, renderer: ChatRenderer) -> Tokens:
    vocab = weights.vocab
    if not prompt.chat:
        return vocab.tokenize(prompt.prompt, add_special=True, parse_special=False)
    text = renderer.render(ChatPrompt((ChatMessage("user", prompt.prompt),)))
    add_special = not (vocab.bos_text and text.startswith(vocab.bos_text))
    return vocab.tokenize(text, add_special=add_special, parse_special=True)


def _unit(task: str, pair: str) -> str:
    return f"task/{task}/{pair}"
