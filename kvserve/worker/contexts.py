"""Contexts for an evaluation: one model's weights, and contexts of any pair beside each other."""

# llama_cpp before numpy, see kvserve/worker/llama/__init__.py
from kvserve.worker.llama import Batch, Context  # isort: skip

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvserve.core.cells import pad_context
from kvserve.core.dtypes import parse_pair
from kvserve.ipc.evaluating import N_OUTPUTS
from kvserve.ipc.messages import Load
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.templates import choose

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]


class Weights:
    """A loaded model that contexts are made of."""

    def __init__(self, context: Context, load: Load) -> None:
        self._context = context
        self._load = load
        self.vocab = context.vocab
        self.n_ctx_train = context.n_ctx_train

    @property
    def n_threads(self) -> int:
        """CPU threads, for what is computed outside llama.cpp."""
        return self._load.n_threads

    @contextmanager
    def renderer(self) -> Iterator[ChatRenderer]:
        """The model's chat template, in its process."""
        context, vocab = self._context, self.vocab
        template = choose(context.model.architecture, context.model.chat_template, vocab.has)
        renderer = ChatRenderer(template, bos_text=vocab.bos_text, eos_text=vocab.eos_text)
        try:
            yield renderer
        finally:
            renderer.close()

    @contextmanager
    def context(self, pair: str, n_ctx: int, *, control: bool = False) -> Iterator[Context]:
        """A context of `pair` for `n_ctx` tokens; the control computes in smaller micro-batches.

        Raises LoadError.
        """
        types = parse_pair(pair)
        n_ubatch = self._load.n_ubatch
        load = msgspec.structs.replace(
            self._load,
            type_k=types.k,
            type_v=types.v,
            n_ctx=pad_context(n_ctx),
            n_seq_max=1,
            n_ubatch=max(1, n_ubatch // 2) if control else n_ubatch,
        )
        opened = self._context.beside(load, min(N_OUTPUTS, load.n_batch))
        try:
            yield opened
        finally:
            opened.close()


def read_tokens(context: Context, tokens: Tokens, start: int) -> None:
    """Read `tokens` at positions `start` and on, in whole batches. Only the last one's logits are
    computed, and `context.logits(1)` has them."""
    batch = Batch(context.n_batch)
    for begin in range(0, len(tokens), context.n_batch):
        batch.clear()
        batch.add(tokens[begin : begin + context.n_batch], start + begin, 0, last=True)
        context.decode(batch)


def score_batched(context: Context, tokens: Tokens, start: int) -> Iterator[Logits]:
    """Read `tokens` in batches; yields the logits after each of them, as views that the next one
    may overwrite; shape (n_vocab,)."""
    size = min(N_OUTPUTS, context.n_batch)
    batch = Batch(size)
    for begin in range(0, len(tokens), size):
        part = tokens[begin : begin + size]
        batch.clear()
        batch.add(part, start + begin, 0, last=False)
        batch.want_all()
        context.decode(batch)
        yield from context.logits(len(part))


def score_single(context: Context, tokens: Tokens, start: int) -> Iterator[Logits]:
    """The same one token at a time, as a model that generates reads its own text."""
    batch = Batch(1)
    for index in range(len(tokens)):
        batch.clear()
        batch.add(tokens[index : index + 1], start + index, 0, last=True)
        context.decode(batch)
        yield context.logits(1)[0]
