"""Whether the installed llama-cpp-python is one that this code was tested with."""

import importlib.util
import re
from pathlib import Path

TESTED_FROM = (0, 3, 36)
TESTED_BELOW = (0, 3, 37)


def refusal() -> str | None:
    """Why the installed version cannot be used, in one line; None where it can.

    Its bindings mirror llama.cpp's structs release by release: another version would not fail,
    it would read the wrong fields.
    """
    version = installed()
    if version is None:
        wanted = f">={_dotted(TESTED_FROM)},<{_dotted(TESTED_BELOW)}"
        return f'llama-cpp-python is not installed: pip install "llama-cpp-python{wanted}"'
    return judge(version)


def judge(installed: str) -> str | None:
    """The same for a given version, which may carry a local part such as `+cu124`."""
    release = installed.partition("+")[0].split(".")
    numbers = tuple(int(part) if part.isdigit() else -1 for part in release)
    if TESTED_FROM <= numbers < TESTED_BELOW:
        return None
    wanted = f">={_dotted(TESTED_FROM)},<{_dotted(TESTED_BELOW)}"
    return f'llama-cpp-python {installed} is not supported: pip install "llama-cpp-python{wanted}"'


def installed() -> str | None:
    """The version, read without importing the package: that loads llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return None
    # Its metadata say the same, and take 0.05 s to ask for.
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", Path(spec.origin).read_text())
    return found[1] if found else _named_in_metadata()


def _named_in_metadata() -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
