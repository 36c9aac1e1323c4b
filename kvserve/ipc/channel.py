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

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, sock: socket.socket) -> "DaemonChannel":
        """Take over the parent's end of a socket pair."""
        sock.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=sock, limit=2**20)
        return cls(reader, writer)

    def send(self, message: ToWorker) -> None:
        """Queue one message; lost without an error where the worker is gone."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def receive(self) -> FromWorker | None:
        """The next message, None at the end of the worker's life. Raises ProtocolError."""
        try:
            header = await self._reader.readexactly(_HEADER_BYTES)
            body = await self._reader.readexactly(_body_length(header))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        try:
            message: FromWorker = _from_worker.decode(body)
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"the worker sent an unreadable frame: {error}") from error
        return message

    def close(self) -> None:
        """Close the socket: the worker reads end of file and exits."""
        self._writer.close()


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
