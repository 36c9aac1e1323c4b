"""Answers that must match a grammar, with the real worker and the small real model."""

import json
import re

import pytest
from llguidance import LLTokenizer

from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import (
    ChatMessage,
    ChatPrompt,
    Failed,
    Grammar,
    Sampling,
)
from kvserve.worker.grammar import GrammarCompiler
from kvserve.worker.grammar_errors import explain, field_of
from tests.worker.conftest import Peer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
ASK = ChatPrompt((ChatMessage("user", "Describe a person as JSON."),))
DRAWN = Sampling(temperature=1.5, top_k=0, seed=3)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), DRAWN], ids=["greedy", "drawn"])
def test_an_answer_matches_its_schema(worker: Peer, sampling: Sampling) -> None:
    answer = worker.complete(ASK, grammar=JSON, sampling=sampling, max_tokens=80)
    assert answer.end.reason == "stop"
    person = json.loads(answer.text)
    assert person.keys() == SCHEMA["properties"].keys()
    assert 0 <= person["age"] <= 120
    assert len(person["name"]) <= 12
    assert set(person["tags"]) <= {"a", "b"}


def test_any_object_may_be_asked_for(worker: Peer) -> None:
    answer = worker.complete(
        ASK, grammar=Grammar("json_object"), max_tokens=60, sampling=Sampling(temperature=0.0)
    )
    assert answer.text.startswith("{")
    if answer.end.reason == "stop":
        assert isinstance(json.loads(answer.text), dict)


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (Grammar("regex", "(yes|no)[.!]"), "(yes|no)[.!]"),
        (Grammar("lark", 'start: "left" | "right" | "\N{SNOWMAN}"'), "left|right|\N{SNOWMAN}"),
    ],
)
def test_an_answer_ends_where_its_grammar_does(worker: Peer, grammar: Grammar, pattern) -> None:
    answer = worker.complete(ASK, grammar=grammar, max_tokens=20, ignore_eos=True)
    assert re.fullmatch(pattern, answer.text)
    assert answer.end.reason == "stop"
    assert answer.end.n_generated_tokens < 20


def test_constrained_and_free_requests_share_a_batch(worker: Peer) -> None:
    alone = worker.complete(ASK, grammar=JSON, max_tokens=80)
    free = worker.ask("1, 2, 3, 4, 5, 6, 7,", max_tokens=20)
    bound = worker.ask(ASK, grammar=JSON, max_tokens=80)
    answers = worker.finish(free, bound)
    assert answers[0].text.startswith(" 8, 9, 10")
    assert json.loads(answers[1].text).keys() == json.loads(alone.text).keys()


def test_min_tokens_does_not_go_past_the_end_of_a_grammar(worker: Peer) -> None:
    answer = worker.complete(ASK, grammar=Grammar("regex", "ab"), max_tokens=20, min_tokens=10)
    assert (answer.text, answer.end.reason) == ("ab", "stop")


def test_a_resumed_answer_goes_on_in_its_grammar(worker: Peer) -> None:
    usual = {"grammar": JSON, "sampling": DRAWN, "max_tokens": 80, "n_logprobs": 0}
    whole = worker.complete(ASK, **usual)
    pieces = [one.drawn.piece for one in whole.logprobs]
    for n in (1, len(pieces) // 2, len(pieces) - 1):
        rest = worker.complete(ASK, resume=tuple(whole.tokens[:n]), **usual)
        text = b"".join([*pieces[:n], *(one.drawn.piece for one in rest.logprobs)])
        assert json.loads(text).keys() == SCHEMA["properties"].keys()
    done = worker.complete(ASK, resume=tuple(whole.tokens), **usual)
    assert (done.tokens, done.end.reason) == ([], "stop")


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar("json_schema", "no schema"),
        Grammar("json_schema", '{"type": 5}'),
        Grammar("json_schema", '{"$ref": "http://example.com/schema.json"}'),
        Grammar("regex", "[a-z"),
        Grammar("lark", "start: missing"),
        Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
        Grammar("regex", "a" * 300_000),
    ],
    ids=range(7),
)
def test_what_is_no_grammar_is_refused(worker: Peer, grammar: Grammar) -> None:
    refused = worker.complete(ASK, grammar=grammar, max_tokens=4).refusal
    assert isinstance(refused, Failed)
    assert (refused.code, refused.param) == ("invalid_request", field_of(grammar.kind))
    assert len(refused.message) < 400


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        (Grammar("json_schema", '{"type": "x"}'), '"x" is no type: use string'),
        (Grammar("json_schema", '{"not": {}}'), 'it uses "not", which is not supported here'),
        (Grammar("json_schema", '{"type": "string", "format": "z"}'), 'the format "z" is unknown'),
        (Grammar("json_schema", '{"$ref": "http://a"}'), "which is not fetched: put it under"),
        (
            Grammar("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}'),
            "no value fits it, minimum (5) is greater than maximum (1)",
        ),
        (
            Grammar("json_schema", '{"type": "string", "pattern": "("}'),
            "unclosed group: correct the expression",
        ),
        (Grammar("regex", "(?=a)b"), "look-behind, is not supported: correct the expression"),
        (Grammar("regex", "a{2,1}"), "the start must be <= the end: correct"),
        (Grammar("lark", "start: foo"), 'read: line 1, column 8: unknown name: "foo"'),
        (Grammar("lark", "x: 1"), "read: line 1, column 4: Expected value"),
    ],
)
def test_refusals_say_what_is_wrong_and_what_helps(grammar: Grammar, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        GrammarCompiler(262, lambda: LLTokenizer("byte")).compile(grammar)
    assert says in caught.value.message
    assert caught.value.param == field_of(grammar.kind)


def test_other_words_are_passed_on_in_short() -> None:
    assert explain("lark", "odd\n" + "x" * 999).startswith("the grammar cannot be read: odd xx")


def test_schemas_that_killed_other_engines_are_answered(worker: Peer) -> None:
    grammar = Grammar("json_schema", '{"type": "string", "maxLength": 100000}')
    assert worker.complete(ASK, grammar=grammar, max_tokens=4).text.startswith('"')


def test_resumed_tokens_that_break_the_grammar_are_refused(worker: Peer) -> None:
    refused = worker.complete(ASK, grammar=JSON, resume=(5, 6)).refusal
    assert refused.param == "response_format.json_schema.schema"


def test_logprobs_are_those_of_the_model_not_of_the_grammar(worker: Peer) -> None:
    free = worker.complete("1, 2, 3, 4,", max_tokens=1, n_logprobs=5, min_tokens=1)
    bound = worker.complete(
        "1, 2, 3, 4,", max_tokens=3, n_logprobs=5, grammar=Grammar("regex", "zzz")
    )
    assert [top.token for top in bound.logprobs[0].top] == [
        top.token for top in free.logprobs[0].top
    ]
    assert bound.logprobs[0].drawn.logprob < free.logprobs[0].drawn.logprob
    assert len(bound.logprobs) == len(bound.tokens)
    assert b"".join(one.drawn.piece for one in bound.logprobs) == b"zzz"
