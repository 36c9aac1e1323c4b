"""The only importer of llama_cpp: a typed layer over llama.cpp's C API (include/llama.h).

Nothing here keeps state of requests. Calls are not thread-safe unless their docstring says so.
"""

import ctypes
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Before numpy: the other order crashed inside llama_model_load on one machine.
import llama_cpp.llama_cpp as ll  # isort: skip
import llama_cpp  # isort: skip

import numpy as np
from numpy.typing import NDArray

from kvserve.core.draft import MOST_VOCAB_DIFFERENCE
from kvserve.core.dtypes import KvType
from kvserve.ipc.messages import Load
from kvserve.worker.carry.cache_log import CacheLog
from kvserve.worker.carry.layout import CELL_EXT_BYTES, StateLayout
from kvserve.worker.cell_rules import Rules
from kvserve.worker.load_log import LoadLog

if TYPE_CHECKING:
    from llguidance import LLTokenizer

VERSION: str = llama_cpp.__version__

_GGML_TYPES = {
    KvType.F32: ll.GGML_TYPE_F32,
    KvType.F16: ll.GGML_TYPE_F16,
    KvType.BF16: 30,  # ggml.h; the bindings leave it out
    KvType.Q8_0: ll.GGML_TYPE_Q8_0,
    KvType.Q5_1: ll.GGML_TYPE_Q5_1,
    KvType.Q5_0: ll.GGML_TYPE_Q5_0,
    KvType.Q4_1: ll.GGML_TYPE_Q4_1,
    KvType.Q4_0: ll.GGML_TYPE_Q4_0,
    KvType.IQ4_NL: ll.GGML_TYPE_IQ4_NL,
}
_NO_SLOT = 1
_WARM_UP_TOKENS = 8
_PIECE_BYTES = 64
_FIRST_COMPARED = 5
"""The special tokens before it may differ (SPEC_VOCAB_CHECK_START_TOKEN_ID in llama.cpp)."""
_N_SPARE = 32
"""Sequence ids beside those of the context, for what is kept: a unified attention cache knows all
LLAMA_MAX_SEQ of them, whatever `n_seq_max` says, and they cost no memory."""


class LoadError(Exception):
    """llama.cpp refused the model or the context; `message` is one line."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.out_of_memory = out_of_memory


class CacheFull(Exception):
    """The KV cache has no room for a batch; it is as it was before the call."""


class DecodeError(Exception):
    """A decode failed; the sequences of its batch must be cleared."""


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


_kept_alive: list[object] = []
"""ctypes frees a callback that Python no longer refers to, while C still calls it."""

_listeners: list[Callable[[str], None]] = []
"""Who else reads the log, piece by piece, while a context is created."""


def library() -> ctypes.CDLL:
    """libllama, with ggml's functions that the bindings leave out."""
    loaded: ctypes.CDLL = ll._lib
    return loaded


def system_info() -> str:
    """The build's CPU features, GPU backend and `FA_QUANTS`, in llama.cpp's words."""
    info: bytes = ll.llama_print_system_info()
    return info.decode("utf-8", "replace").strip()


class Vocab:
    """A model's tokens. All calls are thread-safe: llama.cpp only reads."""

    def __init__(self, vocab: object) -> None:
        self._vocab = vocab
        self.n_tokens: int = ll.llama_vocab_n_tokens(vocab)
        bos = ll.llama_vocab_bos(vocab)
        self.bos: int | None = bos if 0 <= bos < self.n_tokens else None
        self.adds_bos: bool = ll.llama_vocab_get_add_bos(vocab) and self.bos is not None
        self._end_tokens: NDArray[np.int64] | None = None
        self._shown: dict[int, bytes] = {}

    @property
    def bos_text(self) -> str:
        """How templates write the token that begins a text; empty where there is none."""
        return self._text(self.bos)

    @property
    def eos_text(self) -> str:
        """How templates write the token that ends a text; empty where there is none."""
        eos = ll.llama_vocab_eos(self._vocab)
        return self._text(eos if 0 <= eos < self.n_tokens else None)

    @property
    def end_tokens(self) -> NDArray[np.int64]:
        """All end-of-generation tokens; found at the first use, in about 0.1 s."""
        if self._end_tokens is None:
            self._end_tokens = np.array(
                [token for token in range(self.n_tokens) if self.ends(token)], dtype=np.int64
            )
        return self._end_tokens

    @property
    def forbidden_tokens(self) -> NDArray[np.int64]:
        """Tokens that the model's file says must never be drawn."""
        n = ctypes.c_int32(0)
        tokens = ll.llama_vocab_get_suppress_tokens(self._vocab, ctypes.pointer(n))
        return np.array([tokens[i] for i in range(n.value)] if tokens else [], dtype=np.int64)

    def grammar_tokenizer(self) -> "LLTokenizer":
        """The vocabulary as llguidance reads it: control tokens apart from text. Takes a second or
        two with a large vocabulary."""
        # Here since it takes the raw vocabulary, and imports llama_cpp.
        from llguidance.llamacpp import lltokenizer_from_vocab  # noqa: PLC0415

        ends = self.end_tokens.tolist()
        tokenizer: LLTokenizer = lltokenizer_from_vocab(
            self._vocab,  # type: ignore[arg-type]
            eos_token=ends or None,
        )
        return tokenizer

    def difference(self, draft: "Vocab") -> str | None:
        """Why a draft model with this vocabulary cannot propose tokens of this one; None where it
        can. The same conditions as common_speculative_are_compatible in llama.cpp's
        common/speculative.cpp."""
        if ll.llama_vocab_type(self._vocab) != ll.llama_vocab_type(draft._vocab):
            return "its vocabulary is of another type"
        for name, adds, token in (
            ("begins", ll.llama_vocab_get_add_bos, ll.llama_vocab_bos),
            ("ends", ll.llama_vocab_get_add_eos, ll.llama_vocab_eos),
        ):
            mine, its = (token(one) if adds(one) else None for one in (self._vocab, draft._vocab))
            if mine != its:
                return f"another token {name} its texts"
        n_mine, n_its = self.n_tokens, draft.n_tokens
        if abs(n_mine - n_its) > MOST_VOCAB_DIFFERENCE:
            return f"it has {n_its} tokens, not {n_mine}"
        for index in range(_FIRST_COMPARED, min(n_mine, n_its)):
            mine, its = (ll.llama_vocab_get_text(one, index) for one in (self._vocab, draft._vocab))
            if mine != its:
                texts = [(text or b"").decode("utf-8", "replace") for text in (mine, its)]
                return f"its token {index} is {texts[1]!r}, not {texts[0]!r}"
        return None

    def ends(self, token: int) -> bool:
        """Whether the model ends its answer with this token."""
        return bool(ll.llama_vocab_is_eog(self._vocab, token))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> NDArray[np.int32]:
        """Tokens of `text`. `add_special` adds BOS and EOS where the model's file says so,
        `parse_special` reads special tokens that are written in the text."""
        data = text.encode("utf-8", "replace")
        tokens = np.empty(len(data) + 2, dtype=np.int32)
        n = self._tokenize_into(tokens, data, add_special, parse_special)
        if n < 0:
            tokens = np.empty(-n, dtype=np.int32)
            n = self._tokenize_into(tokens, data, add_special, parse_special)
        return tokens[:n].copy()

    def piece(self, token: int) -> bytes:
        """The token's part of a text; empty for control tokens that are not shown, maybe a part of
        a character."""
        shown = self._shown.get(token)
        if shown is not None:
            return shown
        for size in (_PIECE_BYTES, 4096, 2**20):
            buffer = ctypes.create_string_buffer(size)
            n = ll.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
        return b""

    def show(self, markers: Iterable[str]) -> None:
        """Give those of `markers` that are control tokens a text in answers: their own."""
        for text in markers:
            token = self.special(text)
            if token is not None and not self.ends(token):
                self._shown[token] = text.encode()

    def special(self, text: str) -> int | None:
        """The token that `text` is, where llguidance takes that token for a special one."""
        tokens = self.tokenize(text, add_special=False, parse_special=True)
        if len(tokens) != 1:
            return None
        token = int(tokens[0])
        kind = ll.llama_vocab_get_attr(self._vocab, token)
        bracketed = text.startswith("<") and text.endswith(">")
        is_special = kind & ll.LLAMA_TOKEN_ATTR_CONTROL or (
            kind & ll.LLAMA_TOKEN_ATTR_USER_DEFINED and bracketed
        )
        return token if is_special else None

    def has(self, text: str) -> bool:
        """Whether `text` is one special token."""
        return len(self.tokenize(text, add_special=False, parse_special=True)) == 1

    def _text(self, token: int | None) -> str:
        if token is None:
            return ""
        return (ll.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")

    def _tokenize_into(
        self, tokens: NDArray[np.int32], data: bytes, add_special: bool, parse_special: bool
    ) -> int:
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ll.llama_token))
        n: int = ll.llama_tokenize(
            self._vocab, data, len(data), pointer, len(tokens), add_special, parse_special
        )
        return n


class Batch:
    """Tokens for one decode, in arrays that llama.cpp reads in place.

    Capacity `n_batch` tokens, each in one sequence.
    """

    def __init__(self, n_batch: int) -> None:
        self.n_tokens = 0
        self.outputs: list[int] = []
        self._token = np.zeros(n_batch, dtype=np.int32)
        self._pos = np.zeros(n_batch, dtype=np.int32)
        self._slot = np.zeros(n_batch, dtype=np.int32)
        self._n_slots = np.ones(n_batch, dtype=np.int32)
        self._wanted = np.zeros(n_batch, dtype=np.int8)
        starts = self._slot.ctypes.data + self._slot.itemsize * np.arange(n_batch)
        self._slot_pointers = starts.astype(np.uintp)
        int32 = ctypes.POINTER(ctypes.c_int32)
        self.raw = ll.llama_batch(
            n_tokens=0,
            token=self._token.ctypes.data_as(int32),
            pos=self._pos.ctypes.data_as(int32),
            n_seq_id=self._n_slots.ctypes.data_as(int32),
            seq_id=self._slot_pointers.ctypes.data_as(ctypes.POINTER(int32)),
            logits=self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def clear(self) -> None:
        """Empty the batch."""
        self._wanted[: self.n_tokens] = 0
        self.n_tokens = self.raw.n_tokens = 0
        self.outputs.clear()

    def add(
        self,
        tokens: NDArray[np.int32] | Sequence[int],
        start: int,
        slot: int,
        *,
        last: bool = False,
        scored: bool = False,
    ) -> None:
        """Append `tokens` at positions `start` and on of sequence `slot`; `last` asks for the
        logits of the final one, `scored` for those of all. Whose logits are wanted is appended to
        `outputs`, as an index into the batch."""
        begin, end = self.n_tokens, self.n_tokens + len(tokens)
        self._token[begin:end] = tokens
        self._pos[begin:end] = np.arange(start, start + len(tokens), dtype=np.int32)
        self._slot[begin:end] = slot
        if last or scored:
            first = begin if scored else end - 1
            self._wanted[first:end] = 1
            self.outputs.extend(range(first, end))
        self.n_tokens = self.raw.n_tokens = end

    def want_all(self) -> None:
        """Ask for the logits of every token that was added."""
        self._wanted[: self.n_tokens] = 1
        self.outputs[:] = range(self.n_tokens)


class Context:
    """One loaded model with its one context and KV cache, ready to decode.

    Raises LoadError where the file, the settings or the memory will not do. `on_progress` gets
    the share of the weights that is read, 0 to 1, some hundred times.
    """

    def __init__(self, load: Load, log: LoadLog, on_progress: Callable[[float], None]) -> None:
        self._log = log
        self._model_path = load.model_path
        self._n_gpu_layers = load.n_gpu_layers
        self._model = self._load_model(load, on_progress)
        vocab = ll.llama_model_get_vocab(self._model)
        if vocab is None:
            raise LoadError("the model has no vocabulary")
        self.vocab = Vocab(vocab)
        self._open(load)
        self._warm_up()

    def beside(self, load: Load, n_outputs: int) -> "Context":
        """Another context over the same weights, whose batches may ask for `n_outputs` logits.

        Of `load` the context's part counts. It must be closed, and before its model's last use.
        Raises LoadError.
        """
        other = object.__new__(Context)
        other._log, other._model_path, other._n_gpu_layers = (
            self._log,
            self._model_path,
            self._n_gpu_layers,
        )
        other._model, other.vocab = self._model, self.vocab
        self._log.forget_errors()
        other._open(load, n_outputs)
        return other

    def close(self) -> None:
        """Free the context, not the weights. It must not be used afterwards."""
        ll.llama_free(self.raw)

    def _open(self, load: Load, n_outputs: int | None = None) -> None:
        caches = CacheLog()
        _listeners.append(caches.feed)
        try:
            self.raw = self._create_context(load, n_outputs)
        finally:
            _listeners.remove(caches.feed)
        self.state_layout: StateLayout | None = caches.layout(self._cell_ext_bytes)
        memory = ll.llama_get_memory(self.raw)
        if memory is None:
            raise LoadError("the model keeps no KV cache: it makes embeddings, not text")
        self._memory = memory
        self.n_ctx: int = ll.llama_n_ctx(self.raw)
        self.n_batch: int = ll.llama_n_batch(self.raw)
        self.n_ubatch: int = ll.llama_n_ubatch(self.raw)
        self.n_seq_max: int = ll.llama_n_seq_max(self.raw)
        self.n_ctx_train: int = ll.llama_model_n_ctx_train(self._model)

    @property
    def architecture(self) -> str:
        """`general.architecture` of the file, such as `gemma3`."""
        return self._metadata("general.architecture") or ""

    @property
    def chat_template(self) -> str | None:
        """The Jinja source that the file carries; untrusted."""
        template = ll.llama_model_chat_template(self._model, None)
        return template.decode("utf-8", "replace") if template else None

    @property
    def asynchronous(self) -> bool:
        """Whether `submit` returns before the batch is computed, as it does on a GPU."""
        return self._n_gpu_layers > 0 and bool(ll.llama_supports_gpu_offload())

    def decode(self, batch: Batch) -> None:
        """Compute a batch; returns when it is done. Raises CacheFull or DecodeError."""
        self.submit(batch)
        self.wait()

    def submit(self, batch: Batch) -> None:
        """Begin to compute a batch. Raises CacheFull or DecodeError."""
        status = ll.llama_decode(self.raw, batch.raw)
        if status == _NO_SLOT:
            raise CacheFull
        if status != 0:
            raise DecodeError(f"llama_decode returned {status}")

    def wait(self) -> None:
        """Return when the batch is computed."""
        ll.llama_synchronize(self.raw)

    def logits(self, n_outputs: int) -> NDArray[np.float32]:
        """The last batch's logits as a view, shape (n_outputs, n_vocab), in batch order.

        Writable: samplers read what is left there. Valid until the next decode.
        """
        first = ll.llama_get_logits(self.raw)
        address = ctypes.cast(first, ctypes.c_void_p).value
        if address is None:
            raise DecodeError("the decode left no logits")
        rows = (ctypes.c_float * self.vocab.n_tokens * n_outputs).from_address(address)
        view: NDArray[np.float32] = np.ctypeslib.as_array(rows)
        return view

    @property
    def model_identity(self) -> str:
        """Digest of what makes states of two models, or of two RoPE settings, incompatible: the
        metadata, the file's size and time, and which LongRoPE factors this context's size selects
        (llama_model::get_rope_factors in llama.cpp's src/llama-model.cpp)."""
        digest = hashlib.blake2b(digest_size=16)
        file = Path(self._model_path).stat()
        size = ll.llama_model_size(self._model), ll.llama_model_n_params(self._model)
        digest.update(repr((file.st_size, file.st_mtime_ns, size, self._long_rope)).encode())
        for index in range(ll.llama_model_meta_count(self._model)):
            for read in (ll.llama_model_meta_key_by_index, ll.llama_model_meta_val_str_by_index):
                buffer = ctypes.create_string_buffer(4096)
                n = read(self._model, index, buffer, len(buffer))
                digest.update(n.to_bytes(4, "little", signed=True) + buffer.value)
        return digest.hexdigest()

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
        model = self._model
        n_window: int = ll.llama_model_n_swa(model)
        recurrent = ll.llama_model_is_recurrent(model) or ll.llama_model_is_hybrid(model)
        # DeepSeek V4's compressed caches belong to one sequence each (llama-kv-cache-dsv4.cpp).
        shares = n_window == 0 and self.architecture != "deepseek4"
        n_spare = min(_N_SPARE, ll.llama_max_parallel_sequences() - ll.llama_n_seq_max(self.raw))
        return Rules(n_window or None, recurrent, shares, 0 if n_window or recurrent else n_spare)

    @property
    def cannot_take_back(self) -> str | None:
        """Why the last tokens of a sequence cannot be removed again; None where they can."""
        if self.architecture == "deepseek4":
            return "its compressed cache cannot take tokens back"
        if self.reuse_rules.recurrent:
            return "its recurrent state cannot take tokens back"
        return None

    @property
    def _cell_ext_bytes(self) -> int:
        m_rope = ll.LLAMA_ROPE_TYPE_MROPE, ll.LLAMA_ROPE_TYPE_IMROPE
        return CELL_EXT_BYTES if ll.llama_model_rope_type(self._model) in m_rope else 0

    @property
    def _long_rope(self) -> bool | None:
        """Whether a LongRoPE model uses its long factors here; None for other models."""
        scaling = f"{self.architecture}.rope.scaling"
        if self._metadata(f"{scaling}.type") in {"yarn", "linear"}:
            return None
        trained = self._metadata(f"{scaling}.original_context_length")
        return None if trained is None else self.n_ctx > int(trained)

    def _metadata(self, key: str) -> str | None:
        buffer = ctypes.create_string_buffer(256)
        n = ll.llama_model_meta_val_str(self._model, key.encode(), buffer, 256)
        return buffer.value.decode("utf-8", "replace") if n >= 0 else None

    def _load_model(self, load: Load, on_progress: Callable[[float], None]) -> object:
        if not Path(load.model_path).is_file():
            raise LoadError(f"no model file at {load.model_path}")

        def progress(fraction: float, _user_data: int) -> bool:
            on_progress(fraction)
            return True

        params, _kept = _model_params(load)
        params.progress_callback = ll.llama_progress_callback(progress)
        model = ll.llama_model_load_from_file(os.fsencode(load.model_path), params)
        if model is None:
            raise self._failure("llama.cpp could not load the model")
        if ll.llama_model_has_encoder(model) or not ll.llama_model_has_decoder(model):
            raise LoadError("models with an encoder (T5 and the like) are not supported")
        if ll.llama_model_is_diffusion(model):
            raise LoadError("diffusion models are not supported")
        return model

    def _create_context(self, load: Load, n_outputs: int | None) -> object:
        params = _context_params(load)
        if n_outputs is not None:
            params.n_outputs_max = params.n_outputs_max_per_seq = n_outputs
        context = ll.llama_init_from_model(self._model, params)
        if context is None:
            raise self._failure("llama.cpp could not create the context")
        return context

    def _failure(self, fallback: str) -> LoadError:
        message, out_of_memory = self._log.failure(fallback)
        return LoadError(message, out_of_memory=out_of_memory)

    def _warm_up(self) -> None:
        """Decode a few tokens: a CPU build that does not suit the machine dies here, before
        anyone waits for an answer. One token would miss the AMX kernels.

        On a GPU a whole batch goes first: what CUDA allocates for it beside llama.cpp's buffers is
        then there when the daemon measures (99 MiB for a model with 8 of 128 experts in use).
        """
        first = self.n_batch if self._n_gpu_layers else _WARM_UP_TOKENS
        n = min(first, self.n_ctx - 1)
        batch = Batch(max(n, 1))
        tokens = np.arange(n, dtype=np.int32) % self.vocab.n_tokens
        try:
            batch.add(tokens, 0, 0, last=True)
            self.decode(batch)
            batch.clear()
            batch.add(tokens[:1], n, 0, last=True)
            self.decode(batch)
            self.logits(1)
        except (CacheFull, DecodeError) as error:
            raise self._failure(f"the first decode failed: {error}") from error
        ll.llama_memory_clear(self._memory, False)


class Blueprint:
    """A model that llama.cpp knows the sizes of: its tensors and those of its contexts are laid
    out and not allocated (`no_alloc`), so a context takes milliseconds.

    Raises LoadError for a file that will not do.
    """

    def __init__(self, load: Load, log: LoadLog) -> None:
        self._log = log
        if not Path(load.model_path).is_file():
            raise LoadError(f"no model file at {load.model_path}")
        params, _kept = _model_params(load)
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
        _listeners.append(listener)
        try:
            context = ll.llama_init_from_model(self._model, _context_params(load))
        finally:
            _listeners.remove(listener)
        if context is None:
            raise LoadError(self._log.failure("llama.cpp could not create the context")[0])
        ll.llama_free(context)

    def close(self) -> None:
        """Forget the model."""
        ll.llama_model_free(self._model)


def _model_params(load: Load) -> tuple[ll.llama_model_params, object]:
    """The model parameters of a load, and what must live as long as they do."""
    params = ll.llama_model_default_params()
    params.n_gpu_layers = load.n_gpu_layers
    params.use_extra_bufts = load.extra_buffers
    shares = (ctypes.c_float * max(ll.llama_max_devices(), len(load.tensor_split)))()
    if load.tensor_split:
        shares[: len(load.tensor_split)] = load.tensor_split
        params.tensor_split = shares
    overrides = _experts_on_host(load.n_cpu_moe)
    if load.n_cpu_moe > 0:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params, (shares, overrides)


def _context_params(load: Load) -> ll.llama_context_params:
    params = ll.llama_context_default_params()
    params.n_ctx = load.n_ctx
    params.n_seq_max = load.n_seq_max
    # Each running sequence needs a place in every batch.
    params.n_batch = max(load.n_batch, load.n_seq_max)
    params.n_ubatch = load.n_ubatch
    # Without this the compute buffer holds logits for every token of a micro-batch.
    params.n_outputs_max = load.n_seq_max + load.n_draft
    params.n_outputs_max_per_seq = 1
    params.n_threads = load.n_threads
    params.n_threads_batch = load.n_threads_batch
    params.type_k = _GGML_TYPES[KvType(load.type_k)]
    params.type_v = _GGML_TYPES[KvType(load.type_v)]
    params.flash_attn_type = (
        ll.LLAMA_FLASH_ATTN_TYPE_ENABLED if load.flash_attn else ll.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    params.kv_unified = True
    params.offload_kqv = True
    params.swa_full = False
    params.no_perf = True
    return params  # type: ignore[no-any-return]


def _bytes_at(address: int) -> "ctypes._Pointer[ctypes.c_uint8]":
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))


class _BufferOverride(ctypes.Structure):
    """`llama_model_tensor_buft_override`; the bindings leave it out."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def _experts_on_host(n_layers: int) -> "ctypes.Array[_BufferOverride]":
    """Overrides that keep the routed experts of the first layers in host memory, as llama.cpp's
    `--n-cpu-moe` does (common/common.h); ends with an empty one."""
    host_buffer_type = ll._lib.ggml_backend_cpu_buffer_type
    host_buffer_type.restype = ctypes.c_void_p
    overrides = (_BufferOverride * (n_layers + 1))()
    for layer in range(n_layers):
        pattern = rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
        overrides[layer] = _BufferOverride(pattern.encode(), host_buffer_type())
    return overrides
