"""Typed access to a model's metadata, with one clear error for each wrong kind of value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvserve.errors import BadModelFile
from kvserve.gguf.header import ArrayValue, LongText, Value
from kvserve.gguf.refusal import CONVERT_AGAIN, bad_file, shown

_LARGEST = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of one model. Keys that start with a dot are the architecture's own.

    Every method raises BadModelFile where the value is there and of the wrong kind.
    """

    path: Path
    architecture: str
    values: Mapping[str, Value]

    def text(self, key: str) -> str | None:
        """Give a text value, None where the file has none."""
        value = self.values.get(self._full(key))
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, LongText):
            raise self._wrong(key, f"{value.length_bytes:,} bytes of text, more than can be right")
        raise self._wrong(key, "something else where a text was due")

    def natural(self, key: str) -> int | None:
        """Give a whole number from 0 to 2**32 - 1, None where the file has none."""
        value = self.values.get(self._full(key))
        return None if value is None else self._natural(key, value)

    def required(self, key: str) -> int:
        """Give a whole number of at least 1."""
        value = self.natural(key)
        if not value:
            lacks = "a zero for" if value == 0 else "no"
            raise bad_file(
                self.path,
                f"has {lacks} {shown(self._full(key))}: it is no complete model, {CONVERT_AGAIN}",
            )
        return value

    def flag(self, key: str) -> bool | None:
        """Give a yes or no, None where the file has none."""
        value = self.values.get(self._full(key))
        if value is None or isinstance(value, bool):
            return value
        raise self._wrong(key, "something else where true or false was due")

    def is_array(self, key: str) -> bool:
        """Whether the value is an array."""
        return isinstance(self.values.get(self._full(key)), ArrayValue)

    def length(self, key: str) -> int | None:
        """Give the number of elements of an array, None where the file has none."""
        value = self.values.get(self._full(key))
        if value is None or isinstance(value, ArrayValue):
            return None if value is None else value.length
        raise self._wrong(key, "a single value where an array was due")

    def array(self, key: str) -> tuple[int, ...] | None:
        """Give an array of whole numbers (true is 1), None where the file has none."""
        value = self.values.get(self._full(key))
        if value is None:
            return None
        if not isinstance(value, ArrayValue) or value.values is None:
            raise self._wrong(key, "no short array of numbers")
        return tuple(
            self._natural(key, int(v) if v is True or v is False else v) for v in value.values
        )

    def per_layer(self, key: str, n_layer: int) -> tuple[int, ...] | None:
        """Give one number for each layer, out of an array of that length or one number for all."""
        if not self.is_array(key):
            value = self.natural(key)
            return None if value is None else (value,) * n_layer
        numbers = self.array(key) or ()
        if len(numbers) != n_layer:
            raise self._wrong(key, f"{len(numbers):,} values for {n_layer:,} layers")
        return numbers

    def _full(self, key: str) -> str:
        return self.architecture + key if key.startswith(".") else key

    def _natural(self, key: str, value: Value) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
            return value
        raise self._wrong(key, "something else where a whole number was due")

    def _wrong(self, key: str, found: str) -> BadModelFile:
        return bad_file(self.path, f"has {found} in {shown(self._full(key))}: {CONVERT_AGAIN}")
