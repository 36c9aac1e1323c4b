"""Log probabilities in OpenAI's two shapes, and which tokens belong to a text."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvserve.ipc.messages import Likelihood, TextPrompt, TokenLogprobs
from kvserve.supervisor.admission import Done, Echoed, GenerationSpec, Text

Json = dict[str, Any]

_LEAST = -9999.0
"""What OpenAI writes for a probability of zero; JSON has no infinity."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One token of a text, at `offset` characters. `likelihoods` are None for the first token of a
    prompt, which has none."""

    piece: bytes
    offset: int
    likelihoods: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class Said:
    """New text of a choice and the tokens that can be told with it."""

    text: str
    entries: tuple[Entry, ...] = ()


class Transcript:
    """Follows one choice: matches its text, which may be held back for a stop string or a split
    character, with the likelihoods of its tokens, which are not.

    A token is told once its first character was shown, so what a stop string cut off is never told.
    A token that ends the answer has no text: it is told where `tells_end`.
    """

    def __init__(self, spec: GenerationSpec, *, tells_end: bool) -> None:
        self._prompt = spec.prompt
        self._wants = spec.n_logprobs is not None
        self._tells_end = tells_end
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._n_decoded = 0
        self._n_shown = 0
        self._held: list[Entry] = []

    def take(self, event: Echoed | Text | Done) -> Said:
        """What can be told after this event."""
        match event:
            case Echoed():
                return self._echo(event)
            case Text():
                for one in event.logprobs if self._wants else ():
                    self._held.append(Entry(one.drawn.piece, self._n_decoded, one))
                    self._n_decoded += len(self._decoder.decode(one.drawn.piece))
                self._n_shown += len(event.text)
                return Said(event.text, self._release())
            case Done():
                return Said("", self._last() if self._tells_end else ())

    def _release(self) -> tuple[Entry, ...]:
        n = sum(entry.offset < self._n_shown for entry in self._held)
        released = tuple(self._held[:n])
        del self._held[:n]
        return released

    def _last(self) -> tuple[Entry, ...]:
        if any(entry.piece for entry in self._held):
            return ()
        return tuple(self._held)

    def _echo(self, echoed: Echoed) -> Said:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        parts = [decoder.decode(piece) for piece in echoed.pieces]
        parts.append(decoder.decode(b"", final=True))
        text = "".join(parts)
        if isinstance(self._prompt, TextPrompt):
            # A tokenizer may write a blank before the text.
            n_before = max(0, len(text) - len(self._prompt.text))
            text = self._prompt.text
        else:
            n_before = 0
        self._n_decoded = self._n_shown = len(text)
        if not self._wants:
            return Said(text)
        entries, offset = [], -n_before
        likelihoods = (None, *echoed.logprobs)
        for piece, part, one in zip(echoed.pieces, parts, likelihoods, strict=False):
            entries.append(Entry(piece, max(0, offset), one))
            offset += len(part)
        return Said(text, tuple(entries))


def chat_logprobs(entries: Sequence[Entry]) -> Json:
    """The `logprobs` of a choice of `/v1/chat/completions`."""
    content = []
    for entry in entries:
        assert entry.likelihoods is not None
        top = [_chat_token(one) for one in entry.likelihoods.top]
        content.append({**_chat_token(entry.likelihoods.drawn), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[Entry]) -> Json:
    """The `logprobs` of a choice of `/v1/completions`. `top_logprobs` holds the token itself too,
    also where it is not among the likeliest; of several tokens with one text, the likeliest."""
    tops: list[dict[str, float] | None] = []
    for entry in entries:
        if entry.likelihoods is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for one in (*entry.likelihoods.top, entry.likelihoods.drawn):
            top.setdefault(_legacy_text(one.piece), _finite(one.logprob))
        tops.append(top)
    return {
        "tokens": [_legacy_text(entry.piece) for entry in entries],
        "token_logprobs": [
            None if entry.likelihoods is None else _finite(entry.likelihoods.drawn.logprob)
            for entry in entries
        ],
        "top_logprobs": tops,
        "text_offset": [entry.offset for entry in entries],
    }


def _chat_token(one: Likelihood) -> Json:
    return {
        "token": one.piece.decode("utf-8", "backslashreplace"),
        "logprob": _finite(one.logprob),
        "bytes": list(one.piece),
    }


def _legacy_text(piece: bytes) -> str:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
