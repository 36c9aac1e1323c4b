"""Constraints for answers that may, or must, call functions."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from kvserve.dialects.form import Form
from kvserve.dialects.grammar import CallGrammars
from kvserve.dialects.watch import CallWatch
from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import Grammar, Tools
from kvserve.worker.grammar import Constraining, Constraint, GrammarCompiler, Row, Starter
from kvserve.worker.sequences import Utf8Stream


class CallConstraint:
    """Lets an answer go on freely until `watch` sees that it begins a call, and holds it to the
    grammar from there.

    `start` makes the constraint of what comes after the call's mark. A grammar that cannot be
    followed any further leaves the answer free again, unless `strict`.
    """

    def __init__(
        self,
        start: Starter,
        *,
        watch: CallWatch,
        piece: Callable[[int], bytes],
        tokens_of: Callable[[str], Sequence[int]],
        strict: bool,
        resume: Sequence[int],
    ) -> None:
        self._start = start
        self._inner: Constraint | None = None
        self._over = False
        self._watch = watch
        self._piece = piece
        self._tokens_of = tokens_of
        self._strict = strict
        self._utf8 = Utf8Stream()
        for place, token in enumerate(resume, 1):
            if self._begins(token):
                self._hold(resume[place:])
                break

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token could follow."""
        return self._inner is not None and self._inner.complete

    @property
    def error(self) -> str | None:
        """Why the grammar cannot be followed any further."""
        return None if self._inner is None else self._inner.error

    def accept(self, token: int) -> None:
        """Go on by a token."""
        if self._over:
            return
        if self._inner is None:
            if self._begins(token):
                self._hold(())
        else:
            self._inner.accept(token)
            self._let_go()

    def apply(self, row: Row) -> None:
        """Rule out the logits of tokens that may not follow."""
        if self._inner is not None:
            self._inner.apply(row)

    def _begins(self, token: int) -> bool:
        return self._watch.push(self._utf8.push(self._piece(token)))

    def _hold(self, resume: Sequence[int]) -> None:
        written = self._watch.written
        begun = [*self._tokens_of(written)] if written else []
        if begun and self._start(begun).error is not None:
            # What came with the mark in one token began no call.
            self._over = True
            return
        self._inner = self._start([*begun, *resume])
        self._let_go()

    def _let_go(self) -> None:
        if self._inner is not None and self._inner.error is not None and not self._strict:
            self._inner, self._over = None, True


class CallConstraints:
    """Makes the constraint for a request's tools.

    `mark` writes a marker as a grammar's symbol, `tokens_of` are the tokens of a text.
    """

    def __init__(
        self,
        grammars: GrammarCompiler,
        *,
        mark: Callable[[str], str],
        piece: Callable[[int], bytes],
        tokens_of: Callable[[str], Sequence[int]],
    ) -> None:
        self._grammars = grammars
        self._mark = mark
        self._piece = piece
        self._tokens_of = tokens_of

    def make(
        self, tools: Tools, form: Form, grammar: Grammar | None, resume: Sequence[int]
    ) -> Constraining | None:
        """The constraint of an answer; None where it may say what it likes. `grammar` is that of
        an answer that calls nothing, of JSON.

        Raises InvalidRequest where a function's schema cannot be followed but must be, with the
        place of that function.
        """
        try:
            return self._make(tools, form, grammar, resume)
        except InvalidRequest:
            for i, schema in enumerate(functions_of(tools).values()):
                text = json.dumps(schema)
                param = f"tools[{i}].function.parameters"
                self._grammars.starter(Grammar("json_schema", text), param=param)
            raise

    def _make(
        self, tools: Tools, form: Form, grammar: Grammar | None, resume: Sequence[int]
    ) -> Constraining | None:
        functions = functions_of(tools)
        if tools.only is not None:
            functions = {tools.only: functions[tools.only]}
        calls = CallGrammars(form, functions, tools.parallel, self._mark)
        if tools.required:
            return self._compile(calls.whole(), resume)
        if grammar is not None:
            schema = {"type": "object"} if grammar.kind == "json_object" else grammar.text
            value = json.loads(schema) if isinstance(schema, str) else schema
            return self._compile(calls.or_json(value), resume)
        try:
            start = self._grammars.starter(Grammar("lark", calls.after_trigger()), param="tools")
        except InvalidRequest:
            if tools.strict:
                raise
            return None
        return CallConstraint(
            start,
            watch=CallWatch(form, functions),
            piece=self._piece,
            tokens_of=self._tokens_of,
            strict=tools.strict,
            resume=resume,
        )

    def _compile(self, lark: str, resume: Sequence[int]) -> Constraint:
        return self._grammars.compile(Grammar("lark", lark), resume, param="tools")


def functions_of(tools: Tools) -> dict[str, Any]:
    """The functions' names, with the JSON schemas of their parameters."""
    return {
        one["function"]["name"]: one["function"].get("parameters") for one in json.loads(tools.text)
    }
