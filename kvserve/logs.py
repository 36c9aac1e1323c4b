"""Logging: structlog events to stderr, and as JSON lines to a bounded file; no secret in either.

Configured once for each process with `configure_logs`. Modules log through
`structlog.get_logger()`; records of the standard library, uvicorn's too, take the same way.
"""

import io
import json
import logging
import logging.handlers
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from kvserve.errors import UsageError

_N_OLD_FILES = 3
_MASK = "[hidden]"
_SECRET_FIELDS = frozenset(
    {
        "admin_key",
        "api_key",
        "api_keys",
        "authorization",
        "cookie",
        "password",
        "proxy_authorization",
        "secret",
    }
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[^\s\"',;]+")
_UVICORN = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")

Form = Literal["auto", "console", "json"]


def configure_logs(
    *,
    level: str,
    form: Form,
    file: Path | None,
    secrets: Iterable[str] = (),
    stream: TextIO | None = None,
    file_bytes: int = 10 * 2**20,
) -> None:
    """Send all logging of this process to `stream` (stderr) and, as JSON lines, to `file`.

    `level` is debug, info, warning or error. `auto` is the console form where the stream is a
    terminal, else JSON. A file that reaches `file_bytes` is put aside, and three old ones are kept.
    An event with `file_only=True` is not sent to the stream. `secrets` are texts that never appear,
    whatever field or message they come in. Called again, it replaces what it set before. Start
    uvicorn with `log_config=None`. Raises UsageError where the file cannot be written.
    """
    stream = sys.stderr if stream is None else stream
    secrets = tuple(secrets)
    console = form == "console" or (form == "auto" and stream.isatty())
    to_stream = logging.StreamHandler(stream)
    to_stream.setFormatter(
        _Redacting(_console(stream.isatty()) if console else _json_lines(), secrets)
    )
    to_stream.addFilter(_ForStream())
    handlers: list[logging.Handler] = [to_stream]
    if file is not None:
        to_file = _open_file(file, file_bytes)
        to_file.setFormatter(_Redacting(_json_lines(), secrets))
        handlers.append(to_file)
    close_logs()
    root = logging.getLogger()
    for handler in handlers:
        handler.addFilter(_OURS)
        root.addHandler(handler)
    root.setLevel(level.upper())
    for name in _UVICORN:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def open_private(path: Path) -> BinaryIO:
    """Open a file to append to that its owner alone may read, whatever the umask; one that was
    open to others is closed to them."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "ab")


def close_logs() -> None:
    """Take back what `configure_logs` set, and close the file."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if _OURS in handler.filters]:
        root.removeHandler(handler)
        handler.close()
    structlog.reset_defaults()


class _ForStream(logging.Filter):
    """Lets through what is not marked `file_only`: what a terminal is told in another way."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (isinstance(record.msg, dict) and record.msg.get("file_only"))


def _drop_mark(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.pop("file_only", None)
    return event


class _Pass(logging.Filter):
    """Lets every record through; it marks the handlers that are this module's."""


_OURS = _Pass()


class _PrivateFileHandler(logging.handlers.RotatingFileHandler):
    """Each file that it begins is its owner's alone."""

    def _open(self) -> io.TextIOWrapper:
        return io.TextIOWrapper(open_private(Path(self.baseFilename)), encoding=self.encoding)


class _Redacting(logging.Formatter):
    """Formats with another formatter, then hides the secrets, in tracebacks too."""

    def __init__(self, inner: logging.Formatter, secrets: tuple[str, ...]) -> None:
        super().__init__()
        self._inner = inner
        # A JSON line holds a secret in its escaped form.
        forms = {form for text in secrets for form in (text, json.dumps(text)[1:-1])}
        self._secrets = tuple(sorted(filter(None, forms), key=len, reverse=True))

    def format(self, record: logging.LogRecord) -> str:
        line = _BEARER.sub(rf"\1{_MASK}", self._inner.format(record))
        for secret in self._secrets:
            line = line.replace(secret, _MASK)
        return line


def _hide_secret_fields(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    for key in event:
        if key.lower().replace("-", "_") in _SECRET_FIELDS:
            event[key] = _MASK
    return event


_SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_logger_name,
    structlog.stdlib.add_log_level,
    structlog.stdlib.PositionalArgumentsFormatter(),
    structlog.stdlib.ExtraAdder(),
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.StackInfoRenderer(),
    _hide_secret_fields,
]


def _formatter(*renderers: Processor) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            _drop_mark,
            *renderers,
        ],
    )


def _json_lines() -> logging.Formatter:
    return _formatter(
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(serializer=_dumps),
    )


def _dumps(event: EventDict, **options: Any) -> str:
    return json.dumps(event, ensure_ascii=False, **options)


def _console(colors: bool) -> logging.Formatter:
    return _formatter(
        structlog.dev.ConsoleRenderer(
            colors=colors, exception_formatter=structlog.dev.plain_traceback
        )
    )


def _open_file(path: Path, file_bytes: int) -> logging.Handler:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _PrivateFileHandler(
            path, maxBytes=file_bytes, backupCount=_N_OLD_FILES, encoding="utf-8"
        )
    except OSError as error:
        raise UsageError(
            f"--state-dir: cannot write {path}: {error.strerror}: name a directory of your own",
            param="state_dir",
        ) from None
