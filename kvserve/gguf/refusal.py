"""How this room says no: one line that names the file, the fault and the nearest fix."""

from pathlib import Path

from kvserve.errors import BadModelFile

DOWNLOAD_AGAIN = "download it again"
CONVERT_AGAIN = "convert the model again with a current llama.cpp"

_LONGEST_SHOWN = 96


def bad_file(path: Path, problem: str) -> BadModelFile:
    """Build the error for `path`; `problem` goes on from the name, as in "is truncated: ..."."""
    return BadModelFile(f"{_escaped(str(path))} {problem}", param="model")


def shown(text: str) -> str:
    """Quote a name out of an untrusted file: control characters escaped, long names cut."""
    if len(text) > _LONGEST_SHOWN:
        text = text[:_LONGEST_SHOWN] + "…"
    return f"'{_escaped(text)}'"


def _escaped(text: str) -> str:
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "replace").decode("ascii")
        for char in text
    )
