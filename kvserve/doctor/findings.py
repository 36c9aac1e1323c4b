"""What the doctor says: one finding for each thing looked at."""

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is: as it should be, worth knowing, or in the way."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: what was found, why it matters, what to do about it. Both
    reasons are there for everything that is not OK."""

    level: Level
    check: str
    what: str
    why: str | None = None
    remedy: str | None = None


def ok(check: str, what: str) -> Finding:
    """As it should be."""
    return Finding(Level.OK, check, what)


def note(check: str, what: str, why: str, remedy: str) -> Finding:
    """Worth knowing."""
    return Finding(Level.NOTE, check, what, why, remedy)


def problem(check: str, what: str, why: str, remedy: str) -> Finding:
    """In the way."""
    return Finding(Level.PROBLEM, check, what, why, remedy)
