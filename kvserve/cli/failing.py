"""Errors on their way to the terminal: one line on stderr and the exit code of their class."""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import typer

from kvserve.errors import DoesNotFit, KvserveError, UsageError

P = ParamSpec("P")


def explained(command: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that a KvserveError prints as one line and exits with its code."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KvserveError as error:
            report(error, as_json=bool(kwargs.get("as_json")))
            raise typer.Exit(error.exit_code) from error
        except BrokenPipeError as error:
            sys.stderr.close()  # or Python reports the same pipe once more at exit
            raise typer.Exit(1) from error

    return wrapped


def report(error: KvserveError, *, as_json: bool = False) -> None:
    """Print the error: one line, and the nearest options where nothing fits."""
    options = error.options if isinstance(error, DoesNotFit) else ()
    if as_json:
        body = {"message": error.message, "code": error.code, "param": error.param}
        print(json.dumps({"error": {**body, "options": list(options)}}), file=sys.stderr)
        return
    print(f"kvserve: {error.message}", file=sys.stderr)


def writable(path: Path, flag: str) -> None:
    """Look whether a report can be written there, before work is done for it. Nothing is left
    there, and a file that is there stays as it is. Raises UsageError, naming the flag."""
    place = path.expanduser()
    try:
        was_there = place.exists()
        place.open("a").close()
        if not was_there:
            place.unlink()
    except OSError as error:
        raise UsageError(
            f"--{flag} {path}: {error.strerror}: name a file that can be written", param=flag
        ) from error
