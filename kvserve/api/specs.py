"""From a checked request body to the supervisor's `GenerationSpec`."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi.exceptions import RequestValidationError
from msgspec import structs
from pydantic import ValidationError

from kvserve.api.config import task_in
from kvserve.api.response_format import read_response_format
from kvserve.api.sampling import read_sampling
from kvserve.api.schemas import (
    INT32_MAX,
    MAX_CHOICES,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
)
from kvserve.api.tools import read_calls, read_tools
from kvserve.api.unicode import encodable
from kvserve.core.plan import Task
from kvserve.errors import InvalidRequest, Unsupported
from kvserve.ipc.messages import (
    ChatMessage,
    ChatPrompt,
    Grammar,
    Prompt,
    TextPrompt,
    TokenPrompt,
    Tools,
)
from kvserve.supervisor.admission import GenerationSpec

MAX_PROMPTS = MAX_CHOICES
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 512
TEMPLATE_KWARGS = frozenset({"enable_thinking", "thinking", "reasoning_effort"})
"""What a caller may hand to a chat template: switches that published templates read. Anything
else could replace the template's own variables."""

_REFUSED: dict[str, tuple[object, ...]] = {
    "use_beam_search": (False,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "modalities": ([], ["text"]),
    "audio": (),
    "json_schema": (),
    "grammar": ("",),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "functions": ([],),
}
"""Fields that would change the answer and are not implemented, with the values beside null that
ask for nothing."""


def chat_specs(body: ChatCompletionRequest) -> tuple[GenerationSpec, ...]:
    """What a chat request wants generated, one for each of its choices.

    Raises InvalidRequest, Unsupported.
    """
    _refuse_unsupported(body)
    messages = tuple(_chat_message(value, i) for i, value in enumerate(body.messages))
    continue_final = bool(body.continue_final_message)
    if continue_final and messages[-1].role != "assistant":
        raise InvalidRequest(
            "only a last message of the assistant can be continued", param="continue_final_message"
        )
    prompt = ChatPrompt(
        messages=messages,
        template_kwargs=_template_kwargs(body.chat_template_kwargs or {}),
        continue_final=continue_final,
        tools=read_tools(
            body.tools, body.tool_choice, parallel=body.parallel_tool_calls is not False
        ),
    )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest('top_logprobs needs "logprobs": true', param="top_logprobs")
    n_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    spec = _spec(body, prompt, body.max_completion_tokens or body.max_tokens, n_logprobs)
    if prompt.tools is not None and spec.grammar is not None:
        spec = replace(spec, grammar=_beside_tools(spec.grammar, prompt.tools))
    return _choices(spec, body.n or 1)


def _beside_tools(grammar: Grammar, tools: Tools) -> Grammar | None:
    """What an answer must look like that calls nothing."""
    if tools.required:
        return None
    if grammar.kind not in ("json_schema", "json_object"):
        raise Unsupported(
            f"response_format of type {grammar.kind} does not go with tools: use json_schema",
            param="response_format.type",
        )
    return grammar


def completion_specs(body: CompletionRequest) -> tuple[GenerationSpec, ...]:
    """What a completion request wants generated: the choices of its first prompt, then those of
    the next. Raises InvalidRequest, Unsupported.
    """
    _refuse_unsupported(body)
    prompts, n = _prompts(body.prompt), body.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidRequest(
            f"{len(prompts)} prompts with {n} choices each are over {MAX_CHOICES} choices: "
            "ask for fewer",
            param="n",
        )
    return tuple(
        replace(choice, echo=bool(body.echo))
        for prompt in prompts
        for choice in _choices(_spec(body, prompt, body.max_tokens, body.logprobs), n)
    )


def _refuse_unsupported(body: GenerationRequest) -> None:
    extra = body.model_extra or {}
    for name, harmless in _REFUSED.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            raise Unsupported(f"{name} is not supported here: leave it out", param=name)
    if extra.get("best_of") not in (None, 1, body.n):
        raise Unsupported("best_of is not supported here: ask for n choices", param="best_of")
    if extra.get("tools") and extra.get("tool_choice") != "none":
        raise Unsupported("tools are not supported here: leave them out", param="tools")


def _choices(spec: GenerationSpec, n: int) -> tuple[GenerationSpec, ...]:
    """`n` times the same, with seeds that follow each other: equal ones would draw equal texts."""
    seed = spec.sampling.seed
    if seed is None:
        return (spec,) * n
    seeds = ((seed + index) % 2**32 for index in range(n))
    return tuple(replace(spec, sampling=structs.replace(spec.sampling, seed=s)) for s in seeds)


def _spec(
    body: GenerationRequest, prompt: Prompt, max_tokens: int | None, n_logprobs: int | None
) -> GenerationSpec:
    min_tokens = body.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens {min_tokens} is more than the {max_tokens} tokens allowed",
            param="min_tokens",
        )
    return GenerationSpec(
        prompt=prompt,
        sampling=read_sampling(body),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        stop=_stops(body.stop),
        ignore_eos=bool(body.ignore_eos),
        min_ctx=(body.kvserve.ctx or 0) if body.kvserve is not None else 0,
        task=_task(body),
        cache_salt=encodable(body.cache_salt or "", "cache_salt"),
        n_logprobs=n_logprobs,
        grammar=read_response_format(body.response_format),
    )


def _task(body: GenerationRequest) -> Task | None:
    """The one in `kvserve.task`, else the one that the model's name ends with."""
    if body.kvserve is not None and body.kvserve.task is not None:
        return body.kvserve.task
    return None if body.model is None else task_in(body.model)


def _stops(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop is a string or a list of strings", param="stop")
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"at most {MAX_STOPS} stop strings are possible", param="stop")
    if not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise InvalidRequest(
            f"a stop string has 1 to {MAX_STOP_CHARACTERS} characters", param="stop"
        )
    return tuple(encodable(stop, "stop") for stop in stops)


def _chat_message(value: object, index: int) -> ChatMessage:
    try:
        message = Message.model_validate(value)
    except ValidationError as error:
        place = ("body", "messages", index)
        raise RequestValidationError(
            [{**one, "loc": (*place, *one["loc"])} for one in error.errors()]
        ) from None
    where = f"messages[{index}]"
    calls = read_calls(message.tool_calls, f"{where}.tool_calls")
    if calls and message.role != "assistant":
        raise InvalidRequest(
            "only the assistant's messages have tool_calls", param=f"{where}.tool_calls"
        )
    if message.content is None and message.role not in ("assistant", "tool"):
        raise InvalidRequest(f"a {message.role} message needs content", param=f"{where}.content")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        content=_content(message.content, f"{where}.content"),
        name=_optional(message.name, f"{where}.name"),
        tool_calls=calls,
        tool_call_id=_optional(message.tool_call_id, f"{where}.tool_call_id"),
        reasoning=_optional(message.reasoning_content, f"{where}.reasoning_content"),
    )


def _optional(text: str | None, where: str) -> str | None:
    return None if text is None else encodable(text, where)


def _content(value: object, where: str) -> str:
    """A message's text. Parts are joined by line breaks, as llama-server joins them."""
    if value is None:
        return ""
    if isinstance(value, str):
        return encodable(value, where)
    if not isinstance(value, list):
        raise InvalidRequest("content is a string or a list of parts", param=where)
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(value))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidRequest('a content part is an object with a "type"', param=where)
    if kind not in ("text", "refusal"):
        raise Unsupported("this server reads text parts only", param=where)
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequest(f"a {kind} part needs a string", param=f"{where}.{kind}")
    return encodable(text, f"{where}.{kind}")


def _template_kwargs(kwargs: dict[str, Any]) -> dict[str, bool | int | float | str]:
    for name, value in kwargs.items():
        if name not in TEMPLATE_KWARGS:
            allowed = ", ".join(sorted(TEMPLATE_KWARGS))
            raise InvalidRequest(
                f"chat_template_kwargs takes only {allowed}", param="chat_template_kwargs"
            )
        where = f"chat_template_kwargs.{name}"
        if isinstance(value, str) and len(value) <= 64:
            encodable(value, where)
        elif not isinstance(value, bool | int | float) or not _is_64_bit(value):
            raise InvalidRequest(f"{name} is a boolean, a number or a short string", param=where)
    return kwargs


def _is_64_bit(number: float) -> bool:
    """Whether the number survives msgpack."""
    return abs(number) < 2**63 if isinstance(number, int) else math.isfinite(number)


def _prompts(value: object) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (TextPrompt(encodable(value, "prompt")),)
    if not isinstance(value, list) or not value:
        raise InvalidRequest(
            "prompt is a string, a list of token ids, or a list of one of the two", param="prompt"
        )
    if type(value[0]) is int:
        return (_token_prompt(value, "prompt"),)
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"at most {MAX_PROMPTS} prompts are possible", param="prompt")
    return tuple(_one_prompt(item, f"prompt[{i}]") for i, item in enumerate(value))


def _one_prompt(value: object, where: str) -> Prompt:
    if isinstance(value, str):
        return TextPrompt(encodable(value, where))
    if isinstance(value, list) and value:
        return _token_prompt(value, where)
    raise InvalidRequest("a prompt is a string or a list of token ids", param=where)


def _token_prompt(tokens: Sequence[Any], where: str) -> TokenPrompt:
    if not all(type(token) is int and 0 <= token <= INT32_MAX for token in tokens):
        raise InvalidRequest("token ids are whole numbers from 0", param=where)
    return TokenPrompt(tuple(tokens))
