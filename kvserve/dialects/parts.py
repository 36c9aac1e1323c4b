"""What an answer consists of, and the one place where the parts are put together."""

import json
import math
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """What the model says to itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of the function `name`; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """More of the JSON text of the latest call's arguments."""

    text: str


Part = Content | Reasoning | CallBegun | Arguments


class Parts:
    """Collects parts in order. Blanks between reasoning, text and calls belong to none of them.

    `holds` says that calls may come: blanks at the end of the text wait for what follows then.
    """

    def __init__(self, *, holds: bool) -> None:
        self._holds = holds
        self._new: list[Part] = []
        self._blanks = ""
        self._blanks_reasoning = ""
        self._drops = False
        self._begun_reasoning = False

    def drain(self) -> list[Part]:
        """The parts since the last time."""
        new, self._new = self._new, []
        return new

    def content(self, text: str) -> None:
        """Tell text for the user."""
        if self._drops:
            text = text.lstrip()
        if not text:
            return
        self._drops = False
        text = self._blanks + text
        shown = text.rstrip() if self._holds else text
        self._blanks = text[len(shown) :]
        if shown:
            self._new.append(Content(shown))

    def reasoning(self, text: str) -> None:
        """Tell reasoning."""
        if not self._begun_reasoning:
            text = text.lstrip()
        if not text:
            return
        self._begun_reasoning = True
        text = self._blanks_reasoning + text
        shown = text.rstrip()
        self._blanks_reasoning = text[len(shown) :]
        if shown:
            self._new.append(Reasoning(shown))

    def end_reasoning(self) -> None:
        """The reasoning is over."""
        self._blanks_reasoning = ""
        self._drops = True

    def call(self, name: str) -> None:
        """Tell that a call begins."""
        self._blanks = ""
        self._drops = True
        self._new.append(CallBegun(name))

    def arguments(self, text: str) -> None:
        """Tell more of the call's arguments."""
        if text:
            self._new.append(Arguments(text))

    def whole_call(self, value: object) -> bool:
        """Tell a call from its JSON value; whether it was one."""
        call = _read_call(value)
        if call is None:
            return False
        name, arguments = call
        self.call(name)
        self.arguments(arguments)
        return True

    def finish(self) -> None:
        """The answer is over: what was held back belongs to it, unless a call came before."""
        if self._blanks:
            self._new.append(Content(self._blanks))
            self._blanks = ""
        if self._blanks_reasoning:
            self._new.append(Reasoning(self._blanks_reasoning))
            self._blanks_reasoning = ""


def is_call(value: object) -> bool:
    """Whether a JSON value is a call."""
    return _read_call(value) is not None


def _read_call(value: object) -> tuple[str, str] | None:
    """A call's name, and its arguments as JSON text."""
    if not isinstance(value, dict):
        return None
    inner = value.get("function")
    if isinstance(inner, dict):
        value = inner
    name = value.get("name")
    given = value.get("arguments", value.get("parameters"))
    if not isinstance(given, str):
        given = write_json({} if given is None else given)
    if not isinstance(name, str) or not name or given is None:
        return None
    return _encodable(name), _encodable(given)


def parse_json(text: str) -> object:
    """The value of a JSON text; None for what is none."""
    try:
        value: object = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return value


def write_json(value: object) -> str | None:
    """The JSON text of a value that `parse_json` gave; None for None, and where it is nested too
    deeply."""
    if value is None:
        return None
    try:
        return _encodable(json.dumps(value, ensure_ascii=False))
    except RecursionError:
        return None


def _encodable(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which JSON's escapes can
    write and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _refuse(word: str) -> NoReturn:
    raise ValueError(word)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number
