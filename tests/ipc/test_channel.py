"""Both ends of the channel: framing, broken frames, the other side's death."""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest

from kvserve.ipc import channel as channel_module
from kvserve.ipc.channel import DaemonChannel, ProtocolError, WorkerChannel, encode_frame
from kvserve.ipc.messages import (
    Cancel,
    ChatMessage,
    ChatPrompt,
    Delta,
    End,
    Failed,
    FromWorker,
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
    Sampling,
    Shutdown,
    Started,
    Step,
    TextPrompt,
    Tokenized,
    TokenPrompt,
    ToWorker,
)

TO_WORKER = [
    Load("m.gguf", "q8_0", "q4_0", 4096, 4, 512, 256, 99, 3, True, 4, 8, (0.5, 0.5), False),
    Generate(
        1,
        ChatPrompt((ChatMessage("user", "é\U0001f600", "Ann"),), {"thinking": True}, True),
        Sampling(temperature=0.0, seed=2**63, logit_bias={5: -100.0}),
        max_tokens=9,
        stop=("\n",),
        resume=(1, 2),
    ),
    Generate(2, TextPrompt("a"), Sampling()),
    Generate(3, TokenPrompt((1, 2, 3)), Sampling(), ignore_eos=True, min_tokens=4),
    Cancel(1),
    Pause(),
    Shutdown(),
]
FROM_WORKER = [
    Hello(1, "llama.cpp", "0.3.36", "AVX2 = 1"),
    Progress(0.5),
    Loaded(4096, 8192, 32000, MemoryReport(kv_bytes=1), "model", 0.5, False),
    LoadFailed("no", True),
    Tokenized(1),
    Started(1, 7),
    NeedsContext(1, 9000),
    Step((Delta(1, "hi", (4, 5)),), (End(1, "stop", 7, 2, 0, "\n"),), 3, 12),
    Step(),
    Failed(1, "invalid_request", "no", "prompt"),
    Paused(),
]


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.mark.parametrize("message", TO_WORKER, ids=lambda message: type(message).__name__)
def test_worker_reads_what_the_daemon_sends(pair, message: ToWorker) -> None:
    ours, theirs = pair
    ours.sendall(encode_frame(message))
    assert WorkerChannel(theirs).receive() == message


@pytest.mark.parametrize("message", FROM_WORKER, ids=lambda message: type(message).__name__)
def test_daemon_reads_what_the_worker_sends(pair, message: FromWorker) -> None:
    ours, theirs = pair

    async def receive() -> FromWorker | None:
        daemon = await DaemonChannel.open(ours)
        WorkerChannel(theirs).send(message)
        received = await daemon.receive()
        daemon.close()
        return received

    assert asyncio.run(receive()) == message


def test_frames_may_arrive_byte_by_byte(pair) -> None:
    ours, theirs = pair
    stream = b"".join(encode_frame(message) for message in TO_WORKER)

    def trickle() -> None:
        for index in range(len(stream)):
            ours.send(stream[index : index + 1])

    sender = threading.Thread(target=trickle)
    sender.start()
    worker = WorkerChannel(theirs)
    assert [worker.receive() for _ in TO_WORKER] == TO_WORKER
    sender.join()


def test_frames_from_many_threads_stay_whole(pair) -> None:
    ours, theirs = pair
    sender, reader = WorkerChannel(theirs), ours.makefile("rb")
    text = "x" * 10_000

    def send_some(request: int) -> None:
        for _ in range(50):
            sender.send(Step((Delta(request, text, ()),)))

    threads = [threading.Thread(target=send_some, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    seen = [0] * 4
    for _ in range(200):
        body = reader.read(int.from_bytes(reader.read(4), "little"))
        message = channel_module._from_worker.decode(body)
        seen[message.deltas[0].id] += 1
    for thread in threads:
        thread.join()
    reader.close()
    assert seen == [50] * 4


@pytest.mark.parametrize("left", [0, 2, 4, 9])
def test_a_peer_that_is_gone_reads_as_end_of_file(pair, left: int) -> None:
    """Also in the middle of a header or of a body."""
    ours, theirs = pair
    ours.sendall(encode_frame(Cancel(1))[:left])
    ours.close()
    assert WorkerChannel(theirs).receive() is None


@pytest.mark.parametrize("left", [0, 2, 4, 9])
def test_a_dead_worker_reads_as_end_of_file(pair, left: int) -> None:
    ours, theirs = pair

    async def receive() -> FromWorker | None:
        daemon = await DaemonChannel.open(ours)
        theirs.sendall(encode_frame(Started(1, 2))[:left])
        theirs.close()
        received = await daemon.receive()
        daemon.close()
        return received

    assert asyncio.run(receive()) is None


@pytest.mark.parametrize(
    "frame",
    [
        b"\xff\xff\xff\xff",
        b"\x05\x00\x00\x00hello",
        b"\x00\x00\x00\x00",
        encode_frame(Paused()),
    ],
    ids=["too long", "no message", "empty", "the other side's message"],
)
def test_worker_refuses_broken_frames(pair, frame: bytes) -> None:
    ours, theirs = pair
    ours.sendall(frame)
    with pytest.raises(ProtocolError):
        WorkerChannel(theirs).receive()


@pytest.mark.parametrize(
    "frame",
    [b"\xff" * 64, b"\x05\x00\x00\x00hello", encode_frame(Pause())],
    ids=["too long", "no message", "the other side's message"],
)
def test_daemon_refuses_broken_frames(pair, frame: bytes) -> None:
    ours, theirs = pair

    async def receive() -> None:
        daemon = await DaemonChannel.open(ours)
        theirs.sendall(frame)
        try:
            await daemon.receive()
        finally:
            daemon.close()

    with pytest.raises(ProtocolError):
        asyncio.run(receive())


def test_sending_to_a_dead_worker_is_no_error(pair) -> None:
    ours, theirs = pair

    async def send() -> None:
        daemon = await DaemonChannel.open(ours)
        theirs.close()
        assert await daemon.receive() is None
        daemon.send(Cancel(1))
        daemon.close()
        daemon.send(Cancel(2))

    asyncio.run(send())


def test_a_message_over_the_limit_is_refused() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        encode_frame(Failed(1, "c", "x" * (channel_module.MAX_FRAME_BYTES + 1)))


def test_the_last_words_of_a_worker_that_left_input_unread_arrive() -> None:
    # Its death resets the connection; what it had sent must still be read.
    async def story() -> list[FromWorker | None]:
        ours, theirs = socket.socketpair()
        daemon = await DaemonChannel.open(ours)
        daemon.send(Shutdown())
        await asyncio.sleep(0)
        theirs.sendall(b"".join(encode_frame(Progress(n / 4)) for n in range(3)))
        theirs.sendall(encode_frame(LoadFailed("no", True)))
        theirs.close()
        received = [await daemon.receive() for _ in range(6)]
        daemon.close()
        return received

    received = asyncio.run(story())
    assert received[:4] == [Progress(0.0), Progress(0.25), Progress(0.5), LoadFailed("no", True)]
    assert received[4:] == [None, None]
