"""How long OpenMP's threads wait busily for each other.

That is a number of turns (GOMP_SPINCOUNT), read once when the library is loaded, but only a hundred
as long as the process has more OpenMP threads than there are processors (do_spin in libgomp's
config/linux/wait.h). So a few idle threads more make the waits brief, until they end.
"""

import ctypes
import os
import threading
from pathlib import Path
from typing import Any

_LIBRARY = "libgomp"
_PATIENCE_SECONDS = 5.0


class BriefWaits:
    """Threads that do nothing, from `begin` to `end`, either of which may be called again. Without
    GNU's OpenMP there are none. Not thread-safe."""

    def __init__(self) -> None:
        self._ended: threading.Event | None = None

    def begin(self) -> None:
        """Make waits brief, of all threads of this process."""
        if self._ended is not None:
            return
        parallel = _parallel()
        if parallel is None:
            return
        ready, self._ended = threading.Event(), threading.Event()
        arguments = parallel, ready, self._ended
        threading.Thread(target=_crowd, args=arguments, name="openmp", daemon=True).start()
        ready.wait(_PATIENCE_SECONDS)

    def end(self) -> None:
        """Let them be as long as before, in a moment."""
        if self._ended is not None:
            self._ended.set()
            self._ended = None


def _crowd(parallel: Any, ready: threading.Event, ended: threading.Event) -> None:
    """Have a team of threads of its own, which goes with the thread that called this."""
    nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # to free NULL is no work
    parallel(nothing, None, len(os.sched_getaffinity(0)) + 1, 0)
    ready.set()
    ended.wait()


def _parallel() -> Any:
    """The function that compiled `#pragma omp parallel` calls, of the library that this process
    computes with; None where that is no GNU one."""
    try:
        maps = Path("/proc/self/maps").read_text()
        paths = {line.split()[-1] for line in maps.splitlines() if _LIBRARY in line}
        function = ctypes.CDLL(min(paths)).GOMP_parallel
    except (OSError, ValueError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function
