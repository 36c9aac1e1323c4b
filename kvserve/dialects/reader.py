"""Reads one answer as it comes: text in, parts out."""

from collections.abc import Mapping

from kvserve.dialects import json_calls, markup_calls
from kvserve.dialects.form import (
    DEEPSEEK,
    FUNCTION_GEMMA,
    FUNCTION_GEMMA_MARKS,
    GEMMA4,
    GEMMA4_MARKS,
    GLM,
    HARMONY,
    LLAMA3,
    MISTRAL,
    QWEN_XML,
    Form,
)
from kvserve.dialects.markup_calls import types_of
from kvserve.dialects.parts import Part, Parts
from kvserve.dialects.tape import Reading, Tape


class Reader:
    """Reads one answer of a given form.

    `functions` are the parameters' JSON schemas of what may be called; None where nothing may, and
    what looks like a call is text. `keeps_reasoning` leaves reasoning in the text, with its marks.
    Never raises: what cannot be read is text.
    """

    def __init__(
        self,
        form: Form,
        functions: Mapping[str, object] | None,
        *,
        keeps_reasoning: bool = False,
    ) -> None:
        self._tape = Tape()
        self._parts = Parts(holds=functions is not None)
        self._reading = self._read(form, functions, keeps_reasoning)
        self._ended = False

    def push(self, text: str) -> list[Part]:
        """The parts that this much more text completes."""
        if text:
            self._tape.text += text
            self._go_on()
        return self._parts.drain()

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        self._tape.over = True
        self._go_on()
        self._parts.finish()
        return self._parts.drain()

    def _go_on(self) -> None:
        if not self._ended:
            self._ended = next(self._reading, self) is self

    def _read(
        self, form: Form, functions: Mapping[str, object] | None, keeps_reasoning: bool
    ) -> Reading:
        tape, parts = self._tape, self._parts
        if form.calls == HARMONY:
            calls = functions is not None
            yield from json_calls.harmony(tape, parts, calls=calls, keeps=keeps_reasoning)
            return
        if form.end_think:
            yield from _reasoning(tape, parts, form, keeps_reasoning)
        if functions is not None:
            yield from _calls(tape, parts, form, functions)
        while not (tape.over and not tape.text):
            parts.content(tape.take(len(tape.text)))
            if not tape.over:
                yield


def _reasoning(tape: Tape, parts: Parts, form: Form, keeps: bool) -> Reading:
    opened = form.thinking
    if not opened and (yield from tape.begins(form.think)) is not None:
        opened = True
        tape.text = tape.text.lstrip()
        opening = tape.take(len(form.think))
        if keeps:
            parts.content(opening)
    if not opened:
        return
    tell = parts.content if keeps else parts.reasoning
    mark = yield from tape.until((form.end_think,), tell)
    if keeps and mark is not None:
        parts.content(mark)
    elif mark is not None:
        parts.end_reasoning()


def _calls(tape: Tape, parts: Parts, form: Form, functions: Mapping[str, object]) -> Reading:
    types = {name: types_of(schema) for name, schema in functions.items()}
    match form.calls:
        case _ if form.calls == QWEN_XML:
            yield from markup_calls.qwen_xml(tape, parts, types)
        case _ if form.calls == GLM:
            yield from markup_calls.glm(tape, parts, types)
        case _ if form.calls == FUNCTION_GEMMA:
            yield from markup_calls.gemma(tape, parts, *FUNCTION_GEMMA_MARKS)
        case _ if form.calls == GEMMA4:
            yield from markup_calls.gemma(tape, parts, *GEMMA4_MARKS)
        case _ if form.calls == LLAMA3:
            yield from json_calls.llama3(tape, parts, frozenset(functions))
        case _ if form.calls == MISTRAL:
            yield from json_calls.mistral(tape, parts)
        case _ if form.calls == DEEPSEEK:
            yield from json_calls.deepseek(tape, parts)
        case _:
            yield from json_calls.hermes(tape, parts)
