"""`python -m kvserve.worker.fake --fd N --script JSON`: a scripted worker for fault tests.

It speaks the real worker's protocol without a model: the answer to every prompt is `w0 w1 w2 …`,
token `i` being the i-th word, and a prompt has as many tokens as it has words. The script says
how fast it is and where it fails.
"""

import argparse
import os
import queue
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import NoReturn

import msgspec

from kvserve.dialects.form import Form
from kvserve.ipc.channel import WorkerChannel
from kvserve.ipc.messages import (
    Awake,
    Cancel,
    CarryReport,
    ChatPrompt,
    CopiedAhead,
    CopiedPiece,
    CopyAhead,
    Delta,
    End,
    ExportedState,
    FinishReason,
    Generate,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    MemoryReport,
    NeedsContext,
    Pause,
    Paused,
    Progress,
    Prompt,
    Started,
    Step,
    TakeAhead,
    TakeIn,
    TakenAhead,
    TakenIn,
    TextPrompt,
    ToWorker,
    Transcode,
    Transcoded,
)
from kvserve.worker.lifetime import die_with_parent
from kvserve.worker.reader import start_reader

_N_CTX_TRAIN = 131_072
_DEFAULT_MAX_TOKENS = 16
_GARBAGE = b"\xff" * 64
_STATE_BYTES = 8


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong, and when.

    Points of time are `hello` (before `Hello`), `transcode` (on `Transcode`), `load` (on `Load`),
    `loaded` (right after `Loaded`), `take_ahead` (on `TakeAhead`), `take_in` (on `TakeIn`),
    `first_step` and `step:N` (instead of the N-th `Step`, from 1), `copy` (on `CopyAhead`) and
    `copied` (right after `CopiedAhead`). At its point the worker dies of `signal`, or hangs (reads
    on, answers nothing), or writes bytes that are no frame and then hangs. With `die_once_file` it
    dies only where that file is missing, and creates it. `answer` are the texts that all answers
    consist of, in place of words, written in the `form`.
    """

    step_ms: float = 1.0
    load_ms: float = 0.0
    fail_load: str | None = None
    oom_load: bool = False
    die_at: str | None = None
    signal: int = int(signal.SIGKILL)
    die_once_file: str | None = None
    die_unless_no_extra_buffers: bool = False
    hang_at: str | None = None
    garbage_at: str | None = None
    ignore_pause: bool = False
    answer: tuple[str, ...] = ()
    form: Form | None = None


class _Stream:
    """One request that is being answered."""

    __slots__ = ("id", "n_done", "n_prompt", "n_tokens")

    def __init__(self, request: Generate, n_prompt: int, n_ctx: int) -> None:
        wanted = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        self.id = request.id
        self.n_prompt = n_prompt
        self.n_tokens = min(wanted, n_ctx - n_prompt)
        self.n_done = len(request.resume)


class FakeWorker:
    """Plays a script. `inbox` is fed by the reader thread."""

    def __init__(self, channel: WorkerChannel, sock: socket.socket, script: Script) -> None:
        self.inbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()
        self._channel = channel
        self._sock = sock
        self._script = script
        self._streams: dict[int, _Stream] = {}
        self._copied: dict[int, tuple[CopiedPiece, int]] = {}
        self._n_steps = 0
        self._n_ctx = 0

    def run(self) -> int:
        """Greet, load and serve; returns only where the script lets the load fail."""
        self._reach("hello")
        self._channel.send(Awake())
        self._channel.send(Hello(os.getpid(), "fake", "0", "fake"))
        if not self._load():
            return 1
        paused = False
        while True:
            paused = self._take_messages(paused) or paused
            if self._streams and not paused:
                self._step()

    def _load(self) -> bool:
        script = self._script
        while isinstance(load := self.inbox.get(), Transcode):
            self._reach("transcode")
            _read_all(load.carried)  # they hold nothing to rewrite
            self._channel.send(Transcoded())
        if not isinstance(load, Load):
            raise TypeError(f"expected Load, not {load!r}")
        self._reach("load")
        if script.fail_load is not None or script.oom_load:
            self._channel.send(LoadFailed(script.fail_load or "out of memory", script.oom_load))
            return False
        self._channel.send(Progress(0.5))
        time.sleep(script.load_ms / 1000)
        self._channel.send(Progress(1.0))
        if script.die_unless_no_extra_buffers and load.extra_buffers:
            _die(signal.SIGILL)
        self._n_ctx = load.n_ctx
        self._channel.send(
            Loaded(
                n_ctx=load.n_ctx,
                n_ctx_train=_N_CTX_TRAIN,
                n_vocab=2**31 - 1,
                memory=MemoryReport(),
                template="fake",
                load_seconds=script.load_ms / 1000,
                flash_attn=load.flash_attn,
                carried=_read_carried(load.carried),
            )
        )
        self._reach("loaded")
        return True

    def _take_messages(self, paused: bool) -> bool:
        """Handle what came in; while streams run, for as long as a step takes. Returns whether
        a pause was asked for."""
        busy = bool(self._streams) and not paused
        until = time.monotonic() + self._script.step_ms / 1000 if busy else None
        asked = False
        while True:
            wait = None if until is None else max(until - time.monotonic(), 0.0)
            try:
                message = self.inbox.get(timeout=wait)
            except queue.Empty:
                return asked
            if isinstance(message, Pause) and not self._script.ignore_pause:
                self._channel.send(Paused(self._export(message.export_bytes)))
                return True
            if isinstance(message, CopyAhead):
                self._copy(message.export_bytes)
            elif isinstance(message, TakeAhead):
                self._reach("take_ahead")
                _read_all(message.carried)
                self._channel.send(TakenAhead())
            elif isinstance(message, TakeIn):
                self._reach("take_in")
                self._channel.send(TakenIn(_read_carried(message.carried)))
            elif isinstance(message, Cancel):
                self._streams.pop(message.id, None)
            elif isinstance(message, Generate) and not paused:
                self._start(message)
            if until is None:
                return asked

    def _copy(self, limit_bytes: int) -> None:
        """The same ahead of a pause, as far as half of the limit goes."""
        self._reach("copy")
        for stream in self._streams.values():
            if limit_bytes < 2 * (len(self._copied) + 1) * _STATE_BYTES:
                break
            n_tokens = stream.n_prompt + stream.n_done
            piece = CopiedPiece(_memory_file(n_tokens), _STATE_BYTES)
            self._copied[stream.id] = piece, n_tokens
        pieces = tuple((piece,) for piece, _ in self._copied.values())
        self._channel.send(CopiedAhead(pieces))
        self._reach("copied")

    def _export(self, limit_bytes: int) -> tuple[ExportedState, ...]:
        """A memory file for each stream, which holds nothing but its number of tokens."""
        states: list[ExportedState] = []
        for stream in self._streams.values():
            if limit_bytes < (len(states) + len(self._copied) + 1) * _STATE_BYTES:
                break
            n_tokens = stream.n_prompt + stream.n_done
            state = ExportedState(_memory_file(n_tokens), _STATE_BYTES, n_tokens)
            if stream.id in self._copied:
                piece, n_ahead = self._copied[stream.id]
                state = msgspec.structs.replace(state, ahead=(piece.fd,), n_tokens_ahead=n_ahead)
            states.append(state)
        return tuple(states)

    def _start(self, request: Generate) -> None:
        n_prompt = count_tokens(request.prompt)
        if n_prompt + len(request.resume) + 1 > self._n_ctx:
            n_tokens = n_prompt + len(request.resume)
            self._channel.send(NeedsContext(request.id, n_tokens))
            return
        self._channel.send(Started(request.id, n_prompt, self._script.form))
        stream = _Stream(request, n_prompt, self._n_ctx)
        if self._script.answer:
            stream.n_tokens = len(self._script.answer)
        self._streams[request.id] = stream

    def _step(self) -> None:
        self._n_steps += 1
        if self._n_steps == 1:
            self._reach("first_step")
        self._reach(f"step:{self._n_steps}")
        deltas, ends = [], []
        for stream in list(self._streams.values()):
            if stream.n_done < stream.n_tokens:
                deltas.append(Delta(stream.id, self._word(stream.n_done), (stream.n_done,)))
                stream.n_done += 1
            if stream.n_done >= stream.n_tokens:
                reason: FinishReason = "stop" if self._script.answer else "length"
                ends.append(End(stream.id, reason, stream.n_prompt, stream.n_done))
                del self._streams[stream.id]
        n_cells = sum(stream.n_prompt + stream.n_done for stream in self._streams.values())
        self._channel.send(Step(tuple(deltas), tuple(ends), 0, n_cells))

    def _word(self, index: int) -> str:
        return self._script.answer[index] if self._script.answer else f"w{index} "

    def _reach(self, point: str) -> None:
        script = self._script
        if script.die_at == point and self._dies_now():
            _die(script.signal)
        if script.garbage_at == point:
            self._sock.sendall(_GARBAGE)
            self._hang()
        if script.hang_at == point:
            self._hang()

    def _dies_now(self) -> bool:
        if self._script.die_once_file is None:
            return True
        marker = Path(self._script.die_once_file)
        if marker.exists():
            return False
        marker.touch()
        return True

    def _hang(self) -> NoReturn:
        while True:
            self.inbox.get()


def _memory_file(n_tokens: int) -> int:
    descriptor = os.memfd_create("state")
    os.write(descriptor, n_tokens.to_bytes(_STATE_BYTES, "little"))
    return descriptor


def _read_all(sequences: tuple[tuple[str, ...], ...]) -> list[list[int]]:
    """The numbers of tokens after each file; those of one sequence grow."""
    numbers = [
        [int.from_bytes(Path(path).read_bytes(), "little") for path in paths] for paths in sequences
    ]
    assert all(one == sorted(one) for one in numbers)
    return numbers


def _read_carried(sequences: tuple[tuple[str, ...], ...]) -> CarryReport:
    numbers = _read_all(sequences)
    return CarryReport(
        n_sequences=len(numbers),
        n_tokens=sum(one[-1] for one in numbers),
        n_tokens_ahead=sum(one[-2] for one in numbers if len(one) > 1),
    )


def count_tokens(prompt: Prompt) -> int:
    """Words of a text or of all messages; ids of a token prompt."""
    if isinstance(prompt, ChatPrompt):
        return sum(len(message.content.split()) for message in prompt.messages)
    if isinstance(prompt, TextPrompt):
        return len(prompt.text.split())
    return len(prompt.tokens)


def _die(signal_number: int) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal_number)
    raise SystemExit(1)


def main() -> int:
    """Run the fake; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m kvserve.worker.fake")
    parser.add_argument("--fd", type=int, required=True, help="the inherited socket")
    parser.add_argument("--parent", type=int, help="process id of the daemon")
    parser.add_argument("--script", default="{}", help="a Script as JSON")
    arguments = parser.parse_args()
    die_with_parent(arguments.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    script = msgspec.json.decode(arguments.script, type=Script)
    sock = socket.socket(fileno=arguments.fd)
    channel = WorkerChannel(sock)
    worker = FakeWorker(channel, sock, script)
    start_reader(channel, worker.inbox.put)
    return worker.run()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)
