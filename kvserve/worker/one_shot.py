"""How short-lived processes answer: JSON lines on stdout, or one line on stderr and status 1."""

import os
import sys
from typing import NoReturn

import msgspec


def write(answer: msgspec.Struct) -> None:
    """Send one answer."""
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def fail(message: str, status: int = 1) -> int:
    """Say why there is no answer; returns the exit status."""
    print((message.splitlines() or ["unknown error"])[0], file=sys.stderr, flush=True)
    return status


def leave(status: int) -> NoReturn:
    """End the process: native libraries' own clean-up may crash after the answers are out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
