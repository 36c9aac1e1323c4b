"""Calls whose arguments are marked up one by one: Qwen3-Coder, GLM 4.5, Gemma.

Their values are plain text, so the function's schema says which of them are strings.
"""

import json
import re
from collections.abc import Generator, Mapping
from typing import Any

from kvserve.dialects.json_calls import hermes_body
from kvserve.dialects.parts import Parts, parse_json, write_json
from kvserve.dialects.tape import Reading, Tape

Types = Mapping[str, Mapping[str, frozenset[str]]]
"""For each function, what each of its parameters may be: JSON schema's types."""

_ANY: frozenset[str] = frozenset()
_ONLY_STRING = frozenset({"string"})
_DEEPEST = 64
"""Alternatives within alternatives of a schema that are looked into."""
_NAME = re.compile(r"([^<>\n]{1,128})>")
_escape = json.JSONEncoder(ensure_ascii=False).encode


def types_of(schema: object) -> dict[str, frozenset[str]]:
    """What each property of an object's JSON schema may be; nothing where that is not plain."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        return {}
    return {str(name): _types(one) for name, one in properties.items()}


def _types(schema: object, depth: int = 0) -> frozenset[str]:
    if not isinstance(schema, dict) or depth > _DEEPEST:
        return _ANY
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(str(one) for one in kind)
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices):
        return _ONLY_STRING
    several = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(several, list):
        each = [_types(one, depth + 1) for one in several]
        return frozenset().union(*each) if all(each) else _ANY
    return _ANY


def read_value(text: str, types: frozenset[str]) -> str:
    """A value's JSON text: as it stands where it is JSON of another type than a string that may be
    meant, else a string."""
    if types == _ONLY_STRING:
        return _escape(text)
    value = parse_json(text)
    if "string" in types and not _is_of(value, types - _ONLY_STRING):
        return _escape(text)
    if value is None and text.strip() != "null":
        return _escape(text)
    return write_json(value) or "null"


def _is_of(value: object, types: frozenset[str]) -> bool:
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return bool(types & {"integer", "number"})
        case float():
            return "number" in types
        case list():
            return "array" in types
        case _:
            return isinstance(value, dict) and "object" in types


class _Object:
    """Writes the arguments' JSON object member by member."""

    def __init__(self, parts: Parts, types: Mapping[str, frozenset[str]]) -> None:
        self._parts = parts
        self._types = types
        self._n = 0
        parts.arguments("{")

    def types(self, key: str) -> frozenset[str]:
        return self._types.get(key, _ANY)

    def key(self, key: str) -> None:
        self._parts.arguments(f"{', ' if self._n else ''}{_escape(key)}: ")
        self._n += 1

    def value(self, text: str) -> None:
        self._parts.arguments(text)

    def end(self) -> None:
        self._parts.arguments("}")


class _StringValue:
    """Writes a string as it comes, without one line break at its beginning and its end."""

    def __init__(self, out: _Object) -> None:
        self._out = out
        self._begun = False
        self._held = ""
        out.value('"')

    def tell(self, text: str) -> None:
        if not text:
            return
        if not self._begun:
            self._begun = True
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._out.value(_escape(text.removesuffix("\n"))[1:-1])

    def end(self) -> None:
        self._out.value('"')


def qwen_xml(tape: Tape, parts: Parts, types: Types) -> Reading:
    """`<tool_call><function=name><parameter=key>value</parameter>…</function></tool_call>`; some
    answers leave the outer marks out."""
    marks = ("<tool_call>", "<function=", "</tool_call>")
    while True:
        mark = yield from tape.until(marks, parts.content)
        if mark is None:
            return
        if mark == marks[0]:
            if (yield from tape.begins("{")) is not None:
                yield from _as_json(tape, parts)
            elif (yield from tape.begins("<function=")) is None:
                parts.content(mark)
        elif mark == marks[1]:
            name = yield from tape.head(_NAME)
            if name is None:
                parts.content(mark)
            else:
                parts.call(name[1].strip())
                out = _Object(parts, types.get(name[1].strip(), {}))
                yield from _parameters(tape, parts, out)
                out.end()


def _parameters(tape: Tape, parts: Parts, out: _Object) -> Reading:
    marks = ("<parameter=", "</function>", "</tool_call>")
    while (yield from tape.until(marks, parts.content)) == marks[0]:
        key = yield from tape.head(_NAME)
        if key is None:
            parts.content(marks[0])
            continue
        name = key[1].strip()
        out.key(name)
        if out.types(name) == _ONLY_STRING:
            string = _StringValue(out)
            yield from tape.until(("</parameter>",), string.tell)
            string.end()
            continue
        said: list[str] = []
        yield from tape.until(("</parameter>",), said.append)
        text = "".join(said).removeprefix("\n").removesuffix("\n")
        out.value(read_value(text, out.types(name)))


_GLM_NAME = re.compile(r"\s{0,64}([^\s<>{]{1,128})\s{0,64}(?=<)")


def glm(tape: Tape, parts: Parts, types: Types) -> Reading:
    """`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value>…</tool_call>`."""
    while (yield from tape.until(("<tool_call>",), parts.content)) is not None:
        name = yield from tape.head(_GLM_NAME)
        if name is None:
            yield from _as_json(tape, parts)
            continue
        parts.call(name[1])
        out = _Object(parts, types.get(name[1], {}))
        while (yield from tape.until(("<arg_key>", "</tool_call>"), parts.content)) == "<arg_key>":
            key = yield from _until(tape, "</arg_key>")
            yield from tape.until(("<arg_value>",), parts.content)
            value = yield from _until(tape, "</arg_value>")
            out.key(key.strip())
            out.value(read_value(value, out.types(key.strip())))
        out.end()


def _as_json(tape: Tape, parts: Parts) -> Reading:
    if (yield from hermes_body(tape, parts)) == "<tool_call>":
        tape.text = "<tool_call>" + tape.text


def _until(tape: Tape, mark: str) -> Generator[None, None, str]:
    said: list[str] = []
    yield from tape.until((mark,), said.append)
    return "".join(said)


_GEMMA_NAME = re.compile(r"\s{0,64}call:([^\s<>{]{1,128})(?=\{)")


def gemma(tape: Tape, parts: Parts, begin: str, end: str, quote: str) -> Reading:
    """`<start_function_call>call:name{key:<escape>text<escape>,key:1}<end_function_call>`, with the
    marks `begin` and `end`, and `quote` about strings."""
    marks = (end, begin)
    mark = yield from tape.until(marks[1:], parts.content)
    while mark is not None:
        name = yield from tape.head(_GEMMA_NAME, marks)
        body, mark = yield from tape.collect(marks)
        written = None if name is None else write_json(read_bare(body.strip(), quote))
        if name is None or written is None:
            parts.content(f"{marks[1]}{name[0] if name else ''}{body}")
        else:
            parts.call(name[1])
            parts.arguments(written)
        if mark != marks[1]:
            mark = yield from tape.until(marks[1:], parts.content)


_BARE = re.compile(r"([{}\[\],:])|([^{}\[\],:<]+)")


def read_bare(text: str, quote: str) -> dict[str, Any] | None:
    """Gemma's objects: JSON with bare keys, and with `quote` about strings."""
    written: list[str] = []
    place = 0
    while place < len(text):
        if text.startswith(quote, place):
            end = text.find(quote, place + len(quote))
            if end < 0:
                return None
            written.append(_escape(text[place + len(quote) : end]))
            place = end + len(quote)
            continue
        match = _BARE.match(text, place)
        if match is None:
            return None
        place = match.end()
        if match[1] is not None:
            written.append(match[1])
        else:
            word = match[2].strip()
            is_key = text[place : place + 1] == ":"
            value = parse_json(word)
            is_json = isinstance(value, str) or word in ("", "null")
            is_bare = is_key or value is None
            written.append(_escape(word) if is_bare and not is_json else word)
    value = parse_json("".join(written))
    return value if isinstance(value, dict) else None
