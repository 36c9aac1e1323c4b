"""Frames over a Unix socket pair: a little-endian u32 length, then one msgpack message.

The daemon's end is asyncio, the worker's end is blocking and used from threads. A peer that is
gone reads as end of file (None), never as an exception.
"""

import asyncio
import socket
import threading

import msgspec

from kvserve.ipc.messages import FromWorker, ToWorker

MAX_FRAME_BYTES = 256 * 2**20
_HEADER_BYTES = 4

_encoder = msgspec.msgpack.Encoder()
_to_worker = msgspec.msgpack.Decoder(ToWorker)
_from_worker = msgspec.msgpack.Decoder(FromWorker)


class ProtocolError(Exception):
    """The peer sent something that is no frame of this protocol."""


def encode_frame(message: ToWorker | FromWorker) -> bytes:
    """One message as it goes on the wire. Raises ProtocolError over 256 MiB."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a message of {len(body)} bytes is over the limit of a frame")
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


def _body_length(header: bytes) -> int:
    length = int.from_bytes(header, "little")
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame announces {length} bytes")
    return length


class DaemonChannel:
    """The daemon's end. `receive` is for one reader task; `send` never blocks the event loop."""

    def __init__(self, transport: asyncio.Transport, frames: "_Frames") -> None:
        self._transport = transport
        self._frames = frames

    @classmethod
    async def open(cls, sock: socket.socket) -> "DaemonChannel":
        """Take over the parent's end of a socket pair."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        transport, frames = await loop.create_unix_connection(_Frames, sock=sock)
        return cls(transport, frames)

    def send(self, message: ToWorker) -> None:
        """Queue one message; lost without an error where the worker is gone."""
        if not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    async def first_frame(self) -> None:
        """Return when the first frame has come, or the end. It is still there to be received."""
        await self._frames.begun.wait()

    async def receive(self) -> FromWorker | None:
        """The next message, None at the end of the worker's life. Raises ProtocolError."""
        body = await self._frames.bodies.get()
        if body is None or isinstance(body, ProtocolError):
            self._frames.bodies.put_nowait(body)  # the end stays the end
        if body is None:
            return None
        if isinstance(body, ProtocolError):
            raise body
        try:
            message: FromWorker = _from_worker.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the worker sent an unreadable frame: {error}") from error
        return message

    def close(self) -> None:
        """Close the socket: the worker reads end of file and exits."""
        self._transport.close()


class _Frames(asyncio.Protocol):
    """Cuts the stream into frames as it comes in.

    A worker that dies with unread input resets the connection; asyncio's StreamReader would then
    throw away the frames that had arrived, the worker's last words.
    """

    def __init__(self) -> None:
        self.bodies: asyncio.Queue[bytes | ProtocolError | None] = asyncio.Queue()
        self.begun = asyncio.Event()
        self._buffer = bytearray()
        self._broken = False

    def data_received(self, data: bytes) -> None:
        """Queue every frame that is complete."""
        self._buffer += data
        start = 0
        while not self._broken and len(self._buffer) - start >= _HEADER_BYTES:
            try:
                length = _body_length(bytes(self._buffer[start : start + _HEADER_BYTES]))
            except ProtocolError as error:
                self._broken = True
                self._queue(error)
                break
            end = start + _HEADER_BYTES + length
            if len(self._buffer) < end:
                break
            self._queue(bytes(self._buffer[start + _HEADER_BYTES : end]))
            start = end
        del self._buffer[: len(self._buffer) if self._broken else start]

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the base's name
        """The end, however it came."""
        self._queue(None)

    def _queue(self, body: bytes | ProtocolError | None) -> None:
        self.bodies.put_nowait(body)
        self.begun.set()


class WorkerChannel:
    """The worker's end: blocking, `send` from any thread, `receive` from one."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._reader = sock.makefile("rb", buffering=2**16)
        self._lock = threading.Lock()

    def send(self, message: FromWorker) -> None:
        """Send one message; raises BrokenPipeError or ConnectionError where the daemon is gone."""
        frame = encode_frame(message)
        with self._lock:
            self._sock.sendall(frame)

    def receive(self) -> ToWorker | None:
        """The next message, None where the daemon closed its end. Raises ProtocolError."""
        try:
            header = self._reader.read(_HEADER_BYTES)
            if len(header) < _HEADER_BYTES:
                return None
            length = _body_length(header)
            body = self._reader.read(length)
        except ConnectionError:
            return None
        if len(body) < length:
            return None
        try:
            message: ToWorker = _to_worker.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the daemon sent an unreadable frame: {error}") from error
        return message
