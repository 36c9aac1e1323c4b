"""The error taxonomy: every failure kvserve reports is one of these classes.

Each class fixes its `code` (the OpenAI `error.code`), its HTTP status, the OpenAI `error.type`
and the process exit code; `api/errors.py` and `cli/` are the only places that translate.
"""

from collections.abc import Iterator
from typing import ClassVar


class KvserveError(Exception):
    """A failure with a message for the user, who can act on it.

    `message` names the problem and the nearest thing that works, in one line. `param` is the
    request field or the flag it is about. `retry_after` is in seconds, None where a retry is
    pointless.
    """

    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    error_type: ClassVar[str] = "server_error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self, message: str, *, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(KvserveError):
    """A request field is missing, malformed or out of range."""

    code = "invalid_request"
    http_status = 400
    error_type = "invalid_request_error"
    exit_code = 2


class Unsupported(InvalidRequest):
    """A field of the OpenAI API that this server does not implement."""

    code = "unsupported_parameter"


class ContextLengthExceeded(InvalidRequest):
    """A prompt and its answer need more tokens than any context that can be had."""

    code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    """A request names a model that this daemon does not serve."""

    code = "model_not_found"
    http_status = 404


class Unauthorized(KvserveError):
    """No API key, or a wrong one."""

    code = "invalid_api_key"
    http_status = 401
    error_type = "authentication_error"


class Forbidden(KvserveError):
    """The request comes from where it may not come from, such as a foreign Host header."""

    code = "forbidden"
    http_status = 403
    error_type = "invalid_request_error"


class UsageError(KvserveError):
    """A flag, an environment variable or a settings file is wrong."""

    code = "invalid_settings"
    http_status = 400
    error_type = "invalid_request_error"
    exit_code = 2


class BadModelFile(UsageError):
    """The model file is missing, unreadable, truncated, hostile or no GGUF."""

    code = "bad_model_file"


class DoesNotFit(KvserveError):
    """No allowed setting fits the free memory. `options` are the nearest ones, one line each."""

    code = "does_not_fit"
    http_status = 409
    error_type = "invalid_request_error"
    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        needed_bytes: int,
        free_bytes: int,
        options: tuple[str, ...] = (),
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.options = options


class Overloaded(KvserveError):
    """The queue is full."""

    code = "queue_full"
    http_status = 429
    error_type = "rate_limit_error"


class NotReady(KvserveError):
    """No worker serves at the moment, and the request did not wait or waited too long."""

    code = "not_ready"
    http_status = 503


class DeadlineExceeded(KvserveError):
    """The request spent its time limit before its answer was complete."""

    code = "deadline_exceeded"
    http_status = 504


class WorkerFailed(KvserveError):
    """The worker process died, hung or could not load the model."""

    code = "worker_failed"
    http_status = 503
    exit_code = 4


class ReloadInProgress(KvserveError):
    """Another reload is under way."""

    code = "reload_in_progress"
    http_status = 409


class BelowFloor(KvserveError):
    """No plan that can be had has KV types good enough for the request's task."""

    code = "kv_floor_unavailable"
    http_status = 409


def revive(
    code: str,
    message: str,
    *,
    param: str | None = None,
    needed_bytes: int = 0,
    free_bytes: int = 0,
    options: tuple[str, ...] = (),
) -> KvserveError:
    """The error that another process told of by its code; KvserveError for an unknown one."""
    if code == DoesNotFit.code:
        return DoesNotFit(
            message,
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
            options=options,
            param=param,
        )
    by_code = {cls.code: cls for cls in _all_errors(KvserveError)}
    return by_code.get(code, KvserveError)(message, param=param)


def _all_errors(base: type[KvserveError]) -> Iterator[type[KvserveError]]:
    for cls in base.__subclasses__():
        yield cls
        yield from _all_errors(cls)
