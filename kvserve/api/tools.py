"""The functions that a chat request offers, and the calls in its messages."""

import re
from typing import Any

import msgspec

from kvserve.api.unicode import encodable
from kvserve.errors import InvalidRequest, Unsupported
from kvserve.ipc.messages import ToolCall, Tools

MAX_TOOLS = 512
MAX_TOOLS_CHARACTERS = 2**20
MAX_CALLS = 256

_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}}
_CHOICES = ("none", "auto", "required")


def read_tools(tools: object, choice: object, *, parallel: bool) -> Tools | None:
    """What an answer may call, from `tools` and `tool_choice`; None where it may call nothing.

    `strict` holds for all functions where one asks for it. Raises InvalidRequest, Unsupported.
    """
    functions = _functions(tools)
    required, only = _choice(choice)
    if not functions:
        if required:
            raise InvalidRequest(
                "tool_choice asks for a call: tools must offer a function", param="tool_choice"
            )
        return None
    if choice == "none":
        return None
    if only is not None and only not in functions:
        raise InvalidRequest(
            f"tool_choice names {only[:100]!r}, which is not among the tools", param="tool_choice"
        )
    shown = [{"type": "function", "function": one} for one, _ in functions.values()]
    text = json_text(shown, "tools")
    if len(text) > MAX_TOOLS_CHARACTERS:
        raise InvalidRequest(
            f"tools have over {MAX_TOOLS_CHARACTERS} characters: offer fewer", param="tools"
        )
    return Tools(
        text=text,
        required=required,
        only=only,
        parallel=parallel,
        strict=any(strict for _, strict in functions.values()),
    )


def read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """The `tool_calls` of an assistant's message. Raises InvalidRequest, Unsupported."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidRequest("tool_calls is a list of calls", param=where)
    if len(value) > MAX_CALLS:
        raise InvalidRequest(f"at most {MAX_CALLS} calls are possible", param=where)
    return tuple(_call(one, f"{where}[{i}]", i) for i, one in enumerate(value))


def json_text(value: object, where: str) -> str:
    """A value of a request body as JSON text. Raises InvalidRequest."""
    try:
        # The template's process is told in msgpack, which has no longer integers.
        msgspec.msgpack.encode(value)
        return msgspec.json.encode(value).decode()
    except RecursionError:
        raise InvalidRequest("this is nested too deeply", param=where) from None
    except (ValueError, OverflowError, msgspec.MsgspecError):
        raise InvalidRequest(
            "this holds text that is not Unicode, or a number of more than 64 bits", param=where
        ) from None


def _functions(tools: object) -> dict[str, tuple[dict[str, Any], bool]]:
    """By name, each function as templates see it and whether it is strict."""
    if tools is None:
        return {}
    if not isinstance(tools, list):
        raise InvalidRequest("tools is a list of functions", param="tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"at most {MAX_TOOLS} tools are possible", param="tools")
    functions: dict[str, tuple[dict[str, Any], bool]] = {}
    for i, tool in enumerate(tools):
        function, strict = _function(tool, f"tools[{i}]")
        if function["name"] in functions:
            raise InvalidRequest(
                f"two tools are called {function['name']!r}", param=f"tools[{i}].function.name"
            )
        functions[function["name"]] = (function, strict)
    return functions


def _function(tool: object, where: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        raise InvalidRequest('a tool is an object with a "type"', param=where)
    if tool["type"] != "function":
        raise Unsupported(
            "only tools of the type function are supported here", param=f"{where}.type"
        )
    function = tool.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest('a tool needs "function", an object', param=f"{where}.function")
    where += ".function"
    name, description = function.get("name"), function.get("description")
    parameters, strict = function.get("parameters"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(
            "a function's name has 1 to 128 letters, digits, dots, dashes and underscores",
            param=f"{where}.name",
        )
    if not isinstance(description, str | None):
        raise InvalidRequest("description is a string", param=f"{where}.description")
    if not isinstance(parameters, dict | None):
        raise InvalidRequest("parameters is a JSON schema, an object", param=f"{where}.parameters")
    if not isinstance(strict, bool | None):
        raise InvalidRequest("strict is true or false", param=f"{where}.strict")
    written = {
        "name": name,
        "description": description or "",
        "parameters": parameters or _NO_PARAMETERS,
    }
    return written, bool(strict)


def _choice(value: object) -> tuple[bool, str | None]:
    """Whether a call is required, and of which function."""
    if value is None or (isinstance(value, str) and value in _CHOICES):
        return value == "required", None
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if isinstance(name, str):
            return True, name
    raise InvalidRequest(
        'tool_choice is "none", "auto", "required" or '
        '{"type": "function", "function": {"name": …}}',
        param="tool_choice",
    )


def _call(value: object, where: str, index: int) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(function, dict):
        raise InvalidRequest('a call is an object with "id" and "function"', param=where)
    if value.get("type", "function") != "function":
        raise Unsupported(
            "only calls of the type function are supported here", param=f"{where}.type"
        )
    identifier, name, arguments = value.get("id"), function.get("name"), function.get("arguments")
    if not isinstance(identifier, str | None):
        raise InvalidRequest("a call's id is a string", param=f"{where}.id")
    if not isinstance(name, str) or not name:
        raise InvalidRequest("a call needs a function's name", param=f"{where}.function.name")
    if arguments is None or isinstance(arguments, dict):
        arguments = json_text(arguments or {}, f"{where}.function.arguments")
    if not isinstance(arguments, str):
        raise InvalidRequest(
            "a call's arguments are a string of JSON", param=f"{where}.function.arguments"
        )
    return ToolCall(
        encodable(identifier or f"call_{index}", f"{where}.id"),
        encodable(name, f"{where}.function.name"),
        encodable(arguments, f"{where}.function.arguments"),
    )
