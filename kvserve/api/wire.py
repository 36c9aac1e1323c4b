"""OpenAI's two response formats, whole and as chunks of a stream.

A stream's chunks differ in one string, so each is that string between two prepared halves.
"""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvserve.supervisor.admission import Done

Json = dict[str, Any]

# Stands where a chunk's string will be; random, so that no model name or fingerprint contains it.
_HOLE = uuid.uuid4().hex

# Escaping all but ASCII keeps U+2028 and the like out of the stream: clients that split lines as
# Unicode does would end an event there.
_encode_string = json.JSONEncoder(ensure_ascii=True).encode


def encode(value: Json) -> str:
    """A value as compact ASCII JSON."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def usage_of(ends: Sequence[Done]) -> Json:
    """The `usage` object of one answer to several prompts."""
    n_prompt = sum(end.n_prompt_tokens for end in ends)
    n_generated = sum(end.n_generated_tokens for end in ends)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": sum(end.n_cached_tokens for end in ends)},
    }


@dataclass(frozen=True, slots=True)
class ChunkWriter:
    """Makes the chunks of one choice. `opening` precedes the text, None where nothing does."""

    opening: str | None
    before_text: str
    after_text: str
    before_reason: str
    after_reason: str

    def text(self, text: str) -> str:
        """A chunk with new text."""
        return f"{self.before_text}{_encode_string(text)}{self.after_text}"

    def closing(self, reason: str) -> str:
        """The choice's last chunk."""
        return f"{self.before_reason}{_encode_string(reason)}{self.after_reason}"


class Format(Protocol):
    """One endpoint's way to write an answer that has an id already."""

    def whole(self, texts: Sequence[str], ends: Sequence[Done], fingerprint: str) -> Json:
        """The answer of a request that does not stream, one choice for each text."""
        ...

    def writer(self, index: int, fingerprint: str, *, with_usage: bool) -> ChunkWriter:
        """What writes the chunks of choice `index`; `with_usage` as OpenAI's include_usage."""
        ...

    def usage_chunk(self, ends: Sequence[Done], fingerprint: str) -> str:
        """The last chunk of a stream with include_usage."""
        ...


@dataclass(frozen=True, slots=True)
class _Answer:
    id: str
    model: str
    created: int

    def head(self, kind: str, fingerprint: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint,
        }

    def chunk(self, kind: str, fingerprint: str, choice: Json, *, with_usage: bool) -> str:
        null_usage = {"usage": None} if with_usage else {}
        return encode({**self.head(kind, fingerprint), "choices": [choice], **null_usage})

    def usage_chunk(self, kind: str, fingerprint: str, ends: Sequence[Done]) -> str:
        return encode({**self.head(kind, fingerprint), "choices": [], "usage": usage_of(ends)})


class ChatFormat:
    """`/v1/chat/completions`."""

    def __init__(self, model: str, created: int) -> None:
        self._answer = _Answer(f"chatcmpl-{uuid.uuid4().hex}", model, created)

    def whole(self, texts: Sequence[str], ends: Sequence[Done], fingerprint: str) -> Json:
        """A `chat.completion` object."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end.reason,
            }
            for index, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        head = self._answer.head("chat.completion", fingerprint)
        return {**head, "choices": choices, "usage": usage_of(ends)}

    def writer(self, index: int, fingerprint: str, *, with_usage: bool) -> ChunkWriter:
        """Chunks whose first one names the role."""

        def chunk(delta: Json, reason: str | None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return self._answer.chunk(
                "chat.completion.chunk", fingerprint, choice, with_usage=with_usage
            )

        opening = chunk({"role": "assistant", "content": "", "refusal": None}, None)
        return _chunk_writer(opening, chunk({"content": _HOLE}, None), chunk({}, _HOLE))

    def usage_chunk(self, ends: Sequence[Done], fingerprint: str) -> str:
        """A `chat.completion.chunk` without choices."""
        return self._answer.usage_chunk("chat.completion.chunk", fingerprint, ends)


class CompletionFormat:
    """`/v1/completions`."""

    def __init__(self, model: str, created: int) -> None:
        self._answer = _Answer(f"cmpl-{uuid.uuid4().hex}", model, created)

    def whole(self, texts: Sequence[str], ends: Sequence[Done], fingerprint: str) -> Json:
        """A `text_completion` object."""
        choices = [
            _text_choice(index, text, end.reason)
            for index, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        head = self._answer.head("text_completion", fingerprint)
        return {**head, "choices": choices, "usage": usage_of(ends)}

    def writer(self, index: int, fingerprint: str, *, with_usage: bool) -> ChunkWriter:
        """Chunks of text."""

        def chunk(text: str, reason: str | None) -> str:
            choice = _text_choice(index, text, reason)
            return self._answer.chunk("text_completion", fingerprint, choice, with_usage=with_usage)

        return _chunk_writer(None, chunk(_HOLE, None), chunk("", _HOLE))

    def usage_chunk(self, ends: Sequence[Done], fingerprint: str) -> str:
        """A `text_completion` without choices."""
        return self._answer.usage_chunk("text_completion", fingerprint, ends)


def _text_choice(index: int, text: str, reason: str | None) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def _chunk_writer(opening: str | None, with_text: str, with_reason: str) -> ChunkWriter:
    hole = _encode_string(_HOLE)
    before_text, _, after_text = with_text.partition(hole)
    before_reason, _, after_reason = with_reason.partition(hole)
    return ChunkWriter(opening, before_text, after_text, before_reason, after_reason)
