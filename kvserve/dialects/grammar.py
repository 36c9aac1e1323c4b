"""Grammars for calls, in llguidance's dialect of Lark: what must follow so that a call is one."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvserve.dialects.form import (
    DEEPSEEK,
    FUNCTION_GEMMA,
    FUNCTION_GEMMA_MARKS,
    GEMMA4,
    GEMMA4_MARKS,
    GLM,
    HARMONY,
    LLAMA3,
    MISTRAL,
    QWEN_XML,
    Form,
)

Mark = Callable[[str], str]
"""Writes a marker as a grammar's symbol: a special token or a text."""

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,16}"
"""Between JSON tokens. Without a bound, small models write blanks to the end of the context."""

_ANY_TEXT = "ANY: /(.|\\n)+/"


@dataclass(frozen=True, slots=True)
class CallGrammars:
    """Writes grammars for calls of `functions`, which maps names to their parameters' schemas."""

    form: Form
    functions: Mapping[str, object]
    parallel: bool
    mark: Mark

    def whole(self) -> str:
        """An answer that calls: reasoning, where the model has it, then calls and no text."""
        return self._grammar(f"{self._reasoning()} calls")

    def or_json(self, schema: object) -> str:
        """An answer that calls, or is JSON of `schema`."""
        answer = f"answer: {_json(schema)}"
        return f"{self._grammar(f'{self._reasoning()} (calls | answer)')}\n{answer}"

    def after_trigger(self) -> str:
        """The rest of an answer after the mark that `CallWatch` sees: that call, and where
        `parallel` further ones."""
        return self._grammar("rest")

    def _grammar(self, start: str) -> str:
        names = list(self.functions)
        rules = [
            "%llguidance {}",
            f"start: {start}",
            *self._rules(),
            "call: " + " | ".join(f"call_{i}" for i in range(len(names))),
            *(
                rule
                for i, name in enumerate(names)
                for rule in self._call(f"call_{i}", name, self.functions[name])
            ),
            _ANY_TEXT,
            'NL: "\\n"',
        ]
        if self.form.end_think:
            rules.append(self._end_of_reasoning())
        return "\n".join(rules)

    def _reasoning(self) -> str:
        if self.form.calls == HARMONY:
            channel, message = self.mark("<|channel|>"), self.mark("<|message|>")
            end, start = self.mark("<|end|>"), self.mark("<|start|>")
            return f'({channel} "analysis" {message} ANY {end} {start} "assistant")?'
        if not self.form.end_think:
            return ""
        blanks = "(NL NL?)?"
        if self.form.thinking:
            return f"thought {blanks}"
        return f"({self.mark(self.form.think)} thought {blanks})?"

    def _end_of_reasoning(self) -> str:
        mark = self.mark(self.form.end_think)
        if mark.startswith("<["):
            return f"thought: ANY? {mark}"
        return f"thought[lazy]: /(.|\\n)*/ {mark}"

    def _rules(self) -> Iterable[str]:
        """`calls`, and `rest`, which is the same after its trigger."""
        mark = self.mark
        match self.form.calls:
            case _ if self.form.calls == LLAMA3:
                # Its templates show one call for each answer, and so do gpt-oss's.
                yield from ("calls: call", "rest: call")
            case _ if self.form.calls == HARMONY:
                channel, constrain = mark("<|channel|>"), mark("<|constrain|>")
                is_json = f'(" "? {constrain} | " ") "json"'
                yield f"calls: {channel} {_text('commentary to=functions.')} call"
                yield f"json: {is_json} {mark('<|message|>')}"
                # The function may stand before the channel too.
                late = " | ".join(f"call_{i}_late" for i in range(len(self.functions)))
                yield f"rest: call | {late}"
                yield f'late: {channel} "commentary" ({is_json})? {mark("<|message|>")}'
            case _ if self.form.calls == MISTRAL:
                begin, more_listed = mark("[TOOL_CALLS]"), self._more('", " call')
                if self.form.listed:
                    yield f"calls: {begin} rest"
                    yield f'rest: "[" call {more_listed} "]"'
                else:
                    yield f"calls: {begin} rest"
                    yield f"rest: call {self._more(f'{begin} call')}"
            case _ if self.form.calls == DEEPSEEK:
                yield f"calls: {mark('<｜tool▁calls▁begin｜>')} rest"
                yield f"rest: call {self._more('NL? call')} {mark('<｜tool▁calls▁end｜>')}"
            case _ if self.form.calls in (FUNCTION_GEMMA, GEMMA4):
                begin, end, _ = map(mark, self._gemma_marks)
                yield f"calls: {begin} rest"
                yield f"rest: call {end} {self._more(f'{begin} call {end}')}"
            case _:
                begin, end = mark("<tool_call>"), mark("</tool_call>")
                gap = "" if self.form.calls == GLM else "NL"
                yield f"calls: {begin} rest"
                one = f"{gap} call NL {end}"
                yield f"rest: {one} {self._more(f'NL? {begin} {one}')}"

    @property
    def _gemma_marks(self) -> tuple[str, str, str]:
        return GEMMA4_MARKS if self.form.calls == GEMMA4 else FUNCTION_GEMMA_MARKS

    def _more(self, call: str) -> str:
        return f"({call})*" if self.parallel else ""

    def _call(self, rule: str, name: str, schema: object) -> Iterable[str]:
        mark = self.mark
        match self.form.calls:
            case _ if self.form.calls == HARMONY:
                yield f"{rule}: {_text(name)} json {_json(schema)}"
                yield f"{rule}_late: {_text(name)} late {_json(schema)}"
            case _ if self.form.calls == MISTRAL and not self.form.listed:
                yield f"{rule}: {_text(name)} {mark('[ARGS]')} {_json(schema)}"
            case _ if self.form.calls == DEEPSEEK:
                begin, end = mark("<｜tool▁call▁begin｜>"), mark("<｜tool▁call▁end｜>")
                separator = mark("<｜tool▁sep｜>")
                if self.form.listed:
                    fence = _text(f"{name}\n```json\n")
                    head = f'{begin} "function" {separator} {fence}'
                    yield f'{rule}: {head} {_json(schema)} "\\n```" {end}'
                else:
                    yield f"{rule}: {begin} {_text(name)} {separator} {_json(schema)} {end}"
            case _ if self.form.calls in (QWEN_XML, GLM, FUNCTION_GEMMA, GEMMA4):
                yield from self._members(rule, name, schema)
            case _:
                key = "parameters" if self.form.calls == LLAMA3 else "arguments"
                head = f'{{"name": {json.dumps(name)}, "{key}": '
                yield f'{rule}: {_text(head)} {_json(schema)} "}}"'

    def _members(self, rule: str, name: str, schema: object) -> Iterable[str]:
        """Calls whose arguments are marked up one by one, in the schema's order."""
        begin, before, after, end, gap = self._markup(name)
        members = _members_of(schema)
        if members is None:
            yield f"{rule}: {begin} ANY? {end}"
            return
        required = [i for i, (_, _, needed) in enumerate(members) if needed]
        order = sorted(range(len(members)), key=lambda i: i not in required) if gap else None
        written: list[str] = []
        for i in order or range(len(members)):
            key, value, needed = members[i]
            one = f"{rule}_{i}"
            first = bool(gap) and not written
            body = f"{'' if first else gap} {before(key)} {one}"
            if first and not needed:
                # Nothing is required, so that commas would depend on what came before.
                yield f"{rule}: {begin} {end}"
                return
            written.append(body if needed else f"({body})?")
            yield from _value(one, value, after, escaped=bool(gap))
        yield f"{rule}: {begin} {' '.join(written)} {end}"

    def _markup(self, name: str) -> tuple[str, Callable[[str], str], str, str, str]:
        mark = self.mark
        if self.form.calls == QWEN_XML:
            return (
                _text(f"<function={name}>\n"),
                lambda key: _text(f"<parameter={key}>\n"),
                _text("\n</parameter>\n"),
                _text("</function>"),
                "",
            )
        if self.form.calls == GLM:
            key_mark, end_key = mark("<arg_key>"), mark("</arg_key>")
            value_mark, end_value = mark("<arg_value>"), mark("</arg_value>")
            return (
                _text(name),
                lambda key: f"NL {key_mark} {_text(key)} {end_key} NL {value_mark}",
                end_value,
                "",
                "",
            )
        return (
            _text(f"call:{name}{{"),
            lambda key: _text(f"{key}:"),
            mark(self._gemma_marks[2]),
            '"}"',
            '","',
        )


def _value(rule: str, schema: object, after: str, *, escaped: bool) -> Iterable[str]:
    """A value of `schema` and the mark after it; strings are plain text up to that mark."""
    fixed = schema.get("enum") if isinstance(schema, dict) else None
    is_text = isinstance(schema, dict) and (
        schema.get("type") == "string"
        or ("type" not in schema and fixed and all(isinstance(one, str) for one in fixed))
    )
    before = after if escaped else ""
    if not is_text:
        yield f"{rule}: {_json(schema)} {'' if escaped else after}"
    elif fixed and all(isinstance(one, str) for one in fixed):
        choices = " | ".join(_text(one) for one in fixed if one)
        yield f"{rule}: {before} ({choices}) {after}"
    elif after.startswith("<["):
        yield f"{rule}: {before} ANY? {after}"
    else:
        yield f"{rule}: {before} {rule}_text"
        yield f"{rule}_text[lazy]: /(.|\\n)*/ {after}"


def _members_of(schema: object) -> list[tuple[str, object, bool]] | None:
    """The properties of an object's schema with their own ones, and which are required; None where
    the schema is more than a list of properties."""
    if not isinstance(schema, dict) or schema.get("type", "object") != "object":
        return None
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return None
    if any(key in schema for key in ("anyOf", "oneOf", "allOf", "not", "$ref", "if")):
        return None
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    return [
        (str(key), {**shared, **one} if isinstance(one, dict) else one, key in required)
        for key, one in properties.items()
    ]


def _json(schema: object) -> str:
    value: Any = schema
    if not isinstance(value, dict) or not value:
        value = {"type": "object"} if schema in (None, {}) else {}
    elif "type" not in value and "properties" in value:
        value = {**value, "type": "object"}
    return "%json " + json.dumps({**value, "x-guidance": {"whitespace_pattern": WHITESPACE}})


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
