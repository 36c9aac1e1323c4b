"""Calls whose arguments are JSON: Hermes and Qwen, Llama 3, Mistral, DeepSeek, gpt-oss.

What turns out to be no call is told as text, its marks included.
"""

import re
from collections.abc import Generator

from kvserve.dialects.parts import Parts, is_call, parse_json
from kvserve.dialects.tape import Reading, Tape

_OBJECT = re.compile(
    r'\s{0,64}\{\s{0,64}(?:"type"\s{0,8}:\s{0,8}"function"\s{0,8},\s{0,64})?'
    r'"name"\s{0,8}:\s{0,8}"([^"\\]{1,128})"\s{0,64},\s{0,64}'
    r'"(?:arguments|parameters)"\s{0,8}:\s{0,64}(?=\{)'
)
"""The beginning of a call that has its name first, up to the bracket of its arguments."""

_CLOSING = re.compile(r"[\s}]*")
_BRACE = re.compile(r"\s{0,64}\}")
_PYTHON = "<|python_tag|>"


def hermes(tape: Tape, parts: Parts) -> Reading:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them."""
    mark = yield from tape.until(("<tool_call>",), parts.content)
    while mark is not None:
        mark = yield from hermes_body(tape, parts)
        if mark != "<tool_call>":
            mark = yield from tape.until(("<tool_call>",), parts.content)


def hermes_body(tape: Tape, parts: Parts) -> Generator[None, None, str | None]:
    """What comes after `<tool_call>`; the mark that ended it: the closing one, or an opening one
    where a model forgot to close."""
    marks = ("</tool_call>", "<tool_call>")
    head = yield from tape.head(_OBJECT, marks)
    if head is None:
        body, mark = yield from tape.collect(marks)
        if not _whole(body, parts):
            parts.content(f"<tool_call>{body}{mark if mark == marks[0] else ''}")
        return mark
    said: list[str] = []
    yield from _stream(tape, parts, head[1], said)
    rest, mark = yield from tape.collect(marks)
    if not _CLOSING.fullmatch(rest) and not parse_json("".join((head[0], *said, rest))):
        parts.content(rest)
    return mark


def llama3(tape: Tape, parts: Parts, names: frozenset[str]) -> Reading:
    """`{"name": …, "parameters": {…}}` as the whole answer, or after `<|python_tag|>`; several with
    semicolons between them. Only a known name makes a call: nothing else tells it from text."""
    if (yield from tape.begins("{")) is not None:
        yield from _llama3_calls(tape, parts, names)
    while (yield from tape.until((_PYTHON,), parts.content)) is not None:
        yield from _llama3_calls(tape, parts, names)


def _llama3_calls(tape: Tape, parts: Parts, names: frozenset[str]) -> Reading:
    while True:
        head = yield from tape.head(_OBJECT, (_PYTHON,))
        if head is None:
            return
        if head[1] not in names:
            parts.content(head[0])
            return
        yield from _stream(tape, parts, head[1], [])
        yield from tape.head(_BRACE)
        if (yield from tape.begins(";")) is not None:
            tape.text = tape.text.lstrip()[1:]
        if (yield from tape.begins("{")) is None:
            return


_MISTRAL_NAME = re.compile(
    r"\s{0,64}([A-Za-z0-9_.\-]{1,128})(?:\[CALL_ID\]\w{0,64})?(?:\[ARGS\])?\s{0,64}(?=\{)"
)


def mistral(tape: Tape, parts: Parts) -> Reading:
    """`[TOOL_CALLS]name[ARGS]{…}`, any number of them, or `[TOOL_CALLS]` and a JSON list."""
    mark = "[TOOL_CALLS]"
    while (yield from tape.until((mark,), parts.content)) is not None:
        if (yield from tape.begins("[")) is not None:
            said: list[str] = []
            tape.text = tape.text.lstrip()
            yield from tape.value(said.append)
            text = "".join(said)
            if not _whole(text, parts):
                parts.content(mark + text)
            continue
        head = yield from tape.head(_MISTRAL_NAME, (mark,))
        if head is None:
            parts.content(mark)
        else:
            yield from _stream(tape, parts, head[1], [])


_DS_CALLS, _DS_CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_DS_CALL, _DS_CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
_DS_HEAD = re.compile(
    r"(?:function<｜tool▁sep｜>([^\n<{]{1,128})\s{0,64}```json|([^\n<{]{1,128})<｜tool▁sep｜>)"
    r"\s{0,64}(?=\{)"
)
_DS_CLOSING = re.compile(r"[\s`]*")


def deepseek(tape: Tape, parts: Parts) -> Reading:
    """DeepSeek's marks, with `function`, a name and a fenced JSON text between them (V3, R1), or
    with a name and a JSON text (V3.1)."""
    mark: str | None = None
    while True:
        if mark != _DS_CALL:
            mark = yield from tape.until((_DS_CALLS, _DS_CALLS_END, _DS_CALL), parts.content)
        if mark is None:
            return
        if mark == _DS_CALL:
            mark = yield from _deepseek_call(tape, parts)


def _deepseek_call(tape: Tape, parts: Parts) -> Generator[None, None, str | None]:
    marks = (_DS_CALL_END, _DS_CALLS_END, _DS_CALL, _DS_CALLS)
    head = yield from tape.head(_DS_HEAD, marks)
    if head is not None:
        yield from _stream(tape, parts, (head[1] or head[2]).strip(), [])
    rest, mark = yield from tape.collect(marks)
    if head is None:
        parts.content(f"{_DS_CALL}{rest}{mark if mark == _DS_CALL_END else ''}")
    elif not _DS_CLOSING.fullmatch(rest):
        parts.content(rest)
    return mark or ""


_CHANNEL, _MESSAGE, _START = "<|channel|>", "<|message|>", "<|start|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>", _START)
_TO = r"(?:to=(?:functions\.)?([A-Za-z0-9_.\-]{1,128}))?\s*"
_HEADER = re.compile(
    rf"\s*(?:<\|start\|>\s*(?:assistant)?)?\s*{_TO}(?:<\|channel\|>\s*"
    rf"(analysis|commentary|final))?\s*{_TO}(?:<\|constrain\|>)?\s*(?:json)?\s*"
)


def harmony(tape: Tape, parts: Parts, *, calls: bool, keeps: bool) -> Reading:
    """gpt-oss's channels: `analysis` is reasoning, `final` is text, and so is a `commentary` that
    is addressed to no function. `keeps` leaves the reasoning in the text, with its marks."""
    while True:
        mark = yield from tape.begins(_CHANNEL, _START, "to=", *_ENDS[:3])
        if mark in _ENDS and mark != _START:
            yield from tape.until((mark,), parts.content)
            continue
        if mark is None:
            end = yield from tape.until(_ENDS, parts.content)
            if end is None:
                return
            tape.text = (_START if end == _START else "") + tape.text
            continue
        header, mark = yield from tape.collect((_MESSAGE,), 512)
        if mark is None:
            parts.content(header)
            if tape.over and not tape.text:
                return
            continue
        end = yield from _harmony_message(tape, parts, header, calls=calls, keeps=keeps)
        if end is None:
            return
        if end == _START:
            tape.text = _START + tape.text


def _harmony_message(
    tape: Tape, parts: Parts, header: str, *, calls: bool, keeps: bool
) -> Generator[None, None, str | None]:
    read = _HEADER.fullmatch(header)
    to = None if read is None else read[1] or read[3]
    if to is not None and calls:
        parts.call(to)
        return (yield from tape.until(_ENDS, parts.arguments))
    if read is None or to is not None:
        parts.content(header)
    if read is None or read[2] != "analysis":
        return (yield from tape.until(_ENDS, parts.content))
    if keeps:
        parts.content(header + _MESSAGE)
        end = yield from tape.until(_ENDS, parts.content)
        parts.content("" if end is None else "<|end|>")
        return end
    end = yield from tape.until(_ENDS, parts.reasoning)
    if end is not None:
        parts.end_reasoning()
    return end


def _stream(tape: Tape, parts: Parts, name: str, said: list[str]) -> Reading:
    """A call whose arguments come next, told as they come."""
    parts.call(name)

    def tell(text: str) -> None:
        said.append(text)
        parts.arguments(text)

    yield from tape.value(tell)


def _whole(text: str, parts: Parts) -> bool:
    """Tell the call or the list of calls in a JSON text; whether it was that."""
    value = parse_json(text)
    if not isinstance(value, list):
        return parts.whole_call(value)
    if not value or not all(is_call(one) for one in value):
        return False
    for one in value:
        parts.whole_call(one)
    return True
