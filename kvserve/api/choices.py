"""One choice of a chat's answer: its parts, and how OpenAI writes its calls."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from kvserve.api.likelihoods import Entry, Json
from kvserve.dialects.form import MISTRAL, Form
from kvserve.dialects.parts import Arguments, CallBegun, Content, Part, Reasoning


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer; `entries` are None where likelihoods are not wanted."""

    parts: tuple[Part, ...]
    reason: str
    entries: tuple[Entry, ...] | None = None

    @property
    def text(self) -> str:
        """The text for the user."""
        return "".join(part.text for part in self.parts if isinstance(part, Content))

    @property
    def reasoning(self) -> str:
        """What the model said to itself."""
        return "".join(part.text for part in self.parts if isinstance(part, Reasoning))


class CallWriter:
    """Writes the calls of one choice, with an id for each; `form` is that of the answer."""

    def __init__(self, form: Form | None) -> None:
        self._form = form
        self._n = 0

    def whole(self, parts: Sequence[Part]) -> list[Json]:
        """The calls of a whole answer."""
        calls: list[Json] = []
        for part in parts:
            if isinstance(part, CallBegun):
                calls.append(self._begun(part.name))
            elif isinstance(part, Arguments):
                calls[-1]["function"]["arguments"] += part.text
        return calls

    def delta(self, part: Part) -> Json:
        """A part of an answer that is not plain text, as a `delta`."""
        match part:
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallBegun(name):
                return {"tool_calls": [{"index": self._n, **self._begun(name)}]}
            case Arguments(text):
                call = {"index": self._n - 1, "function": {"arguments": text}}
                return {"tool_calls": [call]}
            case Content(text):
                return {"content": text}

    def reason(self, reason: str) -> str:
        """The `finish_reason`."""
        return "tool_calls" if self._n and reason == "stop" else reason

    def _begun(self, name: str) -> Json:
        self._n += 1
        is_mistral = self._form is not None and self._form.calls == MISTRAL
        # Mistral's templates take nine letters and digits.
        identifier = uuid.uuid4().hex[:9] if is_mistral else f"call_{uuid.uuid4().hex[:24]}"
        return {"id": identifier, "type": "function", "function": {"name": name, "arguments": ""}}
