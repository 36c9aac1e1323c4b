"""A text that arrives in pieces, read by generators that yield where they need more of it.

Every decision is taken only when no further text could change it, so it makes no difference how the
text is cut into pieces.
"""

import re
from collections.abc import Callable, Generator

Reading = Generator[None, None, None]
Found = Generator[None, None, str | None]
Tell = Callable[[str], None]

MOST_HELD = 64 * 1024
"""Characters of what may become a call that are held back; what is longer is plain text."""
MOST_HEAD = 512
"""Characters in which a call's name must have come."""

_STRUCTURE = re.compile(r'["\\{}\[\]]')
_IN_STRING = re.compile(r'["\\]')


class Tape:
    """The text that has come and was not read yet. `over` once no more will come."""

    def __init__(self) -> None:
        self.text = ""
        self.over = False

    def take(self, n: int) -> str:
        """Read the next `n` characters."""
        taken, self.text = self.text[:n], self.text[n:]
        return taken

    def until(self, marks: tuple[str, ...], tell: Tell) -> Found:
        """Tell the text up to the first of `marks`; the mark, read too, or None at the end.

        No mark may begin another one.
        """
        while True:
            place, mark = _first(self.text, marks)
            if mark is not None:
                tell(self.take(place))
                return self.take(len(mark))
            tell(self.take(len(self.text) - (0 if self.over else _held(self.text, marks))))
            if self.over:
                return None
            yield

    def collect(
        self, marks: tuple[str, ...], limit: int = MOST_HELD
    ) -> Generator[None, None, tuple[str, str | None]]:
        """The text up to the first of `marks`, and the mark, read too; None where it does not come
        within `limit` characters or before the end."""
        longest = max(map(len, marks))
        seen = 0
        while True:
            place, mark = _first(self.text, marks, max(0, seen - longest))
            if mark is not None and place <= limit:
                return self.take(place), self.take(len(mark))
            if mark is not None or len(self.text) >= limit + longest:
                return self.take(limit), None
            if self.over:
                return self.take(min(limit, len(self.text))), None
            seen = len(self.text)
            yield

    def head(
        self, pattern: re.Pattern[str], stops: tuple[str, ...] = ()
    ) -> Generator[None, None, re.Match[str] | None]:
        """The match of `pattern` at the very beginning, read too, within MOST_HEAD characters and
        before any of `stops`.

        What the pattern matches must not depend on what comes after it.
        """
        while True:
            place, mark = _first(self.text, stops) if stops else (0, None)
            end = min(MOST_HEAD, len(self.text) if mark is None else place)
            match = pattern.match(self.text, 0, end)
            if match is not None:
                self.take(match.end())
                return match
            if mark is not None or self.over or len(self.text) >= MOST_HEAD:
                return None
            yield

    def begins(self, *marks: str) -> Found:
        """Which of `marks` comes next, blanks aside; nothing is read."""
        while True:
            text = self.text.lstrip()
            if len(self.text) - len(text) > MOST_HEAD:
                return None
            for mark in marks:
                if text.startswith(mark):
                    return mark
            if self.over or (text and not any(mark.startswith(text) for mark in marks)):
                return None
            yield

    def value(self, tell: Tell) -> Reading:
        """Tell one JSON object or list, whose bracket comes next, up to its end."""
        depth, quoted = 0, False
        while True:
            place, ended = 0, False
            while not ended:
                match = (_IN_STRING if quoted else _STRUCTURE).search(self.text, place)
                if match is None:
                    place = len(self.text)
                    break
                char = match[0]
                place = match.end()
                if char == "\\":
                    if place == len(self.text) and not self.over:
                        place -= 1
                        break
                    place = min(place + 1, len(self.text))
                elif char == '"':
                    quoted = not quoted
                else:
                    depth += 1 if char in "{[" else -1
                    ended = depth <= 0
            tell(self.take(place))
            if ended or self.over:
                return
            yield


def _first(text: str, marks: tuple[str, ...], start: int = 0) -> tuple[int, str | None]:
    """Where the first mark is, and which."""
    best: tuple[int, str | None] = (len(text), None)
    for mark in marks:
        place = text.find(mark, start)
        if 0 <= place < best[0]:
            best = (place, mark)
    return best


def _held(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end may begin a mark."""
    longest = max(map(len, marks)) - 1
    for n in range(min(longest, len(text)), 0, -1):
        end = text[-n:]
        if any(mark.startswith(end) for mark in marks):
            return n
    return 0
