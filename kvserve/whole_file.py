"""Files that are replaced whole or not at all: written beside their place, then renamed."""

import contextlib
import os
import secrets
from pathlib import Path


def replace_file(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Put `data` in the place of whatever is at `path`; `mode` has the umask taken off.

    A reader sees the old contents or the new ones, after a loss of power too, and of writers at
    the same time one wins. The folder is made where it is missing. Raises OSError; the old file
    stands then, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise
