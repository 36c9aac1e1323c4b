"""What is wrong with a grammar, in words for whoever wrote the request."""

import re
from collections.abc import Callable

_MOST_CHARS = 300

_SUBJECTS = {
    "json_schema": "the JSON schema cannot be followed",
    "json_object": "the JSON schema cannot be followed",
    "regex": "the regular expression cannot be read",
    "lark": "the grammar cannot be read",
}
_FIELDS = {
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.regex",
    "lark": "response_format.lark",
}

_RULES: tuple[tuple[str, Callable[[re.Match[str]], str]], ...] = (
    (
        r"Unimplemented keys: \[(.*?)\]",
        lambda found: f"it uses {found[1]}, which is not supported here: leave that out",
    ),
    (r"Unknown format: (\S+)", lambda found: f'the format "{found[1]}" is unknown: leave it out'),
    (
        r"Resource '(.*?)' is not present",
        lambda found: f"it refers to {found[1]}, which is not fetched: put it under $defs",
    ),
    (
        r"Invalid type: (\S+)",
        lambda found: (
            f'"{found[1]}" is no type: use string, number, integer, boolean, object, array or null'
        ),
    ),
    (
        r"Unsatisfiable schema: (.*)",
        lambda found: f"no value fits it, {found[1]}: change one of the two",
    ),
    (
        r"regex parse error: .* error: (.*?)(?: \d+ \| .*)?$",
        lambda found: f"{found[1]}: correct the expression",
    ),
    (
        r"(?:at )?(\d+)\((\d+)\): (.*?)(?: \(at .*)?(?: \d+ \| .*)?$",
        lambda found: f"line {found[1]}, column {found[2]}: {found[3]}",
    ),
    (r"too (?:complex|large|many)|limit", lambda _: "it is too large: make it shorter or simpler"),
)


def field_of(kind: str) -> str:
    """The request's field that holds a grammar of this kind."""
    return _FIELDS.get(kind, "response_format")


def explain(kind: str, problem: object) -> str:
    """One line for llguidance's report on a grammar of this kind."""
    text = " ".join(str(problem).split())
    for pattern, say in _RULES:
        found = re.search(pattern, text)
        if found is not None:
            text = say(found)
            break
    return f"{_SUBJECTS[kind]}: {shorten(text)}"


def shorten(problem: object) -> str:
    """A report on one line of bounded length."""
    text = " ".join(str(problem).split())
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
