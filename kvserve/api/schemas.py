"""The request bodies, as pydantic checks them; `specs` turns them into what the supervisor takes.

Types are strict ("1" is no number, true is no 1), null means the default, and unknown fields are
kept unread, since OpenAI clients send many that mean nothing here; `specs` refuses those of them
that would change the answer. Fields that come in several shapes are `Any` here and read in `specs`,
where an error can name the part it is about.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kvserve.core.plan import Task

INT32_MAX = 2**31 - 1
MAX_LOGIT_BIASES = 1024
MAX_CHOICES = 64
MAX_LOGPROBS = 20

MAX_BREAKERS = 32

Count = Annotated[int, Field(ge=1, le=INT32_MAX)]
Unit = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepeatPenalty = Annotated[float, Field(gt=0, le=10)]
Window = Annotated[int, Field(ge=-1, le=INT32_MAX)]
Breaker = Annotated[str, Field(min_length=1, max_length=64)]
Bias = Annotated[float, Field(ge=-100, le=100)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Body):
    """What a stream carries beside the text."""

    include_usage: bool | None = None


class KvserveOptions(_Body):
    """kvserve's own wishes. `ctx` is the context that the request counts on, in tokens."""

    model_config = ConfigDict(extra="forbid")

    ctx: Count | None = None
    task: Annotated[Task, Field(strict=False)] | None = None


class GenerationRequest(_Body):
    """The fields that both endpoints share: OpenAI's, and llama-server's and vLLM's beside them.

    A `temperature` above 2 is llama.cpp's range, not OpenAI's. `top_k` 0 or -1 is off.
    `repetition_penalty` is vLLM's name of `repeat_penalty`. Windows (`…_last_n`) count tokens: -1
    is all of them, 0 none.
    """

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    stop: Any = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=5)] | None = None
    top_p: Unit | None = None
    top_k: Annotated[int, Field(ge=-1, le=INT32_MAX)] | None = None
    min_p: Unit | None = None
    typical_p: Unit | None = None
    repeat_penalty: RepeatPenalty | None = None
    repetition_penalty: RepeatPenalty | None = None
    repeat_last_n: Window | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    xtc_probability: Unit | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    dry_multiplier: Annotated[float, Field(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Field(ge=1, le=100)] | None = None
    dry_allowed_length: Count | None = None
    dry_penalty_last_n: Window | None = None
    dry_sequence_breakers: Annotated[list[Breaker], Field(max_length=MAX_BREAKERS)] | None = None
    mirostat: Literal[0, 1, 2] | None = None
    mirostat_tau: Annotated[float, Field(ge=0, le=100)] | None = None
    mirostat_eta: Unit | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_LOGIT_BIASES)] | None = None
    response_format: Any = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    kvserve: KvserveOptions | None = None


class Message(_Body):
    """One turn. `content` is a string, a list of parts, or null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Any = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = None
    reasoning_content: str | None = None


class ChatCompletionRequest(GenerationRequest):
    """`POST /v1/chat/completions`.

    `messages` are `Message`s, each checked by itself in `specs`: to check a hundred thousand at
    once would stop all other threads. `reasoning_format` has llama-server's names: `none` leaves
    reasoning in the text, the others take it out.
    """

    messages: Annotated[list[Any], Field(min_length=1)]
    max_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_format: Literal["auto", "deepseek", "none"] | None = None


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`. `prompt` is a text, a list of token ids, or a list of either.

    `max_tokens` 0 generates nothing, which makes sense with `echo`. `logprobs` counts the likeliest
    tokens to be told beside each; null tells none.
    """

    prompt: Any
    max_tokens: Annotated[int, Field(ge=0, le=INT32_MAX)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None


class ContextRequest(_Body):
    """`POST /admin/context`. `n_ctx` is a number of tokens or "max"."""

    model_config = ConfigDict(extra="forbid")

    n_ctx: Any
