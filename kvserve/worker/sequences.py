"""The state of one request: its tokens, and the text that they make."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvserve.dialects.watch import CallWatch
from kvserve.ipc.messages import FinishReason
from kvserve.worker.stops import StopMatcher

Tokens = NDArray[np.int32]


class Utf8Stream:
    """Bytes in, whole characters out. Invalid bytes become U+FFFD, as Python's `replace` does."""

    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: bytes) -> str:
        """The characters that `piece` completes."""
        return self._decoder.decode(piece)

    def finish(self) -> str:
        """What an unfinished character at the very end reads as: U+FFFD, or nothing."""
        return self._decoder.decode(b"", final=True)


@dataclass(frozen=True, slots=True)
class Limits:
    """When a generation ends. `max_tokens` is at most what the context holds.

    End-of-generation tokens and stop strings count only after the first `min_tokens` tokens.
    """

    max_tokens: int
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a generation ended."""

    reason: FinishReason
    stop_text: str | None = None


class Generation:
    """Prompt, generated tokens and text of one request.

    `tokens[:n_tokens]` are the prompt and everything generated; the array has room for
    `limits.max_tokens` more than the prompt. `finish` is None while the generation goes on. From
    where `watch` sees a call stop strings mean nothing: they would cut its arguments.
    """

    __slots__ = (
        "_matcher",
        "_tokens",
        "_utf8",
        "_watch",
        "finish",
        "limits",
        "n_prompt",
        "n_tokens",
    )

    def __init__(self, prompt: Tokens, limits: Limits, watch: CallWatch | None = None) -> None:
        self.n_prompt = len(prompt)
        self.n_tokens = self.n_prompt
        self.limits = limits
        self.finish: Finish | None = None if limits.max_tokens > 0 else Finish("length")
        self._tokens = np.empty(self.n_prompt + max(limits.max_tokens, 0), dtype=np.int32)
        self._tokens[: self.n_prompt] = prompt
        self._utf8 = Utf8Stream()
        self._matcher = StopMatcher(limits.stop)
        self._watch = watch if limits.stop else None

    @property
    def buffer(self) -> Tokens:
        """The array that `tokens` is the beginning of; generated tokens are written into it."""
        return self._tokens

    @property
    def tokens(self) -> Tokens:
        """A view of the prompt and the generated tokens."""
        return self._tokens[: self.n_tokens]

    @property
    def n_generated(self) -> int:
        """Generated tokens, those of earlier workers and a final end token included."""
        return self.n_tokens - self.n_prompt

    def take(self, token: int) -> None:
        """Note the next token; `read` is to follow."""
        self._tokens[self.n_tokens] = token
        self.n_tokens += 1

    def read(self, place: int, piece: bytes, *, ends: bool) -> str:
        """The text that may be shown with the token at `place`, after all before it were read.

        `piece` is the token's text, `ends` whether the model ends its answer with this token.
        Sets `finish` with the last token; the text returned with it is the rest of the answer.
        """
        text, rest = self._read(place, piece, ends=ends)
        return text + rest

    def surely_ends(self, *, ends: bool) -> bool:
        """Whether the last token that was taken ends the answer, whatever its text."""
        return (ends and not self.limits.ignore_eos) or self.n_generated >= self.limits.max_tokens

    def end(self) -> str:
        """End a generation that nothing else ended, as if the model had; returns the rest."""
        return self._close("stop", self.n_generated)

    def replay(
        self, tokens: Sequence[int], piece: Callable[[int], bytes], ends: Callable[[int], bool]
    ) -> str:
        """Take tokens that an earlier worker generated; returns text that was never shown.

        That is nothing, unless the tokens already end the answer: then it is what was held back.
        Tokens after the end are dropped.
        """
        rest = ""
        for token in tokens:
            if self.finish is not None:
                break
            self.take(token)
            _, rest = self._read(self.n_tokens - 1, piece(token), ends=ends(token))
        return rest

    def _read(self, place: int, piece: bytes, *, ends: bool) -> tuple[str, str]:
        """The text that a token brings, and what was held back and comes with the end."""
        n_generated = place + 1 - self.n_prompt
        if ends and not self.limits.ignore_eos:
            return "", self._close("stop", n_generated)
        text, found = self._match(self._utf8.push(piece), n_generated)
        if found is not None:
            self.finish = Finish("stop", found)
            return text, ""
        if n_generated >= self.limits.max_tokens:
            return text, self._close("length", n_generated)
        return text, ""

    def _match(self, text: str, n_generated: int) -> tuple[str, str | None]:
        if self._watch is not None and self._watch.push(text):
            return self._matcher.flush() + text, None
        if n_generated <= self.limits.min_tokens:
            return text, None
        return self._matcher.push(text)

    def _close(self, reason: FinishReason, n_generated: int) -> str:
        text, found = self._match(self._utf8.finish(), n_generated)
        self.finish = Finish("stop", found) if found is not None else Finish(reason)
        return text if found is not None else text + self._matcher.flush()
