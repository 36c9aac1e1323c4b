"""A file's weights, loaded, and what they say of themselves."""

import ctypes
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import llama_cpp.llama_cpp as ll

from kvserve.ipc.messages import Load
from kvserve.worker.carry.layout import CELL_EXT_BYTES
from kvserve.worker.llama.failures import LoadError
from kvserve.worker.llama.params import model_params
from kvserve.worker.llama.vocab import Vocab
from kvserve.worker.load_log import LoadLog


class Model:
    """A loaded model; it stays loaded as long as the process.

    Raises LoadError where the file or the memory will not do. `on_progress` gets the share of the
    weights that is read, 0 to 1, some hundred times.
    """

    def __init__(self, load: Load, log: LoadLog, on_progress: Callable[[float], None]) -> None:
        self._path = Path(load.model_path)
        self.on_gpu = load.n_gpu_layers > 0
        self.raw = self._load(load, log, on_progress)
        self.wholly_on_gpu = (
            load.n_gpu_layers > ll.llama_model_n_layer(self.raw) and not load.n_cpu_moe
        )
        vocab = ll.llama_model_get_vocab(self.raw)
        if vocab is None:
            raise LoadError("the model has no vocabulary")
        self.vocab = Vocab(vocab)

    @property
    def architecture(self) -> str:
        """`general.architecture` of the file, such as `gemma3`."""
        return self._metadata("general.architecture") or ""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that the file carries; untrusted."""
        template = ll.llama_model_chat_template(self.raw, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def n_ctx_train(self) -> int:
        """Tokens of the longest context that it was trained for."""
        n: int = ll.llama_model_n_ctx_train(self.raw)
        return n

    @property
    def n_window(self) -> int | None:
        """Tokens of its sliding window; None where all layers attend to everything."""
        return ll.llama_model_n_swa(self.raw) or None

    @property
    def recurrent(self) -> bool:
        """Whether some of its layers keep a state instead of a cache."""
        return bool(ll.llama_model_is_recurrent(self.raw) or ll.llama_model_is_hybrid(self.raw))

    @property
    def cell_ext_bytes(self) -> int:
        """Bytes that a saved cell has beside its position."""
        m_rope = ll.LLAMA_ROPE_TYPE_MROPE, ll.LLAMA_ROPE_TYPE_IMROPE
        return CELL_EXT_BYTES if ll.llama_model_rope_type(self.raw) in m_rope else 0

    def identity(self, n_ctx: int) -> str:
        """Digest of what makes states of two models, or of two RoPE settings, incompatible: the
        metadata, the file's size and time, and which LongRoPE factors a context of `n_ctx` selects
        (llama_model::get_rope_factors in llama.cpp's src/llama-model.cpp)."""
        digest = hashlib.blake2b(digest_size=16)
        file = self._path.stat()
        size = ll.llama_model_size(self.raw), ll.llama_model_n_params(self.raw)
        long_rope = self._long_rope(n_ctx)
        digest.update(repr((file.st_size, file.st_mtime_ns, size, long_rope)).encode())
        for index in range(ll.llama_model_meta_count(self.raw)):
            for read in (ll.llama_model_meta_key_by_index, ll.llama_model_meta_val_str_by_index):
                buffer = ctypes.create_string_buffer(4096)
                n = read(self.raw, index, buffer, len(buffer))
                digest.update(n.to_bytes(4, "little", signed=True) + buffer.value)
        return digest.hexdigest()

    def _long_rope(self, n_ctx: int) -> bool | None:
        """Whether a LongRoPE model uses its long factors there; None for other models."""
        scaling = f"{self.architecture}.rope.scaling"
        if self._metadata(f"{scaling}.type") in {"yarn", "linear"}:
            return None
        trained = self._metadata(f"{scaling}.original_context_length")
        return None if trained is None else n_ctx > int(trained)

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        n = ll.llama_model_meta_val_str(self.raw, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if n >= 0 else None

    def _load(self, load: Load, log: LoadLog, on_progress: Callable[[float], None]) -> object:
        if not self._path.is_file():
            raise LoadError(f"no model file at {load.model_path}")

        def progress(fraction: float, _user_data: int) -> bool:
            on_progress(fraction)
            return True

        params, _kept = model_params(load)
        params.progress_callback = ll.llama_progress_callback(progress)
        model = ll.llama_model_load_from_file(os.fsencode(load.model_path), params)
        if model is None:
            message, out_of_memory = log.failure("llama.cpp could not load the model")
            raise LoadError(message, out_of_memory=out_of_memory)
        if ll.llama_model_has_encoder(model) or not ll.llama_model_has_decoder(model):
            raise LoadError("models with an encoder (T5 and the like) are not supported")
        if ll.llama_model_is_diffusion(model):
            raise LoadError("diffusion models are not supported")
        return model
