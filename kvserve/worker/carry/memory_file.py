"""A sequence's state in a memory file (memfd), which outlives the worker that wrote it.

The file is one page with a header (magic, length, msgpack), llama.cpp's bytes, padding to 8 bytes,
the sequence's tokens (i32), and what the model would say next (f32, canary.py). Whoever holds a
descriptor holds the memory. Once written, the file is sealed: the kernel then refuses to change or
to cut it, whoever else has it open, which no checksum could promise. A file whose writer died is
not sealed.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvserve.worker.carry.layout import StateLayout
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.structure import Bytes

Tokens = NDArray[np.int32]
LogProbs = NDArray[np.float32]
"""Natural logarithms of the next token's probabilities, shape (n_vocab,)."""

HEADER_BYTES = 4096
LONGEST_SALT = 512
"""In characters: encoded, they still fit the header."""

_MADV_POPULATE_WRITE = 23
"""linux/mman.h; Python's mmap does not name it."""
_PIECE_BYTES = 2**25
_MAGIC = b"kvserve1"
_LENGTH = struct.Struct("<I")
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


@dataclass(frozen=True, slots=True)
class Origin:
    """What wrote a state: `model` and `build` must be the reader's own.

    `model` is `Context.model_identity`, `build` the version of the bindings, which pins the
    commit of llama.cpp.
    """

    model: str
    build: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What a memory file holds, as its header tells.

    `state_bytes` is the length of llama.cpp's part, which holds the cells of the first `n_cached`
    tokens, without those of the first `n_before`: they are in other files. Of the `n_tokens` that
    are listed, at most the last is not in the cache: it is decoded next, and the distribution over
    `n_vocab` tokens that follows it is expected then (0: none was taken). `salt` keeps its cells
    apart from other tenants' (at most LONGEST_SALT characters).

    Raises ValueError where these do not go together.
    """

    origin: Origin
    layout: StateLayout
    state_bytes: int
    n_cached: int
    n_tokens: int
    n_vocab: int = 0
    salt: str = ""
    n_before: int = 0

    def __post_init__(self) -> None:
        sizes = self.state_bytes, self.n_cached, self.n_vocab
        if min(sizes) < 0 or self.n_tokens - self.n_cached not in (0, 1):
            raise ValueError(f"{self.n_cached} of {self.n_tokens} tokens in {sizes[0]} bytes")
        if not 0 <= self.n_before <= self.n_cached:
            raise ValueError(f"{self.n_before} of {self.n_cached} tokens in other files")
        if self.n_vocab and self.n_tokens == self.n_cached:
            raise ValueError("a distribution after no token")
        if len(self.salt) > LONGEST_SALT:
            raise ValueError(f"a salt of {len(self.salt)} characters")

    @property
    def tokens_offset(self) -> int:
        """Where the tokens begin in the file."""
        return HEADER_BYTES + -(-self.state_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """The whole file."""
        return self.tokens_offset + 4 * (self.n_tokens + self.n_vocab)


@dataclass(frozen=True, slots=True)
class ExportedState:
    """One sequence in a sealed memory file. Owns the descriptor `fd`; close it."""

    fd: int
    contents: Contents

    @classmethod
    def open(cls, fd: int) -> Self:
        """Take over a descriptor that another process handed over.

        Raises CannotCarry (MALFORMED) for a file that is not a finished export; `fd` is then
        left open.
        """
        return cls(fd, _read_contents(fd))

    @property
    def layout(self) -> StateLayout:
        """How the state stores its rows."""
        return self.contents.layout

    @property
    def n_bytes(self) -> int:
        """Host memory that the file takes."""
        return self.contents.file_bytes

    @property
    def tokens(self) -> Tokens:
        """The sequence's tokens, shape (n_tokens,); a copy."""
        begin = self.contents.tokens_offset
        return self._map()[begin : begin + 4 * self.contents.n_tokens].view(np.int32).copy()

    @property
    def expected(self) -> LogProbs | None:
        """What the model says after the last token, shape (n_vocab,); a copy."""
        if self.contents.n_vocab == 0:
            return None
        begin = self.contents.tokens_offset + 4 * self.contents.n_tokens
        return self._map()[begin:].view(np.float32).copy()

    def view(self, *, mapped: bool = False) -> Bytes:
        """llama.cpp's bytes, read-only; valid as long as the array lives. With `mapped` all pages
        are mapped before it returns: reading causes no faults then."""
        return self._map(mapped=mapped)[HEADER_BYTES : HEADER_BYTES + self.contents.state_bytes]

    def close(self) -> None:
        """Give the memory back, unless another process holds the file or a view lives."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self, *, mapped: bool = False) -> Bytes:
        # Private: Linux before 6.7 maps no file shared that is sealed against writing.
        flags = mmap.MAP_PRIVATE | (mmap.MAP_POPULATE if mapped else 0)
        file = mmap.mmap(self.fd, self.contents.file_bytes, flags=flags, prot=mmap.PROT_READ)
        return np.frombuffer(file, dtype=np.uint8)


class Blank:
    """A memory file of `n_bytes` whose pages are there and mapped already.

    The kernel zeroes pages at 1 to 5 GB/s, and maps them one fault at a time at 2 to 3: who makes
    the file ahead waits for neither. Without `populated` nothing of it is there yet: for who
    writes it bit by bit. Raises OSError where the kernel gives no memory.
    """

    def __init__(self, n_bytes: int, *, populated: bool = True) -> None:
        self.fd = os.memfd_create("kvserve-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._file: Bytes | None = None
        try:
            os.ftruncate(self.fd, n_bytes)
            if populated:
                self._file = _mapped(self.fd, n_bytes)
                _populate(self._file)
        except BaseException:
            self._file = None
            os.close(self.fd)
            raise

    def view(self, n_bytes: int) -> Bytes:
        """What is written so far of a file that has, or gets, `n_bytes`; read-only."""
        os.ftruncate(self.fd, n_bytes)
        return np.frombuffer(mmap.mmap(self.fd, n_bytes, prot=mmap.PROT_READ), dtype=np.uint8)

    def take(self, n_bytes: int) -> Bytes:
        """The file's mapping, made `n_bytes` long. This object keeps no reference to it."""
        file, self._file = self._file, None
        os.ftruncate(self.fd, n_bytes)
        if file is None or len(file) < n_bytes:
            return _mapped(self.fd, n_bytes)
        return file[:n_bytes]

    def close(self) -> None:
        """Give the memory back."""
        self._file = None
        os.close(self.fd)


def _mapped(fd: int, n_bytes: int) -> Bytes:
    return np.frombuffer(mmap.mmap(fd, n_bytes), dtype=np.uint8)


def write_state(
    contents: Contents,
    tokens: Tokens,
    fill: Callable[[Bytes], LogProbs | None],
    blank: Blank | None = None,
) -> ExportedState:
    """Have `fill` write llama.cpp's part into a memory file, and seal it.

    `blank` is a file to take over, of any size; else one is made. `fill` gets the
    bytes to write, keeps no view of them, and returns what is expected after the last token, of
    `contents.n_vocab` values or None. What it raises passes through, and the file is gone. Raises
    OSError where the kernel gives no memory.
    """
    assert len(tokens) == contents.n_tokens
    blank = Blank(contents.file_bytes) if blank is None else blank
    fd = blank.fd
    try:
        # No writable mapping may be left when the file is sealed: nothing here refers to it.
        _fill(blank.take(contents.file_bytes), contents, tokens, fill)
        body = msgspec.msgpack.encode(contents)
        os.pwrite(fd, _MAGIC + _LENGTH.pack(len(body)) + body, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return ExportedState(fd, contents)


def _fill(
    file: Bytes, contents: Contents, tokens: Tokens, fill: Callable[[Bytes], LogProbs | None]
) -> None:
    begin = contents.tokens_offset
    end = begin + 4 * contents.n_tokens
    expected = fill(file[HEADER_BYTES : HEADER_BYTES + contents.state_bytes])
    file[begin:end].view(np.int32)[:] = tokens
    if expected is not None:
        file[end:].view(np.float32)[:] = expected


def _populate(file: Bytes) -> None:
    """Have the kernel give all pages now, on all cores: one at a time, as they are written, zeroing
    them costs more than llama.cpp's copy. Kernels before 5.14 refuse, and give them then."""
    n_pieces = min(len(os.sched_getaffinity(0)), len(file) // _PIECE_BYTES)
    if n_pieces < 2:
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def populate(begin: int, length: int) -> int:
        status = madvise(file.ctypes.data + begin, length, _MADV_POPULATE_WRITE)
        return ctypes.get_errno() if status else 0

    pieces: list[Future[int]] = []
    size = -(-len(file) // n_pieces // mmap.PAGESIZE) * mmap.PAGESIZE
    with ThreadPoolExecutor(n_pieces, "populate") as pool:
        for begin in range(0, len(file), size):
            length = min(size, len(file) - begin)
            pieces.append(pool.submit(populate, begin, length))
    if errno.ENOMEM in [piece.result() for piece in pieces]:
        raise OSError(errno.ENOMEM, "no memory for a sequence")


def _read_contents(fd: int) -> Contents:
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        front = os.pread(fd, HEADER_BYTES, 0)
        size_bytes = os.fstat(fd).st_size
    except OSError as error:
        raise _malformed(f"it is no memory file ({error.strerror})") from None
    if seals & _SEALS != _SEALS or len(front) < HEADER_BYTES or not front.startswith(_MAGIC):
        raise _malformed("its writer did not finish")
    begin = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack_from(front, len(_MAGIC))
    try:
        contents = msgspec.msgpack.decode(front[begin : begin + length], type=Contents)
    except msgspec.MsgspecError as error:
        raise _malformed(f"its header does not decode ({error})") from None
    if contents.file_bytes != size_bytes:
        raise _malformed(f"it has {size_bytes} bytes, not {contents.file_bytes}")
    return contents


def _malformed(why: str) -> CannotCarry:
    return CannotCarry(Reason.MALFORMED, f"the memory file cannot be read: {why}")
