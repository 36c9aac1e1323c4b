"""Chat templates: the defaults, and models that mean harm."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pytest

from kvserve.errors import InvalidRequest
from kvserve.ipc.messages import ChatMessage, ChatPrompt
from kvserve.worker import templates
from kvserve.worker.chat import ChatRenderer
from kvserve.worker.templates import ChatTemplate, choose

SYSTEM, USER = ChatMessage("system", "Be brief."), ChatMessage("user", "<Hi> & bye")
ANSWER = ChatMessage("assistant", "Hello. ")
PROMPT = ChatPrompt((SYSTEM, USER))
Render = Callable[..., str]


@pytest.fixture
def renderer() -> Iterator[Callable[[str], ChatRenderer]]:
    made: list[ChatRenderer] = []

    def make(source: str, **fields: float) -> ChatRenderer:
        made.append(
            ChatRenderer(
                ChatTemplate("model", source), bos_text="<bos>", eos_text="<eos>", **fields
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def refusal(renderer: ChatRenderer, prompt: ChatPrompt = PROMPT) -> str:
    with pytest.raises(InvalidRequest) as caught:
        renderer.render(prompt)
    assert caught.value.param == "messages"
    assert "chat template (model)" in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            templates.CHATML,
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<Hi> & bye<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        (
            templates.LLAMA3,
            "<bos><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<Hi> & bye<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            templates.GEMMA,
            "<bos><start_of_turn>user\nBe brief.\n\n<Hi> & bye<end_of_turn>\n"
            "<start_of_turn>model\n",
        ),
        (
            templates.PHI,
            "<|system|>\nBe brief.<|end|>\n<|user|>\n<Hi> & bye<|end|>\n<|assistant|>\n",
        ),
        (templates.MISTRAL, "<bos>[INST] Be brief.\n\n<Hi> & bye [/INST]"),
        (templates.PLAIN, "Be brief.\n\nUser: <Hi> & bye\nAssistant:"),
    ],
    ids=["chatml", "llama3", "gemma", "phi", "mistral", "plain"],
)
def test_default_templates(renderer, source: str, expected: str) -> None:
    chat = renderer(source)
    assert chat.render(PROMPT) == expected
    continued = chat.render(ChatPrompt((SYSTEM, USER, ANSWER), continue_final=True))
    assert continued.endswith("Hello. ")


@pytest.mark.parametrize(
    ("tokens", "architecture", "name"),
    [
        ({"<start_of_turn>", "<end_of_turn>"}, "gemma3", "default:gemma"),
        ({"<|start_header_id|>", "<|eot_id|>"}, "llama", "default:llama3"),
        ({"<|im_start|>", "<|im_end|>"}, "qwen2", "default:chatml"),
        ({"<|user|>", "<|assistant|>", "<|end|>"}, "phi3", "default:phi"),
        ({"[INST]", "[/INST]"}, "llama", "default:mistral"),
        (set(), "mistral3", "default:mistral"),
        (set(), "llama", "default:plain"),
    ],
)
def test_the_family_follows_from_the_tokens(tokens: set[str], architecture: str, name: str) -> None:
    assert choose(architecture, None, tokens.__contains__).name == name
    assert choose(architecture, " \n", tokens.__contains__).name == name
    assert choose(architecture, "{{ 1 }}", tokens.__contains__) == ChatTemplate("model", "{{ 1 }}")


def test_templates_have_what_hugging_face_gives_them(renderer) -> None:
    source = """\
    {% if add_generation_prompt and tools is none and documents is none %}
{{ bos_token }}{{ messages | tojson }}{{ eos_token }}
    {% endif %}
{% generation %}body{% endgeneration %}
{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}
{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
{{ strftime_now('%Y') }}{{ thinking }}"""
    text = renderer(source).render(ChatPrompt((USER,), {"thinking": False, "bos_token": "no"}))
    year = datetime.now(UTC).astimezone().year
    assert text == f'<bos>[{{"role": "user", "content": "<Hi> & bye"}}]<eos>\nbody02{year}False'


def test_a_refused_role_tells_the_client_why(renderer) -> None:
    chat = renderer("{{ raise_exception('System role not supported') }}")
    assert "System role not supported" in refusal(chat)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ (messages | attr('append')).__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% import 'os' as os %}", "no loader"),
        ("{{ 'a' * 10**10 }}", "memory"),
        ("{% set ns = namespace(s='a') %}{% for i in range(60) %}"
         "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "memory"),
        ("{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}", "longer than"),
        ("{" + "{" + "(" * 20000 + "1" + ")" * 20000 + "}}", "nested"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("x" * 600_000, "longer than"),
    ],
)  # fmt: skip
def test_hostile_and_broken_templates_end_in_one_line(renderer, source: str, says: str) -> None:
    assert says in refusal(renderer(source))


def test_a_template_that_never_ends_is_cut_off_and_the_next_render_works(renderer) -> None:
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    chat = renderer("{% if loops %}" + loop + "{% endif %}fine", render_s=0.3)
    begun = time.monotonic()
    assert "longer than 0.3 s" in refusal(chat, ChatPrompt((USER,), {"loops": True}))
    assert time.monotonic() - begun < 10
    assert chat.render(ChatPrompt((USER,), {"loops": False})) == "fine"


def test_a_process_that_died_is_started_again(renderer) -> None:
    chat = renderer("fine")
    chat.start()
    chat._child.kill()
    chat._child.wait()
    assert chat.render(PROMPT) == "fine"


def test_a_process_that_dies_of_a_template_twice_refuses_the_request(renderer, monkeypatch) -> None:
    chat = renderer("fine")
    monkeypatch.setattr(chat, "_ask_once", lambda _job: None)
    assert "ended twice" in refusal(chat)


def test_an_answer_that_the_template_hides_cannot_be_continued(renderer) -> None:
    chat = renderer("nothing of it")
    assert "continued" in refusal(chat, ChatPrompt((USER, ANSWER), continue_final=True))


def test_a_long_conversation_passes_both_ways(renderer) -> None:
    content = "\N{SNOWMAN} word" * 300_000
    chat = renderer("{{ messages[0].content }}")
    assert chat.render(ChatPrompt((ChatMessage("user", content),))) == content
