"""Whether the installed llama-cpp-python is one that this code was tested with."""

import importlib.metadata

TESTED_FROM = (0, 3, 36)
TESTED_BELOW = (0, 3, 37)


def refusal() -> str | None:
    """Why the installed version cannot be used, in one line; None where it can.

    Its bindings mirror llama.cpp's structs release by release: another version would not fail,
    it would read the wrong fields.
    """
    wanted = f">={_dotted(TESTED_FROM)},<{_dotted(TESTED_BELOW)}"
    try:
        installed = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return f'llama-cpp-python is not installed: pip install "llama-cpp-python{wanted}"'
    return judge(installed)


def judge(installed: str) -> str | None:
    """The same for a given version, which may carry a local part such as `+cu124`."""
    release = installed.partition("+")[0].split(".")
    numbers = tuple(int(part) if part.isdigit() else -1 for part in release)
    if TESTED_FROM <= numbers < TESTED_BELOW:
        return None
    wanted = f">={_dotted(TESTED_FROM)},<{_dotted(TESTED_BELOW)}"
    return (
        f"llama-cpp-python {installed} is not supported: "
        f'pip install "llama-cpp-python{wanted}"'
    )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
