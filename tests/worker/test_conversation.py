"""Calls and results in prompts, with templates that show tools and ones that do not."""

import json
from collections.abc import Callable, Iterator

import pytest

from kvserve.dialects.form import Form, form_of
from kvserve.ipc.messages import ChatMessage, ChatPrompt, ToolCall, Tools
from kvserve.worker import templates
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.conversation import template_messages, template_tools
from kvserve.worker.templates import ChatTemplate

FUNCTION = {"name": "weather", "description": "Tells.", "parameters": {"type": "object"}}
TOOLS = Tools(json.dumps([{"type": "function", "function": FUNCTION}]))
USER = ChatMessage("user", "How is it in Paris?")
CALL = ChatMessage(
    "assistant",
    "",
    tool_calls=(ToolCall("c1", "weather", '{"city": "Paris"}'),),
    reasoning="Hm.",
)
RESULTS = (ChatMessage("tool", "fine", tool_call_id="c1"), ChatMessage("tool", "and warm"))
PROMPT = ChatPrompt((USER, CALL, *RESULTS), tools=TOOLS)

HERMES = """\
{%- if tools %}{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}{% if add_generation_prompt %}[assistant]<think>
{% endif %}{# </think> #}"""
JOINS = """\
{%- for m in messages %}{%- for call in m.tool_calls %}{{ '<tool_call>' + call.function.arguments }}
{%- endfor %}{% endfor %}{{ tools | length }}"""


@pytest.fixture
def renderer() -> Iterator[Callable[[str], ChatRenderer]]:
    made: list[ChatRenderer] = []

    def make(source: str) -> ChatRenderer:
        made.append(ChatRenderer(ChatTemplate("model", source), bos_text="<bos>", eos_text="<eos>"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_template_that_shows_tools_gets_them(renderer) -> None:
    chat = renderer(HERMES)
    text = chat.render(PROMPT)
    assert text.startswith(json.dumps({"type": "function", "function": FUNCTION}))
    written = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert f"[assistant]{written}[tool]fine[tool]and warm[assistant]" in text
    assert chat.form(PROMPT, text) == Form("hermes", "<think>", "</think>", True, True)


def test_a_template_that_joins_arguments_to_text_gets_text(renderer) -> None:
    assert renderer(JOINS).render(PROMPT) == '<tool_call>{"city": "Paris"}1'


def test_a_template_without_tools_gets_a_text(renderer) -> None:
    chat = renderer(templates.GEMMA)
    text = chat.render(PROMPT)
    assert text.startswith("<bos><start_of_turn>user\nYou can call functions.")
    assert json.dumps(FUNCTION) in text
    assert "How is it in Paris?<end_of_turn>" in text
    assert (
        '<start_of_turn>model\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n'
        "</tool_call><end_of_turn>\n<start_of_turn>user\n<tool_response>\nfine\n</tool_response>\n"
        "<tool_response>\nand warm\n</tool_response><end_of_turn>\n<start_of_turn>model\n"
    ) in text
    assert chat.form(PROMPT, text) == Form("hermes")


def test_the_text_goes_into_a_system_message(renderer) -> None:
    prompt = ChatPrompt((ChatMessage("system", "Be brief."), USER), tools=TOOLS)
    text = renderer(templates.CHATML).render(prompt)
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")


def test_users_who_offer_nothing_see_no_difference(renderer) -> None:
    chat = renderer(templates.GEMMA)
    prompt = ChatPrompt((USER,))
    text = chat.render(prompt)
    assert "functions" not in text
    assert chat.form(prompt, text) is None


def test_reasoning_that_an_answer_goes_on_with(renderer) -> None:
    chat = renderer(HERMES)
    for content, thinking in (("<think>a", True), ("<think>a</think>b", False), ("a", False)):
        prompt = ChatPrompt((USER, ChatMessage("assistant", content)), continue_final=True)
        form = chat.form(prompt, chat.render(prompt))
        assert form is not None
        assert form.thinking is thinking


def test_what_some_dialects_need() -> None:
    mistral = template_messages(PROMPT, Form("mistral", native=True))
    identifier = mistral[1]["tool_calls"][0]["id"]
    assert len(identifier) == 9
    assert mistral[2]["tool_call_id"] == identifier
    assert mistral[2]["name"] == "weather"
    harmony = template_messages(PROMPT, Form("harmony", native=True))
    assert (harmony[1]["thinking"], harmony[1]["content"]) == ("Hm.", "")
    deepseek = template_messages(PROMPT, Form("deepseek", native=True))
    assert deepseek[1]["content"] is None
    assert deepseek[1]["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    "arguments", ["{", "[1]", '{"a": 99999999999999999999}', '{"a": "\\ud800"}']
)
def test_arguments_that_are_no_object_stay_text(renderer, arguments: str) -> None:
    call = ChatMessage("assistant", "", tool_calls=(ToolCall("c", "f", arguments),))
    [message] = template_messages(ChatPrompt((call,)), Form("hermes", native=True))
    assert message["tool_calls"][0]["function"]["arguments"] == arguments
    assert template_tools(ChatPrompt((call,)), Form("hermes", native=True)) is None
    assert "tool_call" in renderer(HERMES).render(ChatPrompt((USER, call)))
    assert "tool_call" in renderer(templates.GEMMA).render(ChatPrompt((USER, call)))


@pytest.mark.parametrize(
    ("source", "calls", "native", "listed"),
    [
        ("{% if tools %}<tool_call>", "hermes", True, False),
        ("{% if tools %}<tool_call>\n<function=x><parameter=", "qwen_xml", True, False),
        ("{% if tools %}<tool_call>\n<function=x>{", "hermes", False, False),
        ("{% if tools %}<tool_calls>[", "hermes", False, False),
        ("{% if tools %}<|tool_call>call:", "gemma4", True, False),
        ('{{ tools }}<|start_header_id|>{"parameters": ', "llama3", True, False),
        ("{% if tools %}<tool_call><arg_key>", "glm", True, False),
        ("{% if tools %}[TOOL_CALLS]", "mistral", True, True),
        ("{% if tools %}[TOOL_CALLS]x[ARGS]", "mistral", True, False),
        ("{{ tools }}<｜tool▁calls▁begin｜>```json", "deepseek", True, True),
        ("{{ tools }}<｜tool▁calls▁begin｜>", "deepseek", True, False),
        ('{{ tools }}<|python_tag|>"parameters": ', "llama3", True, False),
        ("{{ tools }}<start_function_call>", "function_gemma", True, False),
        ("{{ tools }}<|channel|>", "harmony", True, False),
        ("<|channel|>", "harmony", False, False),
        ("{{ tools }} in a way of its own", "hermes", False, False),
        ("<tool_call> alone", "hermes", False, False),
        ("nothing", "hermes", False, False),
    ],
)
def test_the_dialect_is_told_from_the_template(source, calls, native, listed) -> None:
    form = form_of(source)
    assert (form.calls, form.native, form.listed) == (calls, native, listed)


def test_an_answer_with_calls_and_no_text_can_be_continued(renderer) -> None:
    source = (
        "{# <｜tool▁calls▁begin｜> #}{% for tool in tools %}{% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% endfor %}"
    )
    last = ChatMessage("assistant", "", tool_calls=CALL.tool_calls)
    prompt = ChatPrompt((USER, last), tools=TOOLS, continue_final=True)
    assert renderer(source).render(prompt) == "[user]How is it in Paris?[assistant]"
