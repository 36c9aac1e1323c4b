"""What an evaluation has measured so far, on disk after each answer, so that it can go on."""

import contextlib
import fcntl
import hashlib
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from kvserve.errors import UsageError
from kvserve.ipc.evaluating import (
    Answered,
    EvalAnswer,
    EvalRequest,
    Finished,
    Opened,
    Scored,
    Skipped,
    Timed,
)
from kvserve.whole_file import replace_file

Result = Scored | Answered | Timed | Skipped
_decoder = msgspec.json.Decoder(EvalAnswer)


class _Head(msgspec.Struct, frozen=True):
    fingerprint: str


class Partial:
    """A file of JSON lines: what is measured, then the answers.

    A file that was begun with other settings is started afresh. Of a unit that was cut off in the
    middle nothing counts. Raises UsageError where another process writes the same file.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = path.with_suffix(".lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UsageError(
                "the same evaluation runs already: wait for it, or end it and go on from there"
            ) from error
        self._answers: list[Result | Finished] = self._read()
        lines = [msgspec.json.encode(each) for each in (_Head(fingerprint), *self._answers)]
        replace_file(path, b"".join(line + b"\n" for line in lines))
        self._file = path.open("ab")
        self._dropped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._dropped and not self.done:
            self.discard()  # nothing to go on from
        self._file.close()
        self._lock.close()

    @property
    def done(self) -> tuple[str, ...]:
        """The units that are over."""
        return tuple(a.unit for a in self._answers if isinstance(a, Finished))

    @property
    def results(self) -> list[Result]:
        """The answers of all units that are over."""
        done = frozenset(self.done)
        return [a for a in self._answers if not isinstance(a, Finished) and a.unit in done]

    def add(self, answer: EvalAnswer) -> None:
        """Keep an answer."""
        if isinstance(answer, Opened):
            return
        self._answers.append(answer)
        self._file.write(msgspec.json.encode(answer) + b"\n")
        self._file.flush()

    def discard(self) -> None:
        """The evaluation is complete and stored elsewhere: drop the file."""
        self._dropped = True  # from here on the name may be another process'
        self._file.close()
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".lock").unlink(missing_ok=True)

    def _read(self) -> list[Result | Finished]:
        answers: list[Result | Finished] = []
        with contextlib.suppress(OSError, msgspec.DecodeError):
            head, *lines = self._path.read_bytes().splitlines()
            if msgspec.json.decode(head, type=_Head).fingerprint != self._fingerprint:
                return []
            for line in lines:
                answer = _decoder.decode(line)
                if not isinstance(answer, Opened):
                    answers.append(answer)
        done = {answer.unit for answer in answers if isinstance(answer, Finished)}
        return [answer for answer in answers if answer.unit in done]


def fingerprint(request: EvalRequest, key: str) -> str:
    """Changes with everything that changes the answers of a unit; the pairs do not, nor do the
    number of threads and the GPUs' shares, which follow what is free."""
    load = msgspec.structs.replace(
        request.load, n_threads=0, n_threads_batch=0, extra_buffers=True, tensor_split=()
    )
    bare = msgspec.structs.replace(request, load=load, pairs=(), done=())
    return hashlib.sha256(key.encode() + msgspec.json.encode(bare)).hexdigest()
