"""Byte quantities: parsed from what people type, printed in binary units.

Everything inside kvserve counts integer bytes; GiB (2**30) appears only in text.
"""

import re

KIB = 2**10
MIB = 2**20
GIB = 2**30

_FACTORS = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
_LARGEST = 2**63 - 1


def parse_bytes(text: str) -> int:
    """Turn `7.6GiB`, `512M`, `8gb` or `1048576` into bytes.

    A bare letter is binary (`G` is GiB), as llama.cpp and systemd read it; `GB` is 10**9.
    Raises ValueError, with the accepted spellings, for anything else.
    """
    match = _QUANTITY.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size: write it as 7.6GiB, 512MiB or a number of bytes")
    whole, _, fraction = match[1].partition(".")
    scale = int("1" + "0" * len(fraction))
    size_bytes = int(whole + fraction) * factor // scale
    if size_bytes > _LARGEST:
        raise ValueError(f"{text!r} is more than any machine holds")
    return size_bytes


def format_bytes(size_bytes: int) -> str:
    """Print bytes for people: `7.60 GiB`, `939 MiB`, `12 KiB`, `0 B`, `-1 MiB`."""
    magnitude = abs(size_bytes)
    if magnitude >= GIB:
        return f"{size_bytes / GIB:.2f} GiB"
    if magnitude >= MIB:
        return f"{size_bytes / MIB:.0f} MiB"
    if magnitude >= KIB:
        return f"{size_bytes / KIB:.0f} KiB"
    return f"{size_bytes} B"


def format_gib(size_bytes: int) -> str:
    """Print bytes as GiB with two decimals and no unit, for table columns."""
    return f"{size_bytes / GIB:.2f}"
