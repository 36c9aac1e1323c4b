"""What llama.cpp's log lines tell: what was allocated, and why a load failed.

Weights, caches and buffers for each device come from no C call, only from the log
(llama.cpp src/llama-model.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-context.cpp).
"""

import re
import sys
from collections import deque

from kvserve.ipc.messages import MemoryReport

_WARN, _ERROR, _CONTINUED = 3, 4, 5
_MIB = 2**20
_BUFFER = re.compile(
    r"(?P<device>\S+)\s+(?P<kind>model|KV|RS|DSV4 \S+ state|compute|output) buffer size\s*="
    r"\s*(?P<mib>\d+(?:\.\d+)?) MiB"
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate|unable to allocate|cannot allocate memory|bad_alloc"
    r"|failed to reserve|could not reserve",
    re.IGNORECASE,
)
_N_ERRORS_SHOWN = 3
_LONGEST_MESSAGE = 600


class LoadLog:
    """Collects the log: `feed` is llama.cpp's log callback, called from any of its threads.

    Warnings and errors also go to stderr, the worker's log file.
    """

    def __init__(self) -> None:
        self._level = 0
        self._partial = ""
        self._errors: deque[str] = deque(maxlen=64)
        self._added: dict[str, float] = {}
        self._replaced: dict[tuple[str, str], float] = {}
        self._reading_buffers = True

    def feed(self, level: int, text: str) -> None:
        """Take a piece of the log; `level` is ggml_log_level, and lines may come in parts."""
        if level != _CONTINUED:
            self._level = level
        if self._level < _WARN and not self._reading_buffers:
            return
        self._partial += text
        *lines, self._partial = self._partial.split("\n")
        for line in lines:
            self._take_line(line.strip())

    def close_load(self) -> None:
        """The load is over: read no more buffer sizes, which keeps later callbacks cheap."""
        self._reading_buffers = False
        self._partial = ""

    def memory(self) -> MemoryReport:
        """The buffers of all devices together, in bytes; exact to the log's 0.01 MiB."""
        compute = sum(mib for (kind, _), mib in self._replaced.items() if kind == "compute")
        output = sum(mib for (kind, _), mib in self._replaced.items() if kind == "output")
        recurrent = sum(mib for kind, mib in self._added.items() if kind not in {"model", "KV"})
        return MemoryReport(
            kv_bytes=round(self._added.get("KV", 0.0) * _MIB),
            recurrent_bytes=round(recurrent * _MIB),
            compute_bytes=round(compute * _MIB),
            output_bytes=round(output * _MIB),
            weights_bytes=round(self._added.get("model", 0.0) * _MIB),
        )

    def failure(self, fallback: str) -> tuple[str, bool]:
        """One line that says why a load failed, and whether memory ran out."""
        errors = list(dict.fromkeys(self._errors))
        message = "; ".join(errors[:_N_ERRORS_SHOWN]) or fallback
        return message[:_LONGEST_MESSAGE], any(_OUT_OF_MEMORY.search(line) for line in errors)

    def forget_errors(self) -> None:
        """Another load begins: what went wrong in earlier ones is no reason for it."""
        self._errors.clear()

    def _take_line(self, line: str) -> None:
        if self._level in (_WARN, _ERROR):
            print(line, file=sys.stderr, flush=True)
        if self._level == _ERROR or (self._level == _WARN and _OUT_OF_MEMORY.search(line)):
            self._errors.append(line)
        found = _BUFFER.search(line)
        if found is None:
            return
        kind, mib = found["kind"], float(found["mib"])
        if kind in {"compute", "output"}:
            # Reserved again, and logged again, when the graph changes; the last one stands.
            self._replaced[kind, found["device"]] = mib
        else:
            self._added[kind] = self._added.get(kind, 0.0) + mib
