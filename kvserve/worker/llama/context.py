"""A loaded model's context: its KV cache and its decodes."""

import ctypes
from collections.abc import Callable

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from kvserve.core.dtypes import KvType
from kvserve.ipc.messages import Load
from kvserve.worker.carry.cache_log import CacheLog
from kvserve.worker.carry.layout import StateLayout
from kvserve.worker.cell_rules import Rules
from kvserve.worker.llama.backend import listening
from kvserve.worker.llama.batch import Batch
from kvserve.worker.llama.failures import CacheFull, DecodeError, LoadError
from kvserve.worker.llama.model import Model
from kvserve.worker.llama.params import context_params
from kvserve.worker.llama.warming import warm_up
from kvserve.worker.load_log import LoadLog

_NO_SLOT = 1
_COMPRESSED = "deepseek4"
"""Its compressed caches belong to one sequence each (llama-kv-cache-dsv4.cpp)."""
_N_SPARE = 32
"""Sequence ids beside those of the context, for what is kept: a unified attention cache knows all
LLAMA_MAX_SEQ of them, whatever `n_seq_max` says, and they cost no memory."""


class Context:
    """One loaded model with its one context and KV cache, ready to decode. Batches of as many rows
    as a key of `slower_rows` take less time with as many as its value.

    Raises LoadError where the file, the settings or the memory will not do. `on_progress` gets
    the share of the weights that is read, 0 to 1, some hundred times.
    """

    def __init__(self, load: Load, log: LoadLog, on_progress: Callable[[float], None]) -> None:
        self._log = log
        self.model = Model(load, log, on_progress)
        self._open(load)
        self._warm_up()

    def beside(self, load: Load, n_outputs: int) -> "Context":
        """Another context over the same weights, whose batches may ask for `n_outputs` logits.

        Of `load` the context's part counts. It must be closed, and before its model's last use.
        Raises LoadError.
        """
        other = object.__new__(Context)
        other._log, other.model = self._log, self.model
        self._log.forget_errors()
        other._open(load, n_outputs)
        return other

    def close(self) -> None:
        """Free the context, not the weights. It must not be used afterwards."""
        ll.llama_free(self.raw)

    def _open(self, load: Load, n_outputs: int | None = None) -> None:
        self._load = load
        self.vocab = self.model.vocab
        self.slower_rows: dict[int, int] = {}
        caches = CacheLog()
        with listening(caches.feed):
            self.raw = self._create(load, n_outputs)
        self.state_layout: StateLayout | None = caches.layout(self.model.cell_ext_bytes)
        memory = ll.llama_get_memory(self.raw)
        if memory is None:
            raise LoadError("the model keeps no KV cache: it makes embeddings, not text")
        self._memory = memory
        self._logits: NDArray[np.float32] = np.empty((0, 0), dtype=np.float32)
        self._logits_at = (0, 0)
        self.n_ctx: int = ll.llama_n_ctx(self.raw)
        self.n_batch: int = ll.llama_n_batch(self.raw)
        self.n_ubatch: int = ll.llama_n_ubatch(self.raw)
        self.n_seq_max: int = ll.llama_n_seq_max(self.raw)
        self.n_outputs: int = n_outputs or context_params(load).n_outputs_max
        self.n_ctx_train: int = self.model.n_ctx_train

    @property
    def asynchronous(self) -> bool:
        """Whether `submit` returns before the batch is computed, as it does on a GPU."""
        return self.model.on_gpu and bool(ll.llama_supports_gpu_offload())

    @property
    def tiles(self) -> bool:
        """Whether many rows on a CPU attend in tiles (ggml_compute_forward_flash_attn_ext_f16 in
        ggml-cpu/ops.cpp)."""
        load = self._load
        plain = load.type_k == load.type_v and load.type_k in {KvType.F16, KvType.F32}
        return load.flash_attn and plain and not self.model.wholly_on_gpu

    @property
    def n_threads(self) -> int:
        """CPU threads that a decode may use."""
        n_threads: int = ll.llama_n_threads(self.raw)
        return n_threads

    def decode(self, batch: Batch) -> None:
        """Compute a batch; returns when it is done. Raises CacheFull or DecodeError."""
        self.submit(batch)
        self.wait()

    def submit(self, batch: Batch) -> None:
        """Begin to compute a batch. Raises CacheFull or DecodeError. Nothing of its padding is left
        in the cache."""
        status = ll.llama_decode(self.raw, batch.raw)
        if status == _NO_SLOT:
            raise CacheFull
        if status != 0:
            raise DecodeError(f"llama_decode returned {status}")
        if batch.n_pad:
            self.cut_slot(*batch.padded)

    def wait(self) -> None:
        """Return when the batch is computed."""
        ll.llama_synchronize(self.raw)

    def logits(self, n_outputs: int) -> NDArray[np.float32]:
        """The last batch's logits as a view, shape (n_outputs, n_vocab), in batch order.

        Writable: samplers read what is left there. Valid until the next decode.
        """
        first = ll.llama_get_logits(self.raw)
        if not first:
            raise DecodeError("the decode left no logits")
        address = ctypes.addressof(first.contents)
        # Made once for all steps with as many rows, as long as the buffer stays where it is.
        if (address, n_outputs) != self._logits_at:
            rows = (ctypes.c_float * self.vocab.n_tokens * n_outputs).from_address(address)
            self._logits, self._logits_at = np.ctypeslib.as_array(rows), (address, n_outputs)
        return self._logits

    @property
    def model_identity(self) -> str:
        """Digest of what makes states of two models, or of two RoPE settings, incompatible."""
        return self.model.identity(self.n_ctx)

    def n_cached(self, slot: int) -> int:
        """Tokens of a sequence that are in the cache."""
        last: int = ll.llama_memory_seq_pos_max(self._memory, slot)
        return last + 1

    def state_bytes(self, slot: int) -> int:
        """Bytes of a sequence's state as it is now."""
        n_bytes: int = ll.llama_state_seq_get_size(self.raw, slot)
        return n_bytes

    def read_state(self, slot: int, address: int, n_bytes: int) -> int:
        """Copy a sequence's state to `address`; returns the bytes written, 0 after a failure."""
        n_written: int = ll.llama_state_seq_get_data(self.raw, _bytes_at(address), n_bytes, slot)
        return n_written

    def write_state(self, slot: int, address: int, n_bytes: int) -> int:
        """Replace a sequence by the state at `address`; returns the bytes read. After 0 the
        sequence may hold a part of it: clear it. Types, sizes and free cells are checked by
        llama.cpp; rotation, model and meaning are not."""
        n_read: int = ll.llama_state_seq_set_data(self.raw, _bytes_at(address), n_bytes, slot)
        return n_read

    def clear(self) -> None:
        """Free all cells."""
        ll.llama_memory_clear(self._memory, False)

    def clear_slot(self, slot: int) -> None:
        """Free all cells of a sequence."""
        ll.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def cut_slot(self, slot: int, n_tokens: int) -> None:
        """Free all cells of a sequence but the first `n_tokens`; never of a recurrent one."""
        ll.llama_memory_seq_rm(self._memory, slot, n_tokens, -1)

    def copy_slot(self, source: int, target: int, n_tokens: int) -> None:
        """Let an empty sequence share the first `n_tokens` cells of another."""
        ll.llama_memory_seq_cp(self._memory, source, target, 0, n_tokens)

    def copy_cells(self, source: int, target: int, begin: int, end: int) -> None:
        """Let another sequence share the cells at positions `begin` to `end`, without the last."""
        ll.llama_memory_seq_cp(self._memory, source, target, begin, end)

    def first_position(self, slot: int) -> int:
        """The lowest position of a sequence that all caches hold; -1 for none."""
        position: int = ll.llama_memory_seq_pos_min(self._memory, slot)
        return position

    @property
    def reuse_rules(self) -> Rules:
        """What of a sequence in the cache another one can go on from."""
        model = self.model
        shares = model.n_window is None and model.architecture != _COMPRESSED
        n_spare = min(_N_SPARE, ll.llama_max_parallel_sequences() - ll.llama_n_seq_max(self.raw))
        if model.n_window is not None or model.recurrent:
            n_spare = 0
        return Rules(model.n_window, model.recurrent, shares, n_spare)

    @property
    def cannot_take_back(self) -> str | None:
        """Why the last tokens of a sequence cannot be removed again; None where they can."""
        if self.model.architecture == _COMPRESSED:
            return "its compressed cache cannot take tokens back"
        if self.model.recurrent:
            return "its recurrent state cannot take tokens back"
        return None

    def _create(self, load: Load, n_outputs: int | None) -> object:
        params = context_params(load)
        if n_outputs is not None:
            params.n_outputs_max = params.n_outputs_max_per_seq = n_outputs
        context = ll.llama_init_from_model(self.model.raw, params)
        if context is None:
            raise self._failure("llama.cpp could not create the context")
        return context

    def _failure(self, fallback: str) -> LoadError:
        message, out_of_memory = self._log.failure(fallback)
        return LoadError(message, out_of_memory=out_of_memory)

    def _warm_up(self) -> None:
        try:
            self.slower_rows = warm_up(self)
        except (CacheFull, DecodeError) as error:
            raise self._failure(f"the first decode failed: {error}") from error


def _bytes_at(address: int) -> "ctypes._Pointer[ctypes.c_uint8]":
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
