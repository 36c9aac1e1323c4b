"""A model's tokens."""

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as ll
import numpy as np
from numpy.typing import NDArray

from kvserve.core.draft import MOST_VOCAB_DIFFERENCE

if TYPE_CHECKING:
    from llguidance import LLTokenizer

_PIECE_BYTES = 64
_FIRST_COMPARED = 5
"""The special tokens before it may differ (SPEC_VOCAB_CHECK_START_TOKEN_ID in llama.cpp)."""


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
