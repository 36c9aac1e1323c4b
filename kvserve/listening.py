"""The address that a daemon takes, and what is wrong with one that it cannot have."""

import errno
import socket

from kvserve.errors import UsageError

_BACKLOG = 1024
_PORTS_TRIED = 20


def check_host(host: str) -> None:
    """Raise UsageError where `host` is no address of this machine."""
    try:
        _listening_socket(host, 0).close()
    except OSError as error:
        raise _bad_host(host, error) from error


def take_port(host: str, port: int) -> socket.socket:
    """A socket that listens there; 0 takes any free port.

    Raises UsageError where the address cannot be had, with a port that can.
    """
    try:
        return _listening_socket(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = _free_port_after(host, port)
            hint = f"use --port {free}" if free else "use another --port"
            raise UsageError(
                f"port {port} on {host} is in use: {hint}, or `kvserve stop --port {port}` if it "
                "is an old kvserve",
                param="port",
            ) from error
        if error.errno == errno.EACCES:
            raise UsageError(
                f"port {port} may not be used without privileges: use --port 8000 or above",
                param="port",
            ) from error
        raise _bad_host(host, error) from error


def _bad_host(host: str, error: OSError) -> UsageError:
    return UsageError(
        f"--host {host} cannot be listened on ({error.strerror or error}): use 127.0.0.1 for "
        "this machine alone or 0.0.0.0 for every network",
        param="host",
    )


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError:
        sock.close()
        raise
    return sock


def _free_port_after(host: str, port: int) -> int | None:
    for candidate in range(port + 1, min(port + _PORTS_TRIED, 65536)):
        try:
            _listening_socket(host, candidate).close()
        except OSError:
            continue
        return candidate
    return None
