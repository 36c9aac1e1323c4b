"""Constrained output: which tokens a grammar allows next, by llguidance.

The mask for the next token is computed on a thread while the model decodes the last one.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import get_bitmask_shape
from numpy.typing import NDArray

from kvserve.dialects.grammar import WHITESPACE
from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import Grammar
from kvserve.worker.grammar_errors import explain, field_of, shorten

_MOST_CHARS = 256 * 1024
_MOST_KNOWN = 16
_MASK_THREADS = 4
_ANY_OBJECT = '{"type":"object"}'

Row = NDArray[np.float32]


class Constraining(Protocol):
    """What a generation asks of its constraint; see Constraint."""

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token could follow."""
        ...

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        ...

    def accept(self, token: int) -> None:
        """Go on by a token."""
        ...

    def apply(self, row: Row) -> None:
        """Rule out the logits of tokens that may not follow."""
        ...


class Constraint:
    """The state of one generation in its grammar. For one thread at a time.

    When `complete`, the text is whole: nothing but an end token could follow. `error` tells why
    the grammar cannot be followed any further, such as a limit on its complexity.
    """

    def __init__(
        self, matcher: LLMatcher, n_vocab: int, executor: Executor, resume: Sequence[int] = ()
    ) -> None:
        self.complete = False
        self.error: str | None = None
        self._matcher = matcher
        self._mask = np.empty(get_bitmask_shape(1, n_vocab)[1], dtype=np.int32)
        self._n_vocab = n_vocab
        self._executor = executor
        self._forbidden: Future[NDArray[np.bool_]] | None = None
        matcher.consume_tokens(list(resume))
        self._look_ahead()

    def accept(self, token: int) -> None:
        """Go on by a token, and begin to compute which ones may follow."""
        self._matcher.consume_token(token)
        self._look_ahead()

    def apply(self, row: Row) -> None:
        """Rule out the logits of tokens that may not follow."""
        if self._forbidden is not None:
            # Lower than any ban: a banned end token may be the only one that the grammar allows.
            np.copyto(row, -np.inf, where=self._forbidden.result())

    def _look_ahead(self) -> None:
        # While the mask is computed, the matcher can be asked nothing.
        self.complete = self._matcher.is_stopped()
        self.error = shorten(self._matcher.get_error()) if self._matcher.is_error() else None
        self._forbidden = None if self.complete else self._executor.submit(self._compute)

    def _compute(self) -> NDArray[np.bool_]:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        allowed = np.unpackbits(self._mask.view(np.uint8), count=self._n_vocab, bitorder="little")
        forbidden: NDArray[np.bool_] = allowed == 0
        return forbidden


Starter = Callable[[Sequence[int]], Constraint]


class GrammarCompiler:
    """Makes constraints. `build_tokenizer` is called at the first one: it takes a second or two.

    For one thread at a time.
    """

    def __init__(self, n_vocab: int, build_tokenizer: Callable[[], LLTokenizer]) -> None:
        self._n_vocab = n_vocab
        self._build_tokenizer = build_tokenizer
        self._tokenizer: LLTokenizer | None = None
        self._executor = ThreadPoolExecutor(_MASK_THREADS, "mask")
        self._known: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def compile(
        self, grammar: Grammar, resume: Sequence[int] = (), *, param: str | None = None
    ) -> Constraint:
        """A constraint at its beginning, or after the tokens of `resume`.

        Raises InvalidRequest for `param`, the grammar's own field unless given, for what is no
        grammar or too large a one.
        """
        param = param or field_of(grammar.kind)
        constraint = self.starter(grammar, param=param)(resume)
        if constraint.error is not None:
            raise InvalidRequest(explain(grammar.kind, constraint.error), param=param)
        return constraint

    def starter(self, grammar: Grammar, *, param: str) -> Starter:
        """What makes one constraint, after some tokens, at a later time and on any thread.

        Raises as `compile`.
        """
        matcher = self._known.pop(grammar, None)
        if matcher is None:
            matcher = self._parse(grammar, param)
        self._known[grammar] = matcher
        if len(self._known) > _MOST_KNOWN:
            self._known.popitem(last=False)
        own = matcher.deep_copy()
        return lambda resume: Constraint(own.deep_copy(), self._n_vocab, self._executor, resume)

    def _parse(self, grammar: Grammar, param: str) -> LLMatcher:
        if len(grammar.text) > _MOST_CHARS:
            raise InvalidRequest(
                f"this is over {_MOST_CHARS} characters: make it shorter, or offer fewer tools",
                param=param,
            )
        if self._tokenizer is None:
            self._tokenizer = self._build_tokenizer()
        limits = LLParserLimits(verbose_errors=False)
        try:
            text = _to_llguidance(grammar)
        except ValueError as error:
            raise InvalidRequest(explain(grammar.kind, error), param=param) from None
        matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(explain(grammar.kind, matcher.get_error()), param=param)
        return matcher


def _to_llguidance(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return _from_schema(_ANY_OBJECT)
        case "json_schema":
            return _from_schema(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _from_schema(schema: str) -> str:
    return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
