"""Models that gguf-split has cut into parts: name-00001-of-00003.gguf and so on."""

import re
from pathlib import Path
from typing import Final

from kvserve.gguf.header import Header, read_header
from kvserve.gguf.metadata import Metadata
from kvserve.gguf.refusal import DOWNLOAD_AGAIN, bad_file, shown

MAX_PARTS: Final = 1024

_PART_NAME: Final = re.compile(r"(?P<stem>.+)-(?P<part>[0-9]{5})-of-(?P<parts>[0-9]{5})\.gguf")
_NAMES_SHOWN: Final = 4


def read_parts(path: Path) -> tuple[Header, ...]:
    """Read the headers of a whole model, in order, from the path of the file or of any part.

    Raises BadModelFile for a part that is missing, out of place, or of another model.
    """
    given = read_header(path)
    n_parts = _n_parts(given)
    if n_parts == 1:
        return (given,)
    paths = part_paths(path, n_parts)
    missing = [part for part in paths if part != path and not part.exists()]
    if missing:
        names = ", ".join(part.name for part in missing[:_NAMES_SHOWN])
        more = f" and {len(missing) - _NAMES_SHOWN} more" if len(missing) > _NAMES_SHOWN else ""
        raise bad_file(
            path,
            f"is one of {n_parts} parts, and {len(missing)} are missing beside it ({names}{more}): "
            "download them into the same directory",
        )
    headers = tuple(given if part == path else read_header(part) for part in paths)
    for place, header in enumerate(headers):
        _check_part(header, place, n_parts)
    _check_tensors(headers)
    return headers


def part_paths(path: Path, n_parts: int) -> tuple[Path, ...]:
    """Name all parts from the path of one.

    Raises BadModelFile where the name is not one that gguf-split gives.
    """
    match = _PART_NAME.fullmatch(path.name)
    if match is None or int(match["parts"]) != n_parts:
        raise bad_file(
            path,
            f"is one of {n_parts} parts, and its name does not end in "
            f"-00001-of-{n_parts:05}.gguf: give all parts their names back",
        )
    return tuple(
        path.with_name(f"{match['stem']}-{part:05}-of-{n_parts:05}.gguf")
        for part in range(1, n_parts + 1)
    )


def _n_parts(header: Header) -> int:
    n_parts = _split_metadata(header).natural("split.count") or 1
    if n_parts > MAX_PARTS:
        raise bad_file(header.path, f"claims {n_parts:,} parts; it is damaged, {DOWNLOAD_AGAIN}")
    return n_parts


def _check_part(header: Header, place: int, n_parts: int) -> None:
    number = _split_metadata(header).natural("split.no")
    if number != place or _n_parts(header) != n_parts:
        claim = "no part" if number is None else f"part {number + 1} of {_n_parts(header)}"
        raise bad_file(
            header.path,
            f"is {claim} inside, and part {place + 1} of {n_parts} by its name: {DOWNLOAD_AGAIN}",
        )


def _check_tensors(headers: tuple[Header, ...]) -> None:
    names: set[str] = set()
    for header in headers:
        for tensor in header.tensors:
            if tensor.name in names:
                raise bad_file(
                    header.path,
                    f"has tensor {shown(tensor.name)}, which an earlier part has too: "
                    "the parts are of different models",
                )
            names.add(tensor.name)
    expected = _split_metadata(headers[0]).natural("split.tensors.count")
    if expected is not None and expected != len(names):
        raise bad_file(
            headers[0].path,
            f"promises {expected:,} tensors, and its parts have {len(names):,}: "
            "the parts are of different models",
        )


def _split_metadata(header: Header) -> Metadata:
    return Metadata(header.path, "", header.values)
