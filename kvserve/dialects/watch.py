"""Tells the moment at which an answer begins a call."""

import re
from collections.abc import Iterable

from kvserve.dialects.form import (
    DEEPSEEK,
    FUNCTION_GEMMA,
    FUNCTION_GEMMA_MARKS,
    GEMMA4,
    GEMMA4_MARKS,
    HARMONY,
    LLAMA3,
    MISTRAL,
    Form,
)

_TRIGGERS = {
    HARMONY: "to=functions.",
    MISTRAL: "[TOOL_CALLS]",
    DEEPSEEK: "<｜tool▁calls▁begin｜>",
    FUNCTION_GEMMA: FUNCTION_GEMMA_MARKS[0],
    GEMMA4: GEMMA4_MARKS[0],
    LLAMA3: "<|python_tag|>",
}
_MOST_TRIGGER_CHARS = 64
_MOST_HEAD_CHARS = 512


class CallWatch:
    """Follows an answer of a given form up to the first call, of one of the functions `names`.

    That begins with the dialect's mark, which means nothing in reasoning. Llama 3 writes its calls
    without one too, as the whole answer: there it begins with `{"name": "…"` and a known name.
    """

    def __init__(self, form: Form, names: Iterable[str]) -> None:
        self.begun = False
        """Whether a call has begun."""
        self.written = ""
        """What has come of the call by then, after the mark where there is one."""
        self._trigger = _TRIGGERS.get(form.calls, "<tool_call>")
        self._outside = form.think, form.end_think
        if form.calls == HARMONY:
            self._outside = "<|message|>", "<|end|>"
        self._within = form.thinking
        self._tail = ""
        self._head = _head_of(names) if form.calls == LLAMA3 else None
        self._answer = ""

    def push(self, text: str) -> bool:
        """Go on by this much text; whether a call has begun."""
        if not self.begun:
            self.begun = self._begins_bare(text) or self._begins_marked(text)
        return self.begun

    def _begins_bare(self, text: str) -> bool:
        if self._head is None:
            return False
        self._answer += text
        match = self._head.match(self._answer)
        if match is not None:
            self.written = f'{{"name": "{match[1]}"{self._answer[match.end() :]}'
            return True
        if len(self._answer) > _MOST_HEAD_CHARS or self._answer.lstrip()[:1] not in ("", "{"):
            self._head = None
        return False

    def _begins_marked(self, text: str) -> bool:
        self._tail += text
        while True:
            opening, closing = self._outside
            marks = (closing,) if self._within else (opening, self._trigger)
            found = [(self._tail.find(mark), mark) for mark in marks if mark and mark in self._tail]
            if not found:
                self._tail = self._tail[-_MOST_TRIGGER_CHARS:]
                return False
            place, mark = min(found)
            self._tail = self._tail[place + len(mark) :]
            if mark == self._trigger and not self._within:
                self.written = self._tail
                return True
            self._within = not self._within


def _head_of(names: Iterable[str]) -> re.Pattern[str]:
    """Names need no escape in JSON: they are letters, digits, dots, dashes and underscores."""
    known = "|".join(map(re.escape, names))
    return re.compile(rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"({known})"')
