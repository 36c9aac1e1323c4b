"""The types of the settings' values: how each is read from a flag, a variable or a TOML value.

Every reader takes what it is given, a value of the right type too, and raises ValueError with
words that tell what to write instead; `load.py` puts the name of the source before them.
"""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, SecretStr

from kvserve.core.dtypes import CachePair, KvType, parse_pair
from kvserve.core.plan import Task
from kvserve.units import parse_bytes

_INTEGER = re.compile(r"[+-]?\d{1,18}")
_TOKENS = re.compile(r"(\d{1,9})\s*([km]?)", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", re.IGNORECASE)
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_KEY = re.compile(r"[!-~]+")
_KEY_CHARACTERS = 8
_WORDS = {
    **dict.fromkeys(("1", "true", "yes", "on"), True),
    **dict.fromkeys(("0", "false", "no", "off"), False),
}


@dataclass(frozen=True, slots=True)
class Percent:
    """A share of the device's memory."""

    value: float

    def of(self, total_bytes: int) -> int:
        """Return that share in bytes."""
        return int(total_bytes * self.value / 100)


def read_tokens(value: object) -> int:
    """Read a number of tokens from 1 up: `32768`, or `32K` for 32 * 1024."""
    if isinstance(value, str) and (match := _TOKENS.fullmatch(value.strip())):
        value = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()]
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31:
        return value
    raise ValueError(f"{value!r} is not a number of tokens: write one from 1 up, as 8192 or 32K")


def read_number(value: object) -> float:
    """Read a number of 0 or more, such as `0.01`."""
    with contextlib.suppress(ValueError):
        if isinstance(value, str):
            value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    raise ValueError(f"{value!r} is not a number: write one of 0 or more, as 0.01")


def read_share(value: object) -> float:
    """Read a share: `0.95` or `95%`."""
    percent = isinstance(value, str) and value.strip().endswith("%")
    with contextlib.suppress(ValueError):
        share = read_number(str(value).strip().removesuffix("%") if percent else value)
        share = share / 100 if percent else share
        if share <= 1:
            return share
    raise ValueError(f"{value!r} is not a share: write it as 0.95 or 95%")


def read_seconds(value: object) -> float:
    """Read a duration of 0 or more: `90` and `90s` are seconds, `10m`, `1.5h` and `500ms` too."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9:
        return float(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(
            f"{value!r} is not a duration: write it as 30s, 10m or a number of seconds"
        )
    return float(match[1]) * _SECONDS[(match[2] or "s").lower()]


def read_positive_seconds(value: object) -> float:
    """Read a duration above 0."""
    seconds = read_seconds(value)
    if seconds == 0:
        raise ValueError("0 would end everything at once: write a longer time, as 120s")
    return seconds


def read_limit_seconds(value: object) -> float | None:
    """Read a duration, of which 0 means no limit."""
    return read_seconds(value) or None


def read_size(value: object) -> int:
    """Read bytes: `7.6GiB`, `512MiB` or a plain number."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(
            f"{value!r} is not a size: write it as 7.6GiB, 512MiB or a number of bytes"
        )
    return parse_bytes(value)


def read_size_or_share(value: object) -> int | Percent:
    """Read bytes or a percentage from 0 to 90, as `256MiB` or `3%`."""
    if isinstance(value, Percent):
        return value
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value.strip())):
        if float(match[1]) > 90:
            raise ValueError(f"{value!r} leaves nothing for the model: write 90% or less")
        return Percent(float(match[1]))
    return read_size(value)


def read_pair(value: object) -> CachePair:
    """Read the KV types, as `q8_0` or `q8_0:q4_0`."""
    if isinstance(value, CachePair):
        return value
    if isinstance(value, str):
        return parse_pair(value)
    known = ", ".join(KvType)
    raise ValueError(f"{value!r} is not a cache type: write one of {known}, or K:V")


def read_switch(value: object) -> bool:
    """Read on or off."""
    word = _WORDS.get(str(value).strip().lower())
    if word is None:
        raise ValueError(f"{value!r} is neither true nor false")
    return word


def read_keys(value: object) -> tuple[SecretStr, ...]:
    """Read one or more keys of 8 characters or more: a list, or a text with commas.

    No message repeats a key.
    """
    if isinstance(value, SecretStr | str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ValueError("not an API key: write a text or a list of texts")
    keys: list[SecretStr] = []
    for item in value:
        text = item.get_secret_value() if isinstance(item, SecretStr) else item
        if not isinstance(text, str):
            raise ValueError("an API key must be a text in quotes")
        parts = [part.strip() for part in text.split(",")]
        if not all(_KEY.fullmatch(part) for part in parts):
            raise ValueError("a key must be of visible ASCII characters, without spaces")
        # A shorter one is quickly guessed, and hiding it in logs would hide half of their words.
        if any(len(part) < _KEY_CHARACTERS for part in parts):
            raise ValueError(
                f"a key must have {_KEY_CHARACTERS} characters or more: make one with "
                "`openssl rand -hex 16`"
            )
        keys.extend(SecretStr(part) for part in parts)
    return tuple(keys)


def read_path(value: object) -> Path:
    """Read a path; `~` is the home directory."""
    if isinstance(value, str | Path) and str(value).strip():
        return Path(value).expanduser()
    raise ValueError(f"{value!r} is not a path")


def read_text(value: object) -> str:
    """Read a text that is not empty."""
    if isinstance(value, str | Path) and str(value).strip():
        return str(value).strip()
    raise ValueError(f"{value!r} is not a text, or is empty")


def whole(low: int, high: int | None = None) -> Callable[[object], int]:
    """Make a reader of whole numbers within bounds, both included."""
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"

    def read(value: object) -> int:
        if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if value >= low and (high is None or value <= high):
                return value
            raise ValueError(f"{value} is out of range: write a whole number, {allowed}")
        raise ValueError(f"{value!r} is not a whole number: write one, {allowed}")

    return read


def choice(*words: str) -> Callable[[object], str]:
    """Make a reader of one of some words."""

    def read(value: object) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError(f"{value!r} is unknown here: write one of {', '.join(words)}")
        return word

    return read


def or_word(word: str, read: Callable[[object], object]) -> Callable[[object], object]:
    """Make a reader that also takes a word, and gives that word back."""

    def read_either(value: object) -> object:
        if isinstance(value, str) and value.strip().lower() == word:
            return word
        try:
            return read(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return read_either


def or_none(read: Callable[[object], object]) -> Callable[[object], object]:
    """Make a reader that takes the word `none` for None."""

    def read_either(value: object) -> object:
        if value is None or (isinstance(value, str) and value.strip().lower() == "none"):
            return None
        return read(value)

    return read_either


Auto = Literal["auto"]
Context = Annotated[int | Literal["max"], BeforeValidator(or_word("max", read_tokens))]
ContextLimit = Annotated[int | None, BeforeValidator(or_none(read_tokens))]
PairOrAuto = Annotated[CachePair | Auto, BeforeValidator(or_word("auto", read_pair))]
PairOrNone = Annotated[CachePair | None, BeforeValidator(or_none(read_pair))]
NumberOrNone = Annotated[float | None, BeforeValidator(or_none(read_number))]
ShareOrNone = Annotated[float | None, BeforeValidator(or_none(read_share))]
TaskOrNone = Annotated[Task | None, BeforeValidator(or_none(choice(*Task)))]
Layers = Annotated[int | Auto, BeforeValidator(or_word("auto", whole(0)))]
Threads = Annotated[int | Auto, BeforeValidator(or_word("auto", whole(1, 1024)))]
Reserve = Annotated[int | Percent | Auto, BeforeValidator(or_word("auto", read_size_or_share))]
MicroBatch = Annotated[int | Auto, BeforeValidator(or_word("auto", whole(1, 65536)))]
SizeOrAuto = Annotated[int | Auto, BeforeValidator(or_word("auto", read_size))]
SizeOrNone = Annotated[int | None, BeforeValidator(or_none(read_size))]
Seconds = Annotated[float, BeforeValidator(read_seconds)]
PositiveSeconds = Annotated[float, BeforeValidator(read_positive_seconds)]
SecondsOrNone = Annotated[float | None, BeforeValidator(or_none(read_limit_seconds))]
Keys = Annotated[tuple[SecretStr, ...], BeforeValidator(read_keys)]
Switch = Annotated[bool, BeforeValidator(read_switch)]
Text = Annotated[str, BeforeValidator(read_text)]
TextOrNone = Annotated[str | None, BeforeValidator(or_none(read_text))]
PathOrNone = Annotated[Path | None, BeforeValidator(or_none(read_path))]
AnyPath = Annotated[Path, BeforeValidator(read_path)]
