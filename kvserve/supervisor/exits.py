"""How a worker process ended, in words."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Exit:
    """How a worker process ended: its return code (negative: the signal), and its last words.
    `killed_for` is why the daemon killed it, where it did."""

    returncode: int
    last_words: str
    killed_for: str | None = None

    @property
    def cause(self) -> str:
        """The end in words, for messages and metrics."""
        if self.killed_for is not None:
            return self.killed_for
        if self.returncode < 0:
            return _SIGNALS.get(-self.returncode, f"signal {-self.returncode}")
        return f"exit status {self.returncode}"


_SIGNALS = {
    4: "SIGILL (an instruction this CPU does not have)",
    6: "SIGABRT (llama.cpp aborted)",
    9: "SIGKILL (killed, perhaps for lack of memory)",
    11: "SIGSEGV",
    15: "SIGTERM",
}

TRAPS = frozenset({-4, -11})
"""Return codes of a worker that trapped in llama.cpp's repacked CPU kernels."""
