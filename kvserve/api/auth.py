"""Who may ask: API keys, and protection from web pages for a server on a loopback address.

With API keys, everything but `/health*` needs one as `Authorization: Bearer KEY`. `/admin/*` takes
the admin keys and the admin token; the API keys too where there is no admin key, and nothing at
all on a loopback address without any key. `/metrics` takes every key. On a loopback address the
`Host` header must name that address (a page whose DNS name was rebound to 127.0.0.1 sends its own
name), and no request may come from a page of another site (`Origin`).
"""

import hashlib
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kvserve.api.config import ApiConfig
from kvserve.api.errors import error_response
from kvserve.errors import Forbidden, KvserveError, Unauthorized

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class AccessMiddleware:
    """Answers 401 or 403 before a byte of the body is read."""

    def __init__(self, app: ASGIApp, config: ApiConfig) -> None:
        self._app = app
        self._local_only = config.local_only
        self._keys = _digests(config.api_keys)
        self._admin_keys = _digests(config.admin_keys) or self._keys
        self._admin_is_open = config.local_only and not self._admin_keys
        if config.admin_token:
            self._admin_keys += _digests((config.admin_token,))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] == "http":
            error = self._refusal(scope["path"], Headers(scope=scope))
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Headers) -> KvserveError | None:
        if self._local_only:
            error = _from_elsewhere(headers)
            if error is not None:
                return error
        if path in OPEN_PATHS:
            return None
        if path == "/admin" or path.startswith("/admin/"):
            return None if self._admin_is_open else _wrong_key(headers, self._admin_keys)
        if not self._keys:
            return None
        return _wrong_key(headers, self._keys + (self._admin_keys if path == "/metrics" else ()))


def _from_elsewhere(headers: Headers) -> Forbidden | None:
    hosts = headers.getlist("host")
    if len(hosts) != 1 or _host_name(f"//{hosts[0]}") not in _LOCAL_NAMES:
        return Forbidden("this server answers to the names localhost, 127.0.0.1 and [::1] only")
    for origin in headers.getlist("origin"):
        if _host_name(origin) not in _LOCAL_NAMES:
            return Forbidden("a page of another site may not call this server")
    return None


def _wrong_key(headers: Headers, accepted: tuple[bytes, ...]) -> Unauthorized | None:
    values = headers.getlist("authorization")
    if not values:
        return Unauthorized("an API key is needed: send it as Authorization: Bearer KEY")
    scheme, _, key = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer":
        return Unauthorized("one Authorization header is needed, of the form Bearer KEY")
    # ASGI headers are bytes that Starlette reads as Latin-1. Digests of equal length, all of them
    # compared, so that the time tells nothing about a key or its length.
    offered = _digest(key.strip().encode("latin-1"))
    matches = [hmac.compare_digest(offered, digest) for digest in accepted]
    return None if any(matches) else Unauthorized("the API key is wrong")


def _digests(keys: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(_digest(key.encode()) for key in keys)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _host_name(url: str) -> str | None:
    """The host of a URL in lower case, without port, brackets or user; None where it has none."""
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  a port that is no number raises
    except ValueError:
        return None
    if parts.path or parts.query or parts.fragment or parts.username is not None:
        return None
    return parts.hostname
