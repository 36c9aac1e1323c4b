"""Answers as models write them, with what they say."""

from dataclasses import dataclass

from kvserve.dialects.form import Form

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["city"],
}
FUNCTIONS: dict[str, object] = {"weather": WEATHER, "now": {"type": "object", "properties": {}}}

HERMES = Form("hermes", "<think>", "</think>")
QWEN_XML = Form("qwen_xml")
GLM = Form("glm", "<think>", "</think>")
LLAMA3 = Form("llama3")
MISTRAL = Form("mistral", "[THINK]", "[/THINK]")
DEEPSEEK = Form("deepseek", "<think>", "</think>")
HARMONY = Form("harmony")
GEMMA = Form("function_gemma")
GEMMA4 = Form("gemma4", "<|channel>thought", "<channel|>")
FORMS = (HERMES, QWEN_XML, GLM, LLAMA3, MISTRAL, DEEPSEEK, HARMONY, GEMMA, GEMMA4)


@dataclass(frozen=True)
class Case:
    """What is written, and what it says: reasoning, text, and calls with their arguments."""

    form: Form
    written: str
    reasoning: str = ""
    content: str = ""
    calls: tuple[tuple[str, object], ...] = ()


PARIS = ("weather", {"city": "Paris", "days": 2})
NOW = ("now", {})

_DS = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_DS31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_PARIS = '{"city": "Paris", "days": 2}'

CASES = {
    "hermes": Case(
        HERMES,
        "<think>\nWhere? Paris.\n</think>\n\nI look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "Where? Paris.",
        "I look.",
        (PARIS, NOW),
    ),
    "hermes, arguments first": Case(
        HERMES,
        f'<tool_call>{{"arguments": {_PARIS}, "name": "weather"}}</tool_call>',
        calls=(PARIS,),
    ),
    "hermes, arguments as a string": Case(
        HERMES,
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"a\\"}"}</tool_call>',
        calls=(("weather", {"city": "a"}),),
    ),
    "hermes, its mark in a string": Case(
        HERMES,
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>}\\"]"}}</tool_call>',
        calls=(("weather", {"city": '</tool_call>}"]'}),),
    ),
    "hermes, not closed": Case(
        HERMES,
        f'<tool_call>{{"name": "weather", "arguments": {_PARIS}}}\n'
        '<tool_call>{"name": "now", "arguments": {}}',
        calls=(PARIS, NOW),
    ),
    "hermes, no call": Case(
        HERMES,
        "Use <tool_call>like this</tool_call> or <tool_",
        content="Use <tool_call>like this</tool_call> or <tool_",
    ),
    "hermes, opened by the prompt": Case(
        Form("hermes", "<think>", "</think>", thinking=True),
        "Hm.\n</think>\n\nYes.\n",
        "Hm.",
        "Yes.\n",
    ),
    "qwen xml": Case(
        QWEN_XML,
        'I look.\n<tool_call>\n<function=weather>\n<parameter=city>\nPar\nis "1"\n</parameter>\n'
        '<parameter=days>\n2\n</parameter>\n<parameter=tags>\n["a", "b"]\n</parameter>\n'
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        content="I look.",
        calls=(("weather", {"city": 'Par\nis "1"', "days": 2, "tags": ["a", "b"]}), NOW),
    ),
    "qwen xml, bare": Case(
        QWEN_XML,
        "<function=weather>\n<parameter=city>\n12\n</parameter>\n</function>",
        calls=(("weather", {"city": "12"}),),
    ),
    "glm": Case(
        GLM,
        "<think></think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><tool_call>now\n</tool_call>",
        calls=(PARIS, NOW),
    ),
    "llama3": Case(LLAMA3, f'{{"name": "weather", "parameters": {_PARIS}}}', calls=(PARIS,)),
    "llama3, two, tagged": Case(
        LLAMA3,
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {_PARIS}}}; '
        '{"name": "now", "parameters": {}}',
        calls=(PARIS, NOW),
    ),
    "llama3, other JSON": Case(
        LLAMA3,
        '{"name": "me", "parameters": {"a": 1}} and {"b": 2}',
        content='{"name": "me", "parameters": {"a": 1}} and {"b": 2}',
    ),
    "mistral": Case(
        MISTRAL,
        f"[THINK]Hm.[/THINK]I look.[TOOL_CALLS]weather[ARGS]{_PARIS}[TOOL_CALLS]now[ARGS]{{}}",
        "Hm.",
        "I look.",
        (PARIS, NOW),
    ),
    "mistral, with an id": Case(
        MISTRAL, f"[TOOL_CALLS]weather[CALL_ID]abc123def[ARGS]{_PARIS}", calls=(PARIS,)
    ),
    "mistral, a list that is none": Case(
        MISTRAL,
        '[TOOL_CALLS][{"name": "now"}, 1] ok',
        content='[TOOL_CALLS][{"name": "now"}, 1] ok',
    ),
    "mistral, a list": Case(
        MISTRAL,
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {_PARIS}, "id": "abc123def"}}, '
        '{"name": "now", "arguments": {}}]',
        calls=(PARIS, NOW),
    ),
    "deepseek v3": Case(
        DEEPSEEK,
        f"I look.<｜tool▁calls▁begin｜>{_DS.format('weather', _PARIS)}\n{_DS.format('now', '{}')}"
        "<｜tool▁calls▁end｜>",
        content="I look.",
        calls=(PARIS, NOW),
    ),
    "deepseek v3.1": Case(
        DEEPSEEK,
        f"<think>Hm.</think><｜tool▁calls▁begin｜>{_DS31.format('weather', _PARIS)}"
        f"{_DS31.format('now', '{}')}<｜tool▁calls▁end｜>",
        "Hm.",
        calls=(PARIS, NOW),
    ),
    "gpt-oss": Case(
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "I look.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{_PARIS}<|call|>",
        "Hm.",
        "I look.",
        (PARIS,),
    ),
    "gpt-oss, addressed first": Case(
        HARMONY,
        f" to=functions.weather<|channel|>commentary json<|message|>{_PARIS}",
        calls=(PARIS,),
    ),
    "gpt-oss, final": Case(
        HARMONY,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.",
        "Hm.",
        "Yes.",
    ),
    "gpt-oss, no channel": Case(HARMONY, '{"a": 1}', content='{"a": 1}'),
    "gemma 4": Case(
        GEMMA4,
        "<|channel>thought\nHm.\n<channel|>I look.<|tool_call>call:weather{"
        'city:<|"|>Pa"r<is<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
        "Hm.",
        "I look.",
        (("weather", {"city": 'Pa"r<is', "days": 2}), NOW),
    ),
    "functiongemma": Case(
        GEMMA,
        "<start_function_call>call:weather{city:<escape>Paris, {x}<escape>,days:2,"
        "tags:[<escape>a<escape>]}<end_function_call>",
        calls=(("weather", {"city": "Paris, {x}", "days": 2, "tags": ["a"]}),),
    ),
}
