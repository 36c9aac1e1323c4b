"""Chat templates for models whose file carries none, one for each family of special tokens."""

from collections.abc import Callable
from dataclasses import dataclass

CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' or message.role == 'developer' %}
{%- set ns.system = ns.system + message.content | trim + '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{{- ns.system + message.content | trim + '<end_of_turn>\\n' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ('<start_of_turn>user\\n' + ns.system | trim + '<end_of_turn>\\n') if ns.system }}
{{- '<start_of_turn>model\\n' }}
{%- endif %}"""

PHI = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- ' ' + message.content | trim + eos_token }}
{%- elif message.role == 'system' %}
{%- set ns.system = ns.system + message.content + '\\n\\n' %}
{%- else %}
{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}"""

PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- 'Assistant: ' + message.content + '\\n' }}
{%- elif message.role == 'user' %}{{- 'User: ' + message.content + '\\n' }}
{%- else %}{{- message.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja template. `name` says where it comes from: `model`, or `default:` and a family."""

    name: str
    source: str


_FAMILIES = (
    ("gemma", ("<start_of_turn>", "<end_of_turn>"), GEMMA),
    ("llama3", ("<|start_header_id|>", "<|eot_id|>"), LLAMA3),
    ("chatml", ("<|im_start|>", "<|im_end|>"), CHATML),
    ("phi", ("<|user|>", "<|assistant|>", "<|end|>"), PHI),
    ("mistral", ("[INST]", "[/INST]"), MISTRAL),
)


def choose(architecture: str, own: str | None, has_token: Callable[[str], bool]) -> ChatTemplate:
    """The model's own template, else that of the family whose special tokens it has, else plain
    `User:` and `Assistant:` lines.

    `has_token` tells whether a text is one token of the vocabulary. Mistral's first vocabulary
    writes its marks in ordinary tokens, so there the architecture decides.
    """
    if own is not None and own.strip():
        return ChatTemplate("model", own)
    for family, marks, source in _FAMILIES:
        if all(has_token(mark) for mark in marks):
            return ChatTemplate(f"default:{family}", source)
    if architecture.startswith("mistral"):
        return ChatTemplate("default:mistral", MISTRAL)
    return ChatTemplate("default:plain", PLAIN)
