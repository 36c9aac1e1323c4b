"""The text that is read where the user names none: public domain, see SOURCE.md beside it."""

from importlib import resources
from pathlib import Path

from kvserve.errors import UsageError

BUNDLED = "northanger_abbey.txt"


def read_corpus(path: Path | None) -> str:
    """The text of a UTF-8 file, or the bundled one. Raises UsageError, naming `--corpus`."""
    if path is None:
        return resources.files(__name__).joinpath(BUNDLED).read_text("utf-8")
    try:
        return path.expanduser().read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--corpus {path}: not UTF-8 text (byte {error.start}); convert it first",
            param="corpus",
        ) from error
    except OSError as error:
        raise UsageError(f"--corpus {path}: {error.strerror}", param="corpus") from error
