"""Whatever JSON comes in, the answer is 200 or a well-formed refusal."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.scripted import ask, events

FIELDS = re.findall(
    r"\w+",
    """
    model messages prompt stream stream_options max_tokens max_completion_tokens min_tokens stop
    temperature top_p top_k min_p typical_p repeat_penalty presence_penalty seed logit_bias n
    logprobs response_format tools tool_choice kvserve chat_template_kwargs n_ctx ignore_eos
    continue_final_message model_fields __class__ self
    """,
)
ROLES = ["system", "developer", "user", "assistant", "tool", "function"]

any_text = st.text(st.characters(codec=None, categories=None), max_size=8)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**31 - 2, max_value=2**64)
    | st.floats()
    | any_text
    | st.sampled_from(["default", "text", "max", "none", "1"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*FIELDS, "type", "text", "ctx"]) | any_text, inner)
    ),
    max_leaves=6,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url"])}, optional={"text": values}
)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={"content": any_text | st.lists(parts | values, max_size=3) | values, "name": values},
)
bodies = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(FIELDS, values),
        "messages": st.lists(messages, max_size=3) | values,
        "prompt": any_text | st.lists(st.integers(0, 9), max_size=3) | values,
        "stream": st.booleans() | values,
    },
)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/admin/context"])
@given(body=bodies | values)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_json_of_any_kind(path, body):
    check(ask("POST", path, json=body))


@given(body=st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_bytes_of_any_kind(body):
    headers = {"content-type": "application/json"}
    check(ask("POST", "/v1/completions", content=body, headers=headers))


def check(response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code == 200:
        if response.headers["content-type"].startswith("text/event-stream"):
            assert events(response)[-1] == "[DONE]"
        else:
            assert response.json()
        return
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert len(error["message"]) < 1000
    assert error["param"] is None or isinstance(error["param"], str)
