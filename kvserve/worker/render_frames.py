"""What the worker and its template process say to each other, over one socket."""

import socket
import time

import msgspec

_HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 * 2**20


class Render(msgspec.Struct, frozen=True):
    """Render `source` with `variables`; an output over `max_chars` is an error."""

    source: str
    variables: dict[str, object]
    max_chars: int


class Answer(msgspec.Struct, frozen=True):
    """The text, or one line that says what is wrong with the template or its input."""

    text: str | None = None
    error: str | None = None


def send(sock: socket.socket, message: Render | Answer) -> None:
    """Send one frame. Raises OSError, TimeoutError included."""
    body = msgspec.msgpack.encode(message)
    sock.sendall(len(body).to_bytes(_HEADER_BYTES, "little") + body)


def receive(sock: socket.socket, deadline: float | None = None) -> bytes | None:
    """The next frame's body, None at the end of the connection.

    `deadline` is on `time.monotonic`'s clock, None waits for ever. Raises TimeoutError after it,
    other OSErrors, and ValueError for a frame that is too large.
    """
    header = _read(sock, _HEADER_BYTES, deadline)
    if header is None:
        return None
    length = int.from_bytes(header, "little")
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame announces {length} bytes")
    return _read(sock, length, deadline)


def _read(sock: socket.socket, n_bytes: int, deadline: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < n_bytes:
        if deadline is not None:
            # Anew for each piece: a socket's own timeout starts again with every byte.
            sock.settimeout(max(deadline - time.monotonic(), 1e-3))
        piece = sock.recv(min(n_bytes - len(data), 2**20))
        if not piece:
            return None
        data += piece
    return bytes(data)
