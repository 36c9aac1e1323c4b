"""The loaded library: its start, its log, its version."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import llama_cpp
import llama_cpp.llama_cpp as ll

from kvserve.worker.load_log import LoadLog

VERSION: str = llama_cpp.__version__

_kept_alive: list[object] = []
"""ctypes frees a callback that Python no longer refers to, while C still calls it."""

_listeners: list[Callable[[str], None]] = []
"""Who else reads the log, piece by piece, while a context is created."""


def start_backend(log: LoadLog) -> None:
    """Send llama.cpp's log to `log` and initialise it; once for each process, before all else."""

    def feed(level: int, text: bytes, _user_data: int) -> None:
        line = text.decode("utf-8", "replace")
        log.feed(level, line)
        for listener in _listeners:
            listener(line)

    callback = ll.llama_log_callback(feed)
    _kept_alive.append(callback)
    ll.llama_log_set(callback, ctypes.c_void_p())
    ll.llama_backend_init()


@contextmanager
def listening(listener: Callable[[str], None]) -> Iterator[None]:
    """Give `listener` the log too, piece by piece, while this lasts."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def library() -> ctypes.CDLL:
    """libllama, with ggml's functions that the bindings leave out."""
    loaded: ctypes.CDLL = ll._lib
    return loaded


def system_info() -> str:
    """The build's CPU features, GPU backend and `FA_QUANTS`, in llama.cpp's words."""
    info: bytes = ll.llama_print_system_info()
    return info.decode("utf-8", "replace").strip()
