"""Finding stop strings in text that arrives in pieces."""

from collections.abc import Iterable


class StopMatcher:
    """Passes text on, up to the first stop string, and holds back what may begin one.

    The stop string that is complete first wins; of several that are complete at the same
    character, the longest. How the text is cut into pieces makes no difference. One
    Knuth-Morris-Pratt automaton for each string: the cost of a character does not grow with the
    length of a stop string.
    """

    __slots__ = ("_failure", "_held", "_matched", "_stops")

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(sorted({stop for stop in stops if stop}, key=len, reverse=True))
        self._failure = tuple(_failure_table(stop) for stop in self._stops)
        self._matched = [0] * len(self._stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that is safe to show now, and the stop string that was found, if any.

        Nothing may be pushed after a stop string was found.
        """
        if not self._stops:
            return text, None
        pending = self._held + text
        for position, char in enumerate(text, start=len(self._held) + 1):
            found = self._advance(char)
            if found is not None:
                self._held = ""
                return pending[: position - len(found)], found
        n_safe = len(pending) - max(self._matched)
        self._held = pending[n_safe:]
        return pending[:n_safe], None

    def flush(self) -> str:
        """The text held back; for the end of a generation that no stop string ended."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for index, stop in enumerate(self._stops):
            failure = self._failure[index]
            n = self._matched[index]
            while n and stop[n] != char:
                n = failure[n - 1]
            if stop[n] == char:
                n += 1
            if n == len(stop):
                found = found or stop
                n = 0
            self._matched[index] = n
        return found


def _failure_table(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is a suffix of it."""
    table = [0] * len(pattern)
    n = 0
    for index in range(1, len(pattern)):
        while n and pattern[n] != pattern[index]:
            n = table[n - 1]
        if pattern[n] == pattern[index]:
            n += 1
        table[index] = n
    return table
