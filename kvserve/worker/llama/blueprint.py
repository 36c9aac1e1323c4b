"""A model's contexts laid out and not allocated, for what they would take."""

import os
from collections.abc import Callable
from pathlib import Path

import llama_cpp.llama_cpp as ll

from kvserve.ipc.messages import Load
from kvserve.worker.llama.backend import listening
from kvserve.worker.llama.failures import LoadError
from kvserve.worker.llama.params import context_params, model_params
from kvserve.worker.load_log import LoadLog


class Blueprint:
    """A model that llama.cpp knows the sizes of: its tensors and those of its contexts are laid
    out and not allocated (`no_alloc`), so a context takes milliseconds.

    Raises LoadError for a file that will not do.
    """

    def __init__(self, load: Load, log: LoadLog) -> None:
        self._log = log
        if not Path(load.model_path).is_file():
            raise LoadError(f"no model file at {load.model_path}")
        params, _kept = model_params(load)
        params.no_alloc = True
        params.load_mode = ll.LLAMA_LOAD_MODE_NONE
        self._model = ll.llama_model_load_from_file(os.fsencode(load.model_path), params)
        if self._model is None:
            raise LoadError(log.failure("llama.cpp could not load the model")[0])

    def lay_out(self, load: Load, listener: Callable[[str], None]) -> None:
        """Create and drop the context of `load`; `listener` gets the log of it, piece by piece.

        Raises LoadError where llama.cpp refuses the settings.
        """
        self._log.forget_errors()
        with listening(listener):
            context = ll.llama_init_from_model(self._model, context_params(load))
        if context is None:
            raise LoadError(self._log.failure("llama.cpp could not create the context")[0])
        ll.llama_free(context)

    def close(self) -> None:
        """Forget the model."""
        ll.llama_model_free(self._model)
