"""Which dialect a chat template speaks, told from its source."""

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

Calls = Literal[
    "hermes",
    "qwen_xml",
    "glm",
    "llama3",
    "mistral",
    "deepseek",
    "harmony",
    "function_gemma",
    "gemma4",
]
HERMES: Final = "hermes"
QWEN_XML: Final = "qwen_xml"
GLM: Final = "glm"
LLAMA3: Final = "llama3"
MISTRAL: Final = "mistral"
DEEPSEEK: Final = "deepseek"
HARMONY: Final = "harmony"
FUNCTION_GEMMA: Final = "function_gemma"
GEMMA4: Final = "gemma4"

_CALLS: tuple[tuple[str, Calls | None], ...] = (
    ("<tool_calls>", None),
    ("<|channel|>", HARMONY),
    ("<｜tool▁calls▁begin｜>", DEEPSEEK),
    ("[TOOL_CALLS]", MISTRAL),
    ("<start_function_call>", FUNCTION_GEMMA),
    ("<|tool_call>call:", GEMMA4),
    ("<parameter=", QWEN_XML),
    ("<function=", None),
    ("<arg_key>", GLM),
    ("<tool_call>", HERMES),
    ("<|python_tag|>", LLAMA3),
)
"""The first text that the source contains decides; None for a dialect that is not known here."""

_REASONING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
_TOOLS = re.compile(r"\btools\b")

MARKERS = (
    *(mark for pair in _REASONING[:3] for mark in pair),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>", "<tool_call>", "</tool_call>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<start_function_call>", "<end_function_call>"),
    *("<escape>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
"""What the dialects are read by. Some vocabularies have them as control tokens, which have no text
otherwise."""

FUNCTION_GEMMA_MARKS = ("<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4_MARKS = ("<|tool_call>", "<tool_call|>", '<|"|>')
"""Before and after a call, and about a string."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one answer is written.

    `calls` is the dialect of calls. `think` and `end_think` enclose reasoning, empty where the
    model has none; `thinking` says that the prompt opened it already. `native` tells a template
    that shows tools itself from one for which kvserve writes them into a message. `listed` is the
    older way of two dialects: Mistral's calls as one JSON list, DeepSeek's arguments in a fence.
    """

    calls: Calls = HERMES
    think: str = ""
    end_think: str = ""
    thinking: bool = False
    native: bool = False
    listed: bool = False

    @property
    def reasons(self) -> bool:
        """Whether answers may hold reasoning apart from the text."""
        return bool(self.end_think) or self.calls == HARMONY

    def after(self, prompt: str) -> "Form":
        """The form of the answer to a rendered prompt."""
        return replace(self, thinking=bool(self.think) and prompt.rstrip().endswith(self.think))

    def going_on(self, answer: str) -> "Form":
        """The form of the rest of an answer that is continued."""
        opened = bool(self.think) and answer.rfind(self.think) > answer.rfind(self.end_think)
        return replace(self, thinking=opened)


def form_of(template: str) -> Form:
    """The form of answers under a template. A template that shows no tools, or in a way that is
    not known here, gets kvserve's own text, which asks for Hermes' way of calling."""
    calls = next((calls for mark, calls in _CALLS if mark in template), None)
    if "<|start_header_id|>" in template and '"parameters": ' in template:
        calls = LLAMA3
    native = calls is not None and (_TOOLS.search(template) is not None)
    if calls is None or not (native or calls == HARMONY):
        calls = HERMES
    listed = (calls == MISTRAL and "[ARGS]" not in template) or (
        calls == DEEPSEEK and "```json" in template
    )
    for think, end_think in _REASONING:
        if end_think in template and calls != HARMONY:
            return Form(calls, think, end_think, native=native, listed=listed)
    return Form(calls, native=native, listed=listed)
