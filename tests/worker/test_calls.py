"""Constraints for calls: the grammars on bytes, and answers of the small real model."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer

from kvserve.dialects.form import Form
from kvserve.dialects.grammar import CallGrammars
from kvserve.dialects.parts import Arguments, CallBegun, Content
from kvserve.dialects.reader import Reader
from kvserve.dialects.watch import CallWatch
from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import ChatMessage, ChatPrompt, Failed, Grammar, Sampling, Tools
from kvserve.worker.calls import CallConstraint, CallConstraints, functions_of
from kvserve.worker.grammar import GrammarCompiler
from tests.dialects.answers import (
    CASES,
    DEEPSEEK,
    FORMS,
    FUNCTIONS,
    HARMONY,
    HERMES,
    LLAMA3,
    MISTRAL,
)
from tests.worker.conftest import Peer

N_BYTES = 262
END = 261


def mark(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def compiler() -> GrammarCompiler:
    return GrammarCompiler(N_BYTES, lambda: LLTokenizer("byte"))


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "note": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "where": {"$ref": "#/$defs/place"},
    },
    "required": ["city", "where"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"north": {"type": "boolean"}},
            "required": ["north"],
            "additionalProperties": False,
        }
    },
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
OFFERED = {"weather": SCHEMA, "now": EMPTY}


def check_arguments(name: str, arguments: dict[str, object]) -> None:
    """What SCHEMA and EMPTY ask for."""
    if name == "now":
        assert arguments == {}
        return
    assert {"city", "where"} <= arguments.keys() <= SCHEMA["properties"].keys()
    assert arguments["city"] in ("Paris", "Rome")
    assert isinstance(arguments.get("note", ""), str)
    assert arguments.get("days", 1) in range(1, 15)
    assert arguments["where"] in ({"north": True}, {"north": False})


ALL_FORMS = (*FORMS, replace(MISTRAL, listed=True), replace(DEEPSEEK, listed=True))


def draw(lark: str, seed: int, start: bytes = b"") -> str:
    """A random text of a grammar; the end is taken as soon as it is possible."""
    chance = random.Random(seed)
    constraint = compiler().compile(Grammar("lark", lark), list(start))
    written = bytearray(start)
    while not constraint.complete:
        row = np.zeros(N_BYTES, dtype=np.float32)
        constraint.apply(row)
        allowed = np.flatnonzero(np.isfinite(row))
        if END in allowed:
            break
        assert len(allowed), constraint.error
        plain = [byte for byte in allowed if 32 <= byte < 127 or byte == 10] or allowed
        byte = int(chance.choice(list(plain)))
        written.append(byte)
        assert len(written) < 20_000
        constraint.accept(byte)
    return written.decode("utf-8", "replace")


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: f"{form.calls} {form.listed}")
@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_grammar_allows_is_read_as_a_valid_call(form: Form, seed: int) -> None:
    form = replace(form, think="", end_think="")
    # Its reasoning has no end on bytes, where marks are no tokens.
    start = b"<|channel|>commentary" if form.calls == "harmony" else b""
    for name, whole in OFFERED.items():
        schema: object = whole
        if form.calls in ("qwen_xml", "glm", "function_gemma", "gemma4") and name == "weather":
            # Their strings end with a mark, which random bytes never come to.
            bounded = {key: one for key, one in SCHEMA["properties"].items() if key != "note"}
            schema = {**SCHEMA, "properties": bounded}
        grammars = CallGrammars(form, {name: schema}, parallel=False, mark=mark)
        text = draw(grammars.whole(), seed, start)
        reader = Reader(form, OFFERED)
        parts = [*reader.push(text), *reader.finish()]
        assert parts[0] == CallBegun(name), text
        assert not any(isinstance(part, Content) for part in parts), text
        written = "".join(part.text for part in parts if isinstance(part, Arguments))
        check_arguments(name, json.loads(written))


@pytest.mark.parametrize("form", ALL_FORMS, ids=lambda form: f"{form.calls} {form.listed}")
def test_all_grammars_are_ones(form: Form) -> None:
    for thinking in (False, True):
        grammars = CallGrammars(replace(form, thinking=thinking), FUNCTIONS, True, mark)
        for lark in (grammars.whole(), grammars.after_trigger(), grammars.or_json(SCHEMA)):
            compiler().compile(Grammar("lark", lark))


@pytest.mark.parametrize("name", ["glm", "llama3", "deepseek v3.1"])
def test_what_models_write_is_allowed(name: str) -> None:
    case = CASES[name]
    lark = CallGrammars(case.form, FUNCTIONS, True, mark).whole()
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(lark), log_level=0)
    assert matcher.consume_tokens(list(case.written.encode()))
    assert matcher.is_accepting()


def tools(choice: dict[str, object] | None = None, **schemas: object) -> Tools:
    shown = [
        {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
        for name, schema in schemas.items()
    ]
    return Tools(json.dumps(shown), **(choice or {}))


def constraints() -> CallConstraints:
    return CallConstraints(
        compiler(),
        mark=mark,
        piece=lambda token: bytes([token]) if token < END else b"",
        tokens_of=lambda text: list(text.encode()),
    )


def feed(constraint, text: str) -> None:
    for byte in text.encode():
        allowed(constraint)
        constraint.accept(byte)


def allowed(constraint) -> set[str]:
    row = np.zeros(N_BYTES, dtype=np.float32)
    constraint.apply(row)
    return {chr(byte) for byte in np.flatnonzero(np.isfinite(row))}


def test_an_answer_is_free_until_it_begins_a_call() -> None:
    made = constraints().make(tools(now=EMPTY), HERMES, None, ())
    assert len(allowed(made)) == N_BYTES
    feed(made, "<think><tool_call> is how to call.</think>Text <tool_call")
    assert len(allowed(made)) == N_BYTES
    feed(made, ">")
    assert allowed(made) == {"\n"}
    feed(made, '\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert made.error is None
    assert allowed(made) == {"\n", "<", chr(END)}


def test_channels_tell_a_call_from_words_about_it() -> None:
    made = constraints().make(tools(now=EMPTY), HARMONY, None, ())
    feed(made, "<|channel|>analysis<|message|>to=functions.now or not?<|end|><|start|>assistant")
    assert len(allowed(made)) == N_BYTES
    feed(made, "<|channel|>commentary to=functions.")
    assert allowed(made) == {"n"}
    feed(made, "now <|constrain|>json<|message|>{}")
    assert made.complete


@pytest.mark.parametrize(
    ("begun", "allows"),
    [
        ('<|python_tag|>{"name": "no', {"w"}),
        ('{"name": "now"', {","}),
        ('\n{ "name":"now"', {","}),
        ('{"type": "function", "name": "now"', {","}),
        ('{"name": "now", "para', {"m"}),
        # JSON that is no call of a function there is, or text about one.
        ('{"name": "Ann"', None),
        ('{"names": ["now"', None),
        ('Say {"name": "now"', None),
    ],
)
def test_a_call_of_llama_is_told_by_its_name(begun: str, allows: set[str] | None) -> None:
    made = constraints().make(tools(now=EMPTY), LLAMA3, None, ())
    feed(made, begun)
    assert len(allowed(made)) == N_BYTES if allows is None else allowed(made) == allows
    again = constraints().make(tools(now=EMPTY), LLAMA3, None, list(begun.encode()))
    assert allowed(again) == allowed(made)


def test_a_function_may_be_named_before_its_channel() -> None:
    made = constraints().make(tools(now=EMPTY), HARMONY, None, ())
    feed(made, " to=functions.now<|channel|>commentary json<|message|>{}")
    assert made.error is None
    assert made.complete


def test_a_request_that_goes_on_is_where_it_was() -> None:
    text = b'<tool_call>\n{"name": "n'
    made = constraints().make(tools(now=EMPTY), HERMES, None, list(text))
    assert allowed(made) == {"o"}


def test_one_call_at_most() -> None:
    made = constraints().make(tools({"parallel": False}, now=EMPTY), HERMES, None, ())
    feed(made, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert made.complete


@pytest.mark.parametrize(
    ("calls", "pieces", "expected"),
    [
        (HERMES, {0: b"<tool_", 1: b'call>\n{"', 2: b"call> is"}, {"n"}),
        (LLAMA3, {0: b'{"name": "no', 1: b'w",', 2: b'w"}'}, {" "}),
    ],
)
def test_what_follows_the_beginning_of_a_call_in_its_token_counts(
    calls: Form, pieces: dict[int, bytes], expected: set[str]
) -> None:
    lark = CallGrammars(calls, {"now": EMPTY}, True, mark).after_trigger()
    for last, active in ((1, True), (2, False)):
        made = CallConstraint(
            compiler().starter(Grammar("lark", lark), param="tools"),
            watch=CallWatch(calls, ["now"]),
            piece=pieces.__getitem__,
            tokens_of=lambda text: list(text.encode()),
            strict=False,
            resume=(0, last),
        )
        assert (allowed(made) == expected) is active


def test_a_schema_that_cannot_be_followed_matters_where_it_must_be() -> None:
    odd = tools(odd={"type": "object", "properties": {"a": {"$ref": "http://elsewhere"}}})
    assert constraints().make(odd, HERMES, None, ()) is None
    for choice in ({"strict": True}, {"required": True}):
        with pytest.raises(InvalidRequest, match="elsewhere") as caught:
            constraints().make(Tools(odd.text, **choice), HERMES, None, ())
        assert caught.value.param == "tools[0].function.parameters"


GREEDY = Sampling(temperature=0.0)
DRAWN = Sampling(temperature=1.2, top_k=0, seed=5)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("only", [None, "now"])
def test_a_required_call_of_the_real_model_is_valid(worker: Peer, sampling, only) -> None:
    offered = tools({"required": True, "only": only, "parallel": False}, **OFFERED)
    prompt = ChatPrompt((ChatMessage("user", "Weather in Rome?"),), tools=offered)
    answer = worker.complete(prompt, sampling=sampling, max_tokens=400, stop=('"', "}"))
    assert answer.end is not None, answer.refusal
    assert answer.end.reason == "stop"
    reader = Reader(Form(), functions_of(offered))
    begun, *rest = [*reader.push(answer.text), *reader.finish()]
    assert begun.name in OFFERED
    assert only in (None, begun.name)
    check_arguments(begun.name, json.loads("".join(part.text for part in rest)))


def test_a_bad_schema_fails_its_request_alone(worker: Peer) -> None:
    bad = tools({"required": True}, f={"type": "object", "properties": {"a": {"type": "x"}}})
    prompt = ChatPrompt((ChatMessage("user", "Call."),), tools=bad)
    refusal = worker.complete(prompt).refusal
    assert isinstance(refusal, Failed)
    assert (refusal.code, refusal.param) == ("invalid_request", "tools[0].function.parameters")
