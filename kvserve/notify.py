"""Telling systemd where the daemon stands: one datagram for each change, see sd_notify(3).

Without `NOTIFY_SOCKET` in the environment nothing is sent. No failure to tell is an error: the
daemon serves whether or not anybody listens. What must arrive tells whether it was sent.
"""

import os
import socket
import time
from collections.abc import Mapping, MutableMapping


class Notifier:
    """A connection to the service manager. Create it with `Notifier.from_environment`.

    `watchdog_seconds` is the longest silence that the manager allows, None where it does not
    watch.
    """

    def __init__(self, address: str | None, watchdog_seconds: float | None = None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._socket: socket.socket | None = None
        if not address:
            return
        # A leading @ stands for the zero byte of an abstract socket.
        path = f"\0{address[1:]}" if address.startswith("@") else address
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            return
        sock.setblocking(False)
        self._socket = sock

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> "Notifier":
        """Take the manager's variables, and take them away: they are not for the workers."""
        address = environ.pop("NOTIFY_SOCKET", None)
        return cls(address, _watchdog_seconds(environ))

    @property
    def connected(self) -> bool:
        """Whether somebody listens."""
        return self._socket is not None

    def ready(self, status: str) -> bool:
        """The daemon answers requests, for the first time or again."""
        return self._send("READY=1", f"STATUS={_line(status)}")

    def reloading(self, status: str) -> bool:
        """The worker is being replaced; `ready` follows."""
        microseconds = time.monotonic_ns() // 1000
        return self._send(
            "RELOADING=1", f"MONOTONIC_USEC={microseconds}", f"STATUS={_line(status)}"
        )

    def stopping(self) -> None:
        """The daemon ends."""
        self._send("STOPPING=1", "STATUS=running requests finish")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(f"STATUS={_line(text)}")

    def alive(self) -> None:
        """A sign of life, due at least every `watchdog_seconds`."""
        self._send("WATCHDOG=1")

    def close(self) -> None:
        """Let the socket go; whatever follows is not sent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, *lines: str) -> bool:
        """Whether it was sent: a manager that is far behind has no room for it."""
        if self._socket is None:
            return False
        try:
            self._socket.send("\n".join(lines).encode())
        except OSError:
            return False
        return True


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    """From `WATCHDOG_USEC`, where `WATCHDOG_PID` is this process or not given."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdecimal()) or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6


def _line(text: str) -> str:
    return " ".join(text.split())
