"""The bytes of a GGUF header, read as the parser reaches them and never beyond a bound.

The file is read and not mapped, because a mapped file that shrinks kills the process with SIGBUS.
"""

import hashlib
import struct
from pathlib import Path
from typing import BinaryIO, Final

from kvserve.gguf.refusal import DOWNLOAD_AGAIN, bad_file

MAX_HEADER_BYTES: Final = 256 * 2**20
MAX_STRINGS: Final = 2**22
"""Elements of all string arrays of a file together; the largest vocabularies have 2**18 tokens."""

_CHUNK_BYTES: Final = 2**20
_START_BYTES: Final = 1024
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


class HeaderSource:
    """A header's bytes as far as they have been read, and the place (`pos`) reached in them.

    Every method raises BadModelFile where the file ends first, or the header passes
    `MAX_HEADER_BYTES`; `what` names the item for that message.
    """

    __slots__ = ("_data", "_file", "_strings_left", "path", "pos", "size_bytes")

    def __init__(self, path: Path, file: BinaryIO, size_bytes: int) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.pos = 0
        self._file = file
        self._data = bytearray()
        self._strings_left = MAX_STRINGS

    def start(self) -> bytes:
        """Give the first bytes of the file without moving, to tell what it is."""
        self._fill(min(self.size_bytes, _START_BYTES))
        return bytes(self._data[:_START_BYTES])

    def u32(self, what: str) -> int:
        """Read a 32-bit count, type or version."""
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        """Read a 64-bit count, length or offset."""
        return int(self.scalar(_U64, what))

    def name(self, what: str, longest: int) -> str:
        """Read a string of at most `longest` bytes."""
        length = self.u64(what)
        if longest < length <= self.size_bytes - self.pos:
            raise bad_file(
                self.path, f"has a {what} of {length:,} bytes, and {longest:,} are the most"
            )
        return self.text(length, what)

    def text(self, length: int, what: str) -> str:
        """Read `length` bytes of UTF-8."""
        begin = self.skip(length, what)
        try:
            return self._data[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError:
            raise bad_file(
                self.path,
                f"has bytes that are not UTF-8 in its {what}; it is damaged, {DOWNLOAD_AGAIN}",
            ) from None

    def scalar(self, layout: struct.Struct, what: str) -> int | float | bool:
        """Read one number."""
        begin = self.skip(layout.size, what)
        value: int | float | bool = layout.unpack_from(self._data, begin)[0]
        return value

    def numbers(self, code: str, length: int, what: str) -> tuple[int | float | bool, ...]:
        """Read `length` numbers of one struct code; the caller bounds the length."""
        layout = struct.Struct(f"<{length}{code}")
        begin = self.skip(layout.size, what)
        return layout.unpack_from(self._data, begin)

    def skip(self, length: int, what: str) -> int:
        """Step over `length` bytes that are in the file; returns where they begin."""
        begin = self.pos
        self._reach(begin + length, what)
        self.pos = begin + length
        return begin

    def skip_strings(self, length: int, what: str) -> None:
        """Step over an array of strings: the one loop here that runs once for each token."""
        if length > self._strings_left or 8 * length > self.size_bytes:
            raise bad_file(
                self.path,
                f"declares {length:,} strings in its {what}, more than its {self.size_bytes:,} "
                f"bytes can hold or any model has; it is damaged, {DOWNLOAD_AGAIN}",
            )
        self._strings_left -= length
        data, unpack, pos, first = self._data, _U64.unpack_from, self.pos, 0
        while True:
            try:
                for index in range(first, length):
                    first = index
                    pos += 8 + unpack(data, pos)[0]
                break
            except (struct.error, OverflowError):
                self._reach(pos + 8, what)
        self._reach(pos, what)
        self.pos = pos

    def digest(self) -> bytes:
        """SHA-256 of the bytes up to `pos`."""
        with memoryview(self._data) as view:
            return hashlib.sha256(view[: self.pos]).digest()

    def _reach(self, end: int, what: str) -> None:
        if end <= len(self._data):
            return
        if end > self.size_bytes:
            raise bad_file(
                self.path,
                f"is truncated or damaged: its {what} would end at byte {end:,}, "
                f"the file has {self.size_bytes:,}; {DOWNLOAD_AGAIN}",
            )
        if end > MAX_HEADER_BYTES:
            raise bad_file(
                self.path,
                f"has a header of more than {MAX_HEADER_BYTES:,} bytes (at its {what}), "
                f"which no model needs; {DOWNLOAD_AGAIN}",
            )
        self._fill(end)

    def _fill(self, end: int) -> None:
        while len(self._data) < end:
            room = self.size_bytes - len(self._data)
            chunk = self._file.read(min(room, max(_CHUNK_BYTES, end - len(self._data))))
            if not chunk:
                raise bad_file(self.path, "became shorter while it was read: try again")
            self._data += chunk
