"""Host memory that a GPU copies to and from by itself."""

import ctypes
import weakref

import numpy as np
from numpy.typing import NDArray

from kvserve.worker.llama.backend import library

_GPU = 1
"""`GGML_BACKEND_DEVICE_TYPE_GPU` in ggml-backend.h."""


def page_locked(n_bytes: int) -> NDArray[np.uint8] | None:
    """Memory that never moves, shape (n_bytes,): a GPU copies to and from it without another copy
    in between. None where no GPU offers any.

    It is freed with the last array that shows a part of it.
    """
    try:
        ggml = _Ggml(library())
    except AttributeError:
        return None
    for index in range(ggml.n_devices()):
        device = ggml.device(index)
        kind = ggml.host_memory_of(device) if ggml.type_of(device) == _GPU else None
        buffer = ggml.allocate(kind, n_bytes) if kind else None
        if not buffer:
            continue
        memory = (ctypes.c_uint8 * n_bytes).from_address(ggml.address_of(buffer))
        array = np.ctypeslib.as_array(memory)
        # Not at the process's end: the driver may be gone by then.
        weakref.finalize(memory, ggml.free, buffer).atexit = False
        return array
    return None


class _Ggml:
    """The functions of ggml-backend.h that the bindings leave out; handles are addresses."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        def function(name: str, result: object, *arguments: object) -> "ctypes._CFunctionType":
            return ctypes.CFUNCTYPE(result, *arguments)((name, loaded))  # type: ignore[arg-type]

        handle, size = ctypes.c_void_p, ctypes.c_size_t
        self.n_devices = function("ggml_backend_dev_count", size)
        self.device = function("ggml_backend_dev_get", handle, size)
        self.type_of = function("ggml_backend_dev_type", ctypes.c_int, handle)
        self.host_memory_of = function("ggml_backend_dev_host_buffer_type", handle, handle)
        self.allocate = function("ggml_backend_buft_alloc_buffer", handle, handle, size)
        self.address_of = function("ggml_backend_buffer_get_base", handle, handle)
        self.free = function("ggml_backend_buffer_free", None, handle)
