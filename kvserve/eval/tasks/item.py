"""One question of a task, and how its answer is judged. Pure."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_NAME = re.compile(r"[A-Za-z_]\w*")


class Judge(StrEnum):
    """What must be right."""

    FIRST_NUMBER = "first number"
    LAST_NUMBER = "last number"
    NUMBERS = "all numbers, in any order"
    NAME = "first name"
    PHRASE = "beginning"
    JSON = "JSON value"


@dataclass(frozen=True, slots=True)
class Item:
    """A text to complete up to `stop`, in at most `max_tokens`; `answer` is what `judge` wants:
    numbers and names as text, several numbers by spaces, JSON as JSON."""

    prompt: str
    answer: str
    judge: Judge
    stop: str = "\n"
    max_tokens: int = 12


def is_right(item: Item, text: str) -> bool:
    """Whether a completion answers the item; exactly, but for case and blanks around it."""
    return _JUDGES[item.judge](item.answer, text)


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in _NUMBER.findall(text)]


def _first_number(answer: str, text: str) -> bool:
    return _numbers(text)[:1] == [answer]


def _last_number(answer: str, text: str) -> bool:
    return _numbers(text)[-1:] == [answer]


def _all_numbers(answer: str, text: str) -> bool:
    wanted = answer.split()
    return sorted(_numbers(text)[: len(wanted)]) == sorted(wanted)


def _name(answer: str, text: str) -> bool:
    found = _NAME.search(text)
    return found is not None and found[0] == answer


def _phrase(answer: str, text: str) -> bool:
    words = re.findall(r"\w+", answer.lower())
    return re.findall(r"\w+", text.lower())[: len(words)] == words


def _json(answer: str, text: str) -> bool:
    begin = text.find("{")
    if begin < 0:
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return False
    return bool(value == json.loads(answer))


_JUDGES: dict[Judge, Callable[[str, str], bool]] = {
    Judge.FIRST_NUMBER: _first_number,
    Judge.LAST_NUMBER: _last_number,
    Judge.NUMBERS: _all_numbers,
    Judge.NAME: _name,
    Judge.PHRASE: _phrase,
    Judge.JSON: _json,
}
