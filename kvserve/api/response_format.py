"""`response_format`: OpenAI's three types, and two of kvserve's own."""

import json

from kvserve.api.unicode import encodable
from kvserve.errors import InvalidRequest, Unsupported
from kvserve.ipc.messages import Grammar

MAX_GRAMMAR_CHARACTERS = 256 * 1024
_PARAM = "response_format"
_KINDS = ("text", "json_object", "json_schema", "regex", "lark")


def read_response_format(value: object) -> Grammar | None:
    """What the answer must look like; None where anything goes.

    `{"type": "regex", "regex": "…"}` and `{"type": "lark", "lark": "…"}` take an expression and a
    grammar in llguidance's dialect. Raises InvalidRequest, Unsupported.
    """
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise InvalidRequest('response_format is an object with a "type"', param=_PARAM)
    match value["type"]:
        case "text":
            return None
        case "json_object":
            return Grammar("json_object")
        case "json_schema":
            return Grammar("json_schema", _schema(value.get("json_schema")))
        case "regex":
            return Grammar("regex", _text(value, "regex"))
        case "lark":
            return Grammar("lark", _text(value, "lark"))
        case kind:
            raise Unsupported(
                f"response_format of type {kind[:40]!r} is not supported here: "
                f"use one of {', '.join(_KINDS)}",
                param=f"{_PARAM}.type",
            )


def _schema(value: object) -> str:
    """The schema as JSON text. `strict` changes nothing: every schema is followed to the letter,
    or refused where a keyword is not known."""
    where = f"{_PARAM}.json_schema"
    if not isinstance(value, dict):
        raise InvalidRequest("json_schema is an object with a name and a schema", param=where)
    if not isinstance(value.get("strict"), bool | None):
        raise InvalidRequest("strict is true or false", param=f"{where}.strict")
    schema = value.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest("a JSON schema is an object", param=f"{where}.schema")
    return _bounded(json.dumps(schema, ensure_ascii=False), f"{where}.schema")


def _text(value: dict[str, object], name: str) -> str:
    text = value.get(name)
    if not isinstance(text, str) or not text:
        raise InvalidRequest(f"{name} is a string that is not empty", param=f"{_PARAM}.{name}")
    return _bounded(text, f"{_PARAM}.{name}")


def _bounded(text: str, where: str) -> str:
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise InvalidRequest(
            f"this is over {MAX_GRAMMAR_CHARACTERS} characters: make it shorter", param=where
        )
    return encodable(text, where)
