"""OpenAI's two response formats, whole and as chunks of a stream.

A stream's chunks differ in their text and likelihoods, so each is those between prepared parts.
"""

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvserve.api.choices import CallWriter, Choice
from kvserve.api.likelihoods import Entry, Json, chat_logprobs, completion_logprobs
from kvserve.dialects.form import Form
from kvserve.dialects.parts import Content, Part
from kvserve.dialects.reader import Reader
from kvserve.ipc.messages import ChatPrompt, Prompt
from kvserve.supervisor.admission import Done

# Stand where a chunk's parts will be; random, so that no model name or fingerprint contains them.
_HOLE = uuid.uuid4().hex
_DELTA_HOLE = uuid.uuid4().hex
_LOGPROBS_HOLE = uuid.uuid4().hex

# Escaping all but ASCII keeps U+2028 and the like out of the stream: clients that split lines as
# Unicode does would end an event there.
_encode_string = json.JSONEncoder(ensure_ascii=True).encode


def encode(value: Json) -> str:
    """A value as compact ASCII JSON."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def usage_of(ends: Sequence[Done], n_choices: int = 1) -> Json:
    """The `usage` object of one answer to several prompts, `n_choices` ends for each: a prompt
    counts once, as its first choice found it in the cache."""
    n_prompt = sum(end.n_prompt_tokens for end in ends[::n_choices])
    n_generated = sum(end.n_generated_tokens for end in ends)
    n_cached = sum(end.n_cached_tokens for end in ends[::n_choices])
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": n_cached},
    }


@dataclass(frozen=True, slots=True)
class ChunkWriter:
    """Makes the chunks of one choice. `opening` precedes the text, None where nothing does;
    `logprobs` writes likelihoods, None where they are not wanted."""

    opening: str | None
    before_text: str
    after_text: str
    after_logprobs: str
    before_reason: str
    after_reason: str
    before_delta: str
    after_delta: str
    after_delta_logprobs: str
    calls: CallWriter
    logprobs: Callable[[Sequence[Entry]], Json] | None

    def text(self, text: str, entries: Sequence[Entry] = ()) -> str:
        """A chunk with new text and what is told of its tokens."""
        start = f"{self.before_text}{_encode_string(text)}{self.after_text}"
        if self.logprobs is None:
            return start
        return f"{start}{encode(self.logprobs(entries))}{self.after_logprobs}"

    def part(self, part: Part, entries: Sequence[Entry] = ()) -> str:
        """A chunk with a part of the answer and what is told of its tokens."""
        if isinstance(part, Content):
            return self.text(part.text, entries)
        start = f"{self.before_delta}{encode(self.calls.delta(part))}{self.after_delta}"
        if self.logprobs is None:
            return start
        return f"{start}{encode(self.logprobs(entries))}{self.after_delta_logprobs}"

    def closing(self, reason: str) -> str:
        """The choice's last chunk."""
        reason = self.calls.reason(reason)
        return f"{self.before_reason}{_encode_string(reason)}{self.after_reason}"


class Format(Protocol):
    """One endpoint's way to write an answer that has an id already."""

    @property
    def tells_end(self) -> bool:
        """Whether likelihoods include the token that ends an answer."""
        ...

    def whole(
        self, choices: Sequence[Choice], usage: Json, fingerprint: str, form: Form | None = None
    ) -> Json:
        """The answer of a request that does not stream."""
        ...

    def writer(
        self,
        index: int,
        fingerprint: str,
        form: Form | None = None,
        *,
        with_usage: bool,
        with_logprobs: bool,
    ) -> ChunkWriter:
        """What writes the chunks of choice `index`; `with_usage` as OpenAI's include_usage."""
        ...

    def reader(self, prompt: Prompt, form: Form | None) -> Reader | None:
        """What reads the answer to a prompt; None where it is plain text."""
        ...

    def usage_chunk(self, usage: Json, fingerprint: str) -> str:
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

    def usage_chunk(self, kind: str, fingerprint: str, usage: Json) -> str:
        return encode({**self.head(kind, fingerprint), "choices": [], "usage": usage})


class ChatFormat:
    """`/v1/chat/completions`."""

    tells_end = False

    def __init__(self, model: str, created: int, *, keeps_reasoning: bool = False) -> None:
        self._keeps_reasoning = keeps_reasoning
        self._functions: dict[str, object] | None = None
        self._answer = _Answer(f"chatcmpl-{uuid.uuid4().hex}", model, created)

    def reader(self, prompt: Prompt, form: Form | None) -> Reader | None:
        """Reads reasoning, and calls where there are tools."""
        if form is None or not isinstance(prompt, ChatPrompt):
            return None
        if prompt.tools is not None and self._functions is None:
            # Once for all choices: a megabyte takes 20 ms, and the loop waits.
            tools = [one["function"] for one in json.loads(prompt.tools.text)]
            self._functions = {one["name"]: one["parameters"] for one in tools}
        return Reader(form, self._functions, keeps_reasoning=self._keeps_reasoning)

    def whole(
        self, choices: Sequence[Choice], usage: Json, fingerprint: str, form: Form | None = None
    ) -> Json:
        """A `chat.completion` object."""
        written = [_chat_choice(index, choice, form) for index, choice in enumerate(choices)]
        head = self._answer.head("chat.completion", fingerprint)
        return {**head, "choices": written, "usage": usage}

    def writer(
        self,
        index: int,
        fingerprint: str,
        form: Form | None = None,
        *,
        with_usage: bool,
        with_logprobs: bool,
    ) -> ChunkWriter:
        """Chunks whose first one names the role."""

        def chunk(delta: Json | str, reason: str | None, logprobs: str | None = None) -> str:
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
            return self._answer.chunk(
                "chat.completion.chunk", fingerprint, choice, with_usage=with_usage
            )

        return _chunk_writer(
            chunk({"role": "assistant", "content": "", "refusal": None}, None),
            chunk({"content": _HOLE}, None, _LOGPROBS_HOLE if with_logprobs else None),
            chunk({}, _HOLE),
            chat_logprobs if with_logprobs else None,
            chunk(_DELTA_HOLE, None, _LOGPROBS_HOLE if with_logprobs else None),
            form,
        )

    def usage_chunk(self, usage: Json, fingerprint: str) -> str:
        """A `chat.completion.chunk` without choices."""
        return self._answer.usage_chunk("chat.completion.chunk", fingerprint, usage)


class CompletionFormat:
    """`/v1/completions`."""

    # lm-eval takes the last token of an echo for the one that was generated, whatever it is.
    tells_end = True

    def __init__(self, model: str, created: int) -> None:
        self._answer = _Answer(f"cmpl-{uuid.uuid4().hex}", model, created)

    def reader(self, _prompt: Prompt, _form: Form | None) -> Reader | None:
        """Completions are plain text."""
        return None

    def whole(
        self, choices: Sequence[Choice], usage: Json, fingerprint: str, _form: Form | None = None
    ) -> Json:
        """A `text_completion` object."""
        written = [
            _text_choice(
                index,
                choice.text,
                choice.reason,
                None if choice.entries is None else completion_logprobs(choice.entries),
            )
            for index, choice in enumerate(choices)
        ]
        head = self._answer.head("text_completion", fingerprint)
        return {**head, "choices": written, "usage": usage}

    def writer(
        self,
        index: int,
        fingerprint: str,
        _form: Form | None = None,
        *,
        with_usage: bool,
        with_logprobs: bool,
    ) -> ChunkWriter:
        """Chunks of text."""

        def chunk(text: str, reason: str | None, logprobs: str | None = None) -> str:
            choice = _text_choice(index, text, reason, logprobs)
            return self._answer.chunk("text_completion", fingerprint, choice, with_usage=with_usage)

        return _chunk_writer(
            None,
            chunk(_HOLE, None, _LOGPROBS_HOLE if with_logprobs else None),
            chunk("", _HOLE),
            completion_logprobs if with_logprobs else None,
        )

    def usage_chunk(self, usage: Json, fingerprint: str) -> str:
        """A `text_completion` without choices."""
        return self._answer.usage_chunk("text_completion", fingerprint, usage)


def _chat_choice(index: int, choice: Choice, form: Form | None) -> Json:
    writer = CallWriter(form)
    calls = writer.whole(choice.parts)
    text = choice.text
    message: Json = {
        "role": "assistant",
        "content": None if calls and not text else text,
        "refusal": None,
    }
    if choice.reasoning:
        message["reasoning_content"] = choice.reasoning
    if calls:
        message["tool_calls"] = calls
    return {
        "index": index,
        "message": message,
        "logprobs": None if choice.entries is None else chat_logprobs(choice.entries),
        "finish_reason": writer.reason(choice.reason),
    }


def _text_choice(index: int, text: str, reason: str | None, logprobs: Json | str | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


def _chunk_writer(
    opening: str | None,
    with_text: str,
    with_reason: str,
    logprobs: Callable[[Sequence[Entry]], Json] | None,
    with_delta: str = "",
    form: Form | None = None,
) -> ChunkWriter:
    hole = _encode_string(_HOLE)
    before_text, _, rest = with_text.partition(hole)
    after_text, _, after_logprobs = rest.partition(_encode_string(_LOGPROBS_HOLE))
    before_reason, _, after_reason = with_reason.partition(hole)
    before_delta, _, rest = with_delta.partition(_encode_string(_DELTA_HOLE))
    after_delta, _, after_delta_logprobs = rest.partition(_encode_string(_LOGPROBS_HOLE))
    return ChunkWriter(
        opening,
        before_text,
        after_text,
        after_logprobs,
        before_reason,
        after_reason,
        before_delta,
        after_delta,
        after_delta_logprobs,
        CallWriter(form),
        logprobs,
    )
