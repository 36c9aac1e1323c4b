"""The only importer of llama_cpp: a typed layer over llama.cpp's C API (include/llama.h).

Nothing here keeps state of requests. Calls are not thread-safe unless their docstring says so.
"""

# Before numpy: the other order crashed inside llama_model_load on one machine.
import llama_cpp.llama_cpp  # noqa: F401 # isort: skip

from kvserve.worker.llama.backend import VERSION, library, start_backend, system_info
from kvserve.worker.llama.batch import Batch
from kvserve.worker.llama.blueprint import Blueprint
from kvserve.worker.llama.context import Context
from kvserve.worker.llama.failures import CacheFull, DecodeError, LoadError
from kvserve.worker.llama.host_memory import page_locked
from kvserve.worker.llama.params import GGML_TYPES
from kvserve.worker.llama.vocab import Vocab

__all__ = [
    "GGML_TYPES",
    "VERSION",
    "Batch",
    "Blueprint",
    "CacheFull",
    "Context",
    "DecodeError",
    "LoadError",
    "Vocab",
    "library",
    "page_locked",
    "start_backend",
    "system_info",
]
