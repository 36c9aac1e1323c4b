"""Log probabilities as clients read them."""

import math

import pytest

from kvserve.ipc.messages import Likelihood, TokenLogprobs
from kvserve.supervisor.admission import Echoed, Text
from tests.api.scripted import SERVED, ScriptedService, chat, complete, done, events

EMOJI = "🦙".encode()


def token(piece: bytes, logprob: float = -0.5, *others: tuple[bytes, float]) -> TokenLogprobs:
    top = tuple(Likelihood(9, *other) for other in others)
    return TokenLogprobs(0, Likelihood(1, piece, logprob), top)


def says(*answer_events: object, reason: str = "stop") -> ScriptedService:
    def script(ticket, _spec):
        ticket.put(SERVED)
        for event in answer_events:
            ticket.put(event)
        ticket.put(done(reason))

    return ScriptedService(script)


def text(shown: str, *tokens: TokenLogprobs) -> Text:
    return Text(shown, (1,) * len(tokens), tokens)


def chat_choice(*answer_events: object, **fields: object) -> dict:
    fields = {"logprobs": True, "top_logprobs": 2, **fields}
    return chat(says(*answer_events), **fields).json()["choices"][0]


def completion_choice(*answer_events: object, **fields: object) -> dict:
    fields = {"logprobs": 2, **fields}
    return complete(says(*answer_events), **fields).json()["choices"][0]


def test_chat_shape():
    best = token(b"Hi", -0.25, (b"Hi", -0.25), (b"Ho", -2.0))
    assert chat_choice(text("Hi", best))["logprobs"] == {
        "content": [
            {
                "token": "Hi",
                "logprob": -0.25,
                "bytes": [72, 105],
                "top_logprobs": [
                    {"token": "Hi", "logprob": -0.25, "bytes": [72, 105]},
                    {"token": "Ho", "logprob": -2.0, "bytes": [72, 111]},
                ],
            }
        ],
        "refusal": None,
    }


def test_completion_shape_holds_the_drawn_token_beside_the_likeliest():
    first = token(b" a", -3.0, (b" b", -0.25), (b" c", -2.0))
    second = token(b"\n", -0.5, (b"\n", -0.5))
    assert completion_choice(text(" a", first), text("\n", second))["logprobs"] == {
        "tokens": [" a", "\n"],
        "token_logprobs": [-3.0, -0.5],
        "top_logprobs": [{" b": -0.25, " c": -2.0, " a": -3.0}, {"\n": -0.5}],
        "text_offset": [0, 2],
    }


def test_parts_of_a_character_have_their_bytes():
    parts = [token(EMOJI[:2]), token(EMOJI[2:]), token(b"!")]
    held = (text("", parts[0]), text("🦙", parts[1]), text("!", parts[2]))
    content = chat_choice(*held)["logprobs"]["content"]
    assert [one["token"] for one in content] == [r"\xf0\x9f", r"\xa6\x99", "!"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "🦙!"
    logprobs = completion_choice(*held)["logprobs"]
    assert logprobs["tokens"] == [r"bytes:\xf0\x9f", r"bytes:\xa6\x99", "!"]
    assert logprobs["text_offset"] == [0, 0, 1]


def test_a_stop_string_takes_its_tokens_along():
    """ "ab" was shown; "c" and "STOP" were held back and cut off."""
    told = (text("a", token(b"a")), text("b", token(b"bST")), text("", token(b"OP")))
    assert [one["token"] for one in chat_choice(*told)["logprobs"]["content"]] == ["a", "bST"]
    assert completion_choice(*told)["logprobs"]["tokens"] == ["a", "bST"]


def test_text_that_was_held_back_comes_with_its_tokens():
    told = (text("", token(b"S")), text("", token(b"T")), text("STx", token(b"x")))
    chunks = events(chat(says(*told), stream=True, logprobs=True))[1:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [c["delta"].get("content") for c in choices] == ["STx", None]
    assert [one["token"] for one in choices[0]["logprobs"]["content"]] == ["S", "T", "x"]
    assert choices[1]["logprobs"] is None


def test_the_end_token_is_told_to_completions_alone():
    told = (text("a", token(b"a")), text("", token(b"")))
    assert len(chat_choice(*told)["logprobs"]["content"]) == 1
    assert completion_choice(*told)["logprobs"]["tokens"] == ["a", ""]
    assert completion_choice(*told)["logprobs"]["text_offset"] == [0, 1]


def test_streams_tell_the_same_as_answers():
    told = (text("", token(EMOJI[:3])), text("🦙a", token(EMOJI[3:] + b"a")), text("", token(b"")))
    whole = completion_choice(*told)["logprobs"]
    chunks = events(complete(says(*told), stream=True, logprobs=2))[:-1]
    parts = [c["choices"][0]["logprobs"] for c in chunks]
    assert parts.pop() is None
    for key, values in whole.items():
        assert [value for part in parts for value in part[key]] == values


@pytest.mark.parametrize("stream", [False, True])
def test_none_where_none_are_wanted(stream):
    body = chat(says(text("a")), stream=stream)
    documents = events(body)[:-1] if stream else [body.json()]
    assert all(c["logprobs"] is None for d in documents for c in d["choices"])


def test_a_probability_of_zero_is_a_number():
    choice = chat_choice(text("a", token(b"a", -math.inf)))
    assert choice["logprobs"]["content"][0]["logprob"] == -9999.0


ECHO = Echoed((b"", b" Hi", b"!"), (token(b" Hi", -1.0, (b" Hi", -1.0)), token(b"!", -2.0)))


def test_an_echo_precedes_the_answer():
    choice = completion_choice(ECHO, text("?", token(b"?", -3.0)), echo=True, prompt=[2, 5, 6])
    assert choice["text"] == " Hi!?"
    assert choice["logprobs"]["tokens"] == ["", " Hi", "!", "?"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -2.0, -3.0]
    assert choice["logprobs"]["top_logprobs"] == [None, {" Hi": -1.0}, {"!": -2.0}, {"?": -3.0}]
    assert choice["logprobs"]["text_offset"] == [0, 0, 3, 4]


def test_an_echo_of_a_text_is_that_text():
    """The tokenizer wrote a blank before it."""
    choice = completion_choice(ECHO, text("?", token(b"?")), echo=True, prompt="Hi!")
    assert choice["text"] == "Hi!?"
    assert choice["logprobs"]["text_offset"] == [0, 0, 2, 3]


def test_an_echo_without_likelihoods():
    response = complete(says(Echoed(ECHO.pieces, ()), text("?")), echo=True, prompt=[2, 5, 6])
    assert response.json()["choices"][0]["text"] == " Hi!?"
    assert response.json()["choices"][0]["logprobs"] is None


def test_an_echo_in_a_stream():
    told = says(ECHO, text("?", token(b"?")))
    chunks = events(complete(told, echo=True, prompt="Hi!", logprobs=0, stream=True))[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["Hi!", "?", ""]
    assert choices[0]["logprobs"]["token_logprobs"] == [None, -1.0, -2.0]
    assert choices[1]["logprobs"]["text_offset"] == [3]


@pytest.mark.parametrize("send", [chat, complete])
def test_choices_are_indexed_and_their_prompt_counts_once(send):
    service = ScriptedService(
        lambda ticket, _spec: [
            ticket.put(event) for event in (SERVED, Text(f"t{ticket.id}", (1,)), done())
        ]
    )
    body = send(service, n=3).json()
    texts = [c["text"] if "text" in c else c["message"]["content"] for c in body["choices"]]
    assert texts == ["t0", "t1", "t2"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == 7
    assert body["usage"]["completion_tokens"] == 6
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    *chunks, usage, _ = events(
        send(service, n=3, stream=True, stream_options={"include_usage": True})
    )
    assert usage["usage"] == body["usage"]
    assert {c["choices"][0]["index"] for c in chunks} == {0, 1, 2}
