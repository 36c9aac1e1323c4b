"""From chat messages to what templates know: as Hugging Face's have it, or as plain text where a
template shows no tools."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from kvserve.dialects.form import DEEPSEEK, HARMONY, MISTRAL, Form
from kvserve.ipc.messages import ChatMessage, ChatPrompt, ToolCall

Message = dict[str, Any]

_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_ID_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_TOOLS_TEXT = """\
You can call functions. Each line between <tools> and </tools> describes one:
<tools>
{tools}
</tools>
To call one, write its name and its arguments as a JSON object between these two marks:
<tool_call>
{{"name": "the function's name", "arguments": {{"the argument's name": "its value"}}}}
</tool_call>
{number} What a function returns comes back between <tool_response> and </tool_response>."""


def template_messages(prompt: ChatPrompt, form: Form, *, as_text: bool = False) -> list[Message]:
    """The `messages` variable of a template. `as_text` gives a call's arguments as JSON text, as
    some templates want them, in place of an object."""
    if not form.native:
        return _plain(prompt)
    names = {call.id: call.name for message in prompt.messages for call in message.tool_calls}
    return [_native(message, form, names, as_text=as_text) for message in prompt.messages]


def template_tools(prompt: ChatPrompt, form: Form) -> list[Any] | None:
    """The `tools` variable of a template, None where it has none to show."""
    if prompt.tools is None or not form.native:
        return None
    tools: list[Any] = json.loads(prompt.tools.text)
    return tools


def _native(message: ChatMessage, form: Form, names: dict[str, str], *, as_text: bool) -> Message:
    written: Message = {"role": message.role, "content": message.content}
    name = message.name
    if message.tool_call_id is not None:
        written["tool_call_id"] = _id(message.tool_call_id, form)
        name = name or names.get(message.tool_call_id)
    if name is not None:
        written["name"] = name
    if message.reasoning is not None:
        written["reasoning_content"] = message.reasoning
    if not message.tool_calls:
        return written
    written["tool_calls"] = [_call(call, form, as_text=as_text) for call in message.tool_calls]
    if form.calls == DEEPSEEK and not message.content:
        # Its templates tell calls from text by that.
        written["content"] = None
    if form.calls == HARMONY and message.reasoning is not None:
        # Its templates refuse both.
        written["thinking"] = message.reasoning
        written["content"] = ""
    return written


def _call(call: ToolCall, form: Form, *, as_text: bool) -> Message:
    arguments = call.arguments if as_text else _object(call.arguments)
    function = {"name": call.name, "arguments": arguments}
    return {"id": _id(call.id, form), "type": "function", "function": function}


def _object(text: str) -> object:
    """The object in a JSON text; the text itself where it holds none, or one that msgpack cannot
    carry to the template's process."""
    try:
        value = json.loads(text) if text.strip() else {}
        msgspec.msgpack.encode(value)
    except (ValueError, OverflowError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _id(identifier: str, form: Form) -> str:
    """Mistral's templates refuse other ids than nine letters and digits."""
    if form.calls != MISTRAL or _MISTRAL_ID.fullmatch(identifier):
        return identifier
    digest = hashlib.sha256(identifier.encode("utf-8", "replace")).digest()
    return "".join(_ID_LETTERS[byte % len(_ID_LETTERS)] for byte in digest[:9])


def _plain(prompt: ChatPrompt) -> list[Message]:
    messages: list[Message] = []
    after_result = False
    for message in prompt.messages:
        role = "user" if message.role == "tool" else message.role
        content = message.content
        if message.role == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
        if message.tool_calls:
            content = "\n".join([*([content] if content else []), *map(_text, message.tool_calls)])
        if after_result and role == "user":
            # Many templates want user and assistant to take turns.
            messages[-1]["content"] += f"\n{content}"
        else:
            written: Message = {"role": role, "content": content}
            if message.name is not None and message.role != "tool":
                written["name"] = message.name
            messages.append(written)
        after_result = message.role == "tool"
    if prompt.tools is not None:
        _put_before(messages, _tools_text(prompt.tools.text, parallel=prompt.tools.parallel))
    return messages


def _text(call: ToolCall) -> str:
    value = _object(call.arguments)
    body = json.dumps({"name": call.name, "arguments": value}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _tools_text(tools: str, *, parallel: bool) -> str:
    lines = [json.dumps(one["function"], ensure_ascii=False) for one in json.loads(tools)]
    number = (
        "For several calls at once, write such a block for each."
        if parallel
        else "Make one call at a time."
    )
    return _TOOLS_TEXT.format(tools="\n".join(lines), number=number)


def _put_before(messages: list[Message], text: str) -> None:
    """Into the system message where there is one, else before the first user's: not every template
    takes a system message."""
    place = _first(messages, "system")
    if place is not None:
        messages[place]["content"] += f"\n\n{text}"
        return
    place = _first(messages, "user") or 0
    messages[place]["content"] = f"{text}\n\n{messages[place]['content']}"


def _first(messages: Sequence[Message], role: str) -> int | None:
    return next((i for i, message in enumerate(messages) if message["role"] == role), None)
