"""A bounded reader of GGUF headers (versions 2 and 3, little endian).

Hostile files are normal here: nothing is sized by a count that the file declares, and long arrays
(tokens, merges, scores) are stepped over without building objects. The checks are those of
llama.cpp's own reader (ggml/src/gguf.cpp), and that the tensor data is all there.
"""

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvserve.gguf.foreign import foreign_kind
from kvserve.gguf.refusal import CONVERT_AGAIN, DOWNLOAD_AGAIN, bad_file, shown
from kvserve.gguf.source import HeaderSource
from kvserve.gguf.tensor_index import TensorInfo, check_places, padded, read_tensors

MAX_KEYS: Final = 2**16
MAX_TENSORS: Final = 2**16
MAX_ALIGNMENT: Final = 2**20
MAX_KEY_BYTES: Final = 2**16 - 1

KEPT_ARRAY_ELEMENTS: Final = 4096
KEPT_ELEMENTS: Final = 2**16
"""Elements kept of all arrays together; each array keeps all of its elements or none."""

KEPT_TEXT_BYTES: Final = 2**20
KEPT_TEXTS_BYTES: Final = 2**23

_DEFAULT_ALIGNMENT: Final = 32
_STRING: Final = 8
_ARRAY: Final = 9
_CODES: Final = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_SCALARS: Final = {number: struct.Struct(f"<{code}") for number, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """An array of metadata. `values` is None for strings and for arrays too long to keep."""

    length: int
    values: tuple[int | float | bool, ...] | None


@dataclass(frozen=True, slots=True)
class LongText:
    """A text that was stepped over because of its length."""

    length_bytes: int


Value = int | float | bool | str | ArrayValue | LongText


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says before its tensor data. Sizes and `data_offset` are in bytes.

    `sha256` is the digest of the header's own bytes, without the tensor data.
    """

    path: Path
    file_bytes: int
    version: int
    values: Mapping[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    sha256: bytes


def read_header(path: Path) -> Header:
    """Read and check the header of one GGUF file, a split's part or a whole model.

    Raises BadModelFile, in one line, for anything that is not a sound GGUF file.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise bad_file(path, "is a directory: name the .gguf file in it")
        if not stat.S_ISREG(mode):
            raise bad_file(path, "is not a regular file: name a .gguf file")
        with path.open("rb", buffering=0) as file:
            return _parse(HeaderSource(path, file, os.fstat(file.fileno()).st_size))
    except (FileNotFoundError, NotADirectoryError):
        raise bad_file(path, "does not exist: check the path") from None
    except PermissionError:
        raise bad_file(path, "may not be read by this user: change its permissions") from None
    except OSError as error:
        raise bad_file(path, f"cannot be read ({error.strerror}): check the disk") from None


def _parse(source: HeaderSource) -> Header:
    version = _check_start(source)
    n_tensors = _declared(source, "tensors", least_bytes=24, most=MAX_TENSORS)
    n_keys = _declared(source, "metadata keys", least_bytes=14, most=MAX_KEYS)
    values = _Values(source).read(n_keys)
    alignment = _alignment(source.path, values)
    tensors = read_tensors(source, n_tensors)
    data_offset = padded(source.pos, alignment)
    check_places(source, tensors, data_offset, alignment)
    return Header(
        path=source.path,
        file_bytes=source.size_bytes,
        version=version,
        values=values,
        tensors=tensors,
        data_offset=data_offset,
        sha256=source.digest(),
    )


def _check_start(source: HeaderSource) -> int:
    path = source.path
    if source.size_bytes == 0:
        raise bad_file(path, f"is empty: {DOWNLOAD_AGAIN}")
    if not source.start().startswith(b"GGUF"):
        raise bad_file(path, foreign_kind(source.start()))
    source.pos = 4
    version = source.u32("version")
    if version and version & 0xFFFF == 0:
        raise bad_file(path, "is a big-endian GGUF file: take the little-endian one")
    if version == 1:
        raise bad_file(path, f"is GGUF version 1, which llama.cpp has dropped: {CONVERT_AGAIN}")
    if version not in (2, 3):
        raise bad_file(path, f"is GGUF version {version}, and only 2 and 3 can be read")
    return version


def _declared(source: HeaderSource, things: str, *, least_bytes: int, most: int) -> int:
    count = source.u64(f"number of {things}")
    if count > most or count * least_bytes > source.size_bytes:
        raise bad_file(
            source.path,
            f"declares {count:,} {things}, more than its {source.size_bytes:,} bytes can hold "
            f"or any model has; it is damaged, {DOWNLOAD_AGAIN}",
        )
    return count


class _Values:
    """Reads the metadata, within the budgets for what is kept."""

    __slots__ = ("_elements_left", "_source", "_text_bytes_left")

    def __init__(self, source: HeaderSource) -> None:
        self._source = source
        self._elements_left = KEPT_ELEMENTS
        self._text_bytes_left = KEPT_TEXTS_BYTES

    def read(self, n_keys: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for index in range(n_keys):
            key = self._source.name(f"metadata key {index}", MAX_KEY_BYTES)
            if not key or key in values:
                fault = (
                    f"the metadata key {shown(key)} twice" if key else "a metadata key of no name"
                )
                raise bad_file(self._source.path, f"has {fault}; it is damaged, {DOWNLOAD_AGAIN}")
            values[key] = self._value(f"metadata {shown(key)}")
        return values

    def _value(self, what: str) -> Value:
        value_type = self._source.u32(what)
        if value_type == _STRING:
            return self._text(what)
        if value_type == _ARRAY:
            return self._array(what)
        return self._source.scalar(_SCALARS[_known(self._source.path, value_type, what)], what)

    def _text(self, what: str) -> str | LongText:
        length = self._source.u64(what)
        if length > min(KEPT_TEXT_BYTES, self._text_bytes_left):
            self._source.skip(length, what)
            return LongText(length)
        self._text_bytes_left -= length
        return self._source.text(length, what)

    def _array(self, what: str) -> ArrayValue:
        source = self._source
        element_type = source.u32(what)
        length = source.u64(what)
        if element_type == _STRING:
            source.skip_strings(length, what)
            return ArrayValue(length, None)
        if element_type == _ARRAY:
            raise bad_file(
                source.path, f"has arrays inside the array of its {what}, which no model uses"
            )
        element_type = _known(source.path, element_type, what)
        if length > min(KEPT_ARRAY_ELEMENTS, self._elements_left):
            source.skip(length * _SCALARS[element_type].size, what)
            return ArrayValue(length, None)
        self._elements_left -= length
        return ArrayValue(length, source.numbers(_CODES[element_type], length, what))


def _known(path: Path, value_type: int, what: str) -> int:
    if value_type not in _SCALARS:
        raise bad_file(
            path, f"has the unknown value type {value_type} in its {what}; {DOWNLOAD_AGAIN}"
        )
    return value_type


def _alignment(path: Path, values: Mapping[str, Value]) -> int:
    value = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    alignment = value if isinstance(value, int) and not isinstance(value, bool) else 0
    if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise bad_file(
            path,
            f"has general.alignment {alignment:,}, not a power of two up to {MAX_ALIGNMENT:,}; "
            f"it is damaged, {DOWNLOAD_AGAIN}",
        )
    return alignment
