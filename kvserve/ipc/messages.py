"""The messages between the daemon and its worker: one struct each, msgpack on the wire.

The daemon sends `ToWorker`, the worker answers `FromWorker`. A request that the daemon sent as
`Generate` ends in exactly one `End` (in a `Step`), `Failed` or `NeedsContext` for its id, unless
the worker dies or a `Pause` comes first.
"""

from typing import Literal

import msgspec

from kvserve.dialects.form import Form


class Message(msgspec.Struct, frozen=True, omit_defaults=True, tag=True):
    """Base of all messages; the class name is the tag."""


Speculate = Literal["off", "ngram", "draft"]
"""Where proposed tokens come from: nowhere, the sequence's own text, or from a draft model where
that has nothing."""


class Load(Message, frozen=True):
    """Load the model and create the context. First message of a worker's life.

    `n_gpu_layers` counts the output layer, as llama.cpp does; `n_cpu_moe` layers from the front
    keep their routed experts on the host. `extra_buffers` False turns llama.cpp's repacked CPU
    weights off (they trap on some virtual machines). `carried` are the sequences that an earlier
    worker exported, to be read before `Loaded`: for each its files, the beginning first, the last
    one complete but for what is in those before it. `cache_ram_bytes` of host memory hold
    conversations that have to leave the KV cache. `speculate` says where proposed tokens come
    from: at most `n_draft` of them are in a batch, and `n_draft_each` of one sequence. The file at
    `draft_path` holds the draft model.
    """

    model_path: str
    type_k: str
    type_v: str
    n_ctx: int
    n_seq_max: int
    n_batch: int
    n_ubatch: int
    n_gpu_layers: int
    n_cpu_moe: int
    flash_attn: bool
    n_threads: int
    n_threads_batch: int
    tensor_split: tuple[float, ...] = ()
    extra_buffers: bool = True
    carried: tuple[tuple[str, ...], ...] = ()
    cache_ram_bytes: int = 0
    speculate: Speculate = "off"
    n_draft: int = 0
    n_draft_each: int = 0
    draft_path: str | None = None


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are drawn. Field names and meanings are llama.cpp's and the OpenAI API's.

    `temperature` 0 is greedy. `top_k` 0, `top_p` 1 and `xtc_probability` 0 are off, and so is DRY
    with `dry_multiplier` 0. `mirostat` 1 or 2 takes the place of all that shortens the list of
    tokens. `seed` None draws one.
    """

    temperature: float = 1.0
    top_k: int = 40
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None
    logit_bias: dict[int, float] = {}


class ToolCall(msgspec.Struct, frozen=True):
    """A call that an earlier answer made. `arguments` is JSON text, as the model wrote it."""

    id: str
    name: str
    arguments: str


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """One turn of a conversation, text only. `tool_call_id` is the call that a `tool` message
    answers; `reasoning` what the assistant had said to itself."""

    role: str
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    reasoning: str | None = None


class Tools(msgspec.Struct, frozen=True, omit_defaults=True):
    """The functions that an answer may call. `text` is the JSON text of OpenAI's `tools`.

    `required` asks for a call, of the function `only` where that is given. Without `parallel`
    there is one call at most. `strict` holds calls to their schemas, or refuses the request where
    that cannot be done.
    """

    text: str
    required: bool = False
    only: str | None = None
    parallel: bool = True
    strict: bool = False


class ChatPrompt(msgspec.Struct, frozen=True, omit_defaults=True, tag="chat"):
    """Messages for the model's chat template."""

    messages: tuple[ChatMessage, ...]
    template_kwargs: dict[str, bool | int | float | str] = {}
    continue_final: bool = False
    tools: Tools | None = None


class TextPrompt(msgspec.Struct, frozen=True, tag="text"):
    """A raw prompt; special tokens in the text are read as text."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True, tag="tokens"):
    """A prompt given as token ids."""

    tokens: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class Grammar(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an answer must look like. `text` is a JSON schema, a regular expression or a grammar
    in llguidance's dialect of Lark; `json_object`, any object, needs none."""

    kind: Literal["json_schema", "json_object", "regex", "lark"]
    text: str = ""


class Generate(Message, frozen=True):
    """Answer one prompt.

    `max_tokens` None goes on to the end of the context. With `may_grow` an answer that comes to
    that end is not over: `NeedsContext` follows, and a later worker goes on. `resume` are the
    tokens that an earlier worker already generated for this request: their text was delivered and
    is not sent again. Cached prefixes are shared only between requests of the same
    `cache_salt`. `n_logprobs` asks for the log probability of each token, and of that many most
    likely ones beside it. `echo` asks for the prompt's text, and with `n_logprobs` for the
    likelihoods of its tokens too.
    """

    id: int
    prompt: Prompt
    sampling: Sampling
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    resume: tuple[int, ...] = ()
    may_grow: bool = False
    cache_salt: str = ""
    n_logprobs: int | None = None
    grammar: Grammar | None = None
    echo: bool = False


class Cancel(Message, frozen=True):
    """Forget a request; no answer follows."""

    id: int


class CopyAhead(Message, frozen=True):
    """A `Pause` will come: copy what is in the cache now, a piece at a time between two steps, up
    to `export_bytes` in all, and answer `CopiedAhead`. Once in a worker's life."""

    export_bytes: int


class Pause(Message, frozen=True):
    """Stop after the current step, answer `Paused`, and generate no more.

    Sequences are exported up to `export_bytes` in all, those that run first, then the kept ones,
    the latest used before the others; of those copied ahead only what has come since.
    """

    export_bytes: int = 0


class ShareCores(Message, frozen=True):
    """Another worker loads beside this one from now on, or, not `shared`, no more."""

    shared: bool


class Shutdown(Message, frozen=True):
    """Exit with status 0."""


class Transcode(Message, frozen=True):
    """Before `Load`: begin to rewrite sequences for these KV types, and answer `Transcoded`.

    `carried` is as in `Load`, but of sequences that are `ahead` more files may follow, and whoever
    else works goes first. May come several times. The `Load` that follows repeats what it wants;
    where its types are others, this was in vain.
    """

    carried: tuple[tuple[str, ...], ...]
    type_k: str
    type_v: str
    ahead: bool = False


class TakeAhead(Message, frozen=True):
    """To a worker that has answered `Loaded` and had no request yet: read the files that were
    copied ahead into the cache, as far as they go, and answer `TakenAhead`. A `TakeIn` follows."""

    carried: tuple[tuple[str, ...], ...]
    type_k: str
    type_v: str


class TakeIn(Message, frozen=True):
    """To a worker that has answered `Loaded` and had no request yet: read the sequences `carried`,
    as in `Load`, into the cache, and answer `TakenIn`. What was taken ahead and is not the
    beginning of one of them is given up."""

    carried: tuple[tuple[str, ...], ...]
    type_k: str
    type_v: str


ToWorker = (
    Load
    | Transcode
    | TakeAhead
    | TakeIn
    | Generate
    | Cancel
    | ShareCores
    | CopyAhead
    | Pause
    | Shutdown
)


class Awake(Message, frozen=True):
    """First frame: the worker's modules are imported, and it waits to be told to load."""


class Hello(Message, frozen=True):
    """The worker was told to load, and its engine runs."""

    pid: int
    engine: str
    engine_version: str
    system_info: str


class Progress(Message, frozen=True):
    """Share of the weights that is loaded, 0 to 1."""

    fraction: float


class MemoryReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the engine says it allocated, by its own log lines; bytes on all devices together."""

    kv_bytes: int = 0
    recurrent_bytes: int = 0
    compute_bytes: int = 0
    output_bytes: int = 0
    weights_bytes: int = 0


class CarryReport(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of the carried sequences; `refused` has the reason of each that was not read
    and will be prefilled again.

    `n_tokens` came along, `n_tokens_ahead` of them copied before the pause. The old worker took
    `export_seconds` of the pause. `seconds` passed from when the next one could take them in until
    it had, of which it waited `transcode_seconds`, read for `import_seconds`, and decoded for
    `proof_seconds`.
    """

    n_sequences: int = 0
    n_tokens: int = 0
    refused: tuple[str, ...] = ()
    seconds: float = 0.0
    n_tokens_ahead: int = 0
    export_seconds: float = 0.0
    transcode_seconds: float = 0.0
    import_seconds: float = 0.0
    proof_seconds: float = 0.0


class Loaded(Message, frozen=True):
    """The model answers. `template` says where the chat template comes from, `speculation` how
    tokens are proposed, or why they are not."""

    n_ctx: int
    n_ctx_train: int
    n_vocab: int
    memory: MemoryReport
    template: str
    load_seconds: float
    flash_attn: bool = True
    carried: CarryReport | None = None
    speculation: str = "off"


class Transcoded(Message, frozen=True):
    """The files of a `Transcode` are rewritten, as far as they could be."""


class TakenAhead(Message, frozen=True):
    """What a `TakeAhead` named is in the cache, as far as it could be carried."""


class TakenIn(Message, frozen=True):
    """The sequences of a `TakeIn` are in the cache, as far as they could be carried."""

    carried: CarryReport | None = None


class LoadFailed(Message, frozen=True):
    """The engine refused. `out_of_memory` tells a plan that was too big from a bad file."""

    message: str
    out_of_memory: bool = False


class Tokenized(Message, frozen=True):
    """A request was read, and waits for its place in the batch. Requests are read one by one, in
    the order in which they came."""

    id: int


class Started(Message, frozen=True):
    """A request was tokenized and has its place in the batch. `form` says how the answer writes
    reasoning and calls, None where it is plain text."""

    id: int
    n_prompt_tokens: int
    form: Form | None = None


class NeedsContext(Message, frozen=True):
    """A prompt of `n_tokens` tokens does not fit the context, or an answer that may grow has filled
    it with so many. Ends the request in this worker."""

    id: int
    n_tokens: int


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """New text of one request. `tokens` are all ids drawn since the last delta, also those whose
    text is still held back (a split character, the beginning of a stop string)."""

    id: int
    text: str
    tokens: tuple[int, ...]


class Likelihood(msgspec.Struct, frozen=True, array_like=True):
    """A token, its bytes, and the natural logarithm of its probability under the model, before
    temperature, penalties and constraints."""

    token: int
    piece: bytes
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The likelihood of one drawn token of a request, and of the `top` most likely ones, the
    likeliest first. One for each token of the same step's delta, in order."""

    id: int
    drawn: Likelihood
    top: tuple[Likelihood, ...]


class Echo(msgspec.Struct, frozen=True, array_like=True):
    """The prompt of a request with `echo`, in the same step as its first token or its end.

    `pieces` are the bytes of all its tokens. `logprobs` are there where the request wants any:
    those of every token but the first, which nothing precedes.
    """

    id: int
    pieces: tuple[bytes, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


FinishReason = Literal["stop", "length"]


class End(msgspec.Struct, frozen=True, array_like=True):
    """A request is complete. Its last delta came in the same or an earlier step."""

    id: int
    reason: FinishReason
    n_prompt_tokens: int
    n_generated_tokens: int
    n_cached_tokens: int = 0
    stop_text: str | None = None


class Step(Message, frozen=True):
    """One decode step: the new text of all sequences, and which of them ended.

    Sent also for a step that only prefills, as a sign of life. `n_cells_used` are KV cells of
    running requests, `n_cells_kept` those that hold prefixes for later ones and count as free.
    `logprobs` are there for requests with `n_logprobs`, `echoes` for those with `echo`. Of the
    tokens in the batch `n_drafted` were proposed by speculation, and `n_accepted` were right.
    """

    deltas: tuple[Delta, ...] = ()
    ends: tuple[End, ...] = ()
    n_prefilled: int = 0
    n_cells_used: int = 0
    n_cells_kept: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    echoes: tuple[Echo, ...] = ()
    n_drafted: int = 0
    n_accepted: int = 0


class Failed(Message, frozen=True):
    """A request cannot be answered; `code` is an `errors` code."""

    id: int
    code: str
    message: str
    param: str | None = None


class ExportedState(msgspec.Struct, frozen=True, array_like=True):
    """One exported sequence: an open memory file of the worker's, and how much it holds. The
    beginning, `n_tokens_ahead` of the `n_tokens`, is in the files `ahead`, copied ahead."""

    fd: int
    n_bytes: int
    n_tokens: int
    ahead: tuple[int, ...] = ()
    n_tokens_ahead: int = 0


class CopiedPiece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a sequence: an open memory file of the worker's."""

    fd: int
    n_bytes: int


class CopiedAhead(Message, frozen=True):
    """What was in the cache, in pieces: for each sequence those of its beginning, in order.

    The worker keeps the files open until it exits; `Paused` tells which of them are still good.
    """

    sequences: tuple[tuple[CopiedPiece, ...], ...] = ()
    seconds: float = 0.0


class Paused(Message, frozen=True):
    """No step runs any more; everything generated was sent before this frame.

    The worker keeps the files of `states` open until it exits. `refused` has the reason of each
    sequence that was not exported.
    """

    states: tuple[ExportedState, ...] = ()
    export_seconds: float = 0.0
    refused: tuple[str, ...] = ()


FromWorker = (
    Awake
    | Hello
    | Progress
    | Loaded
    | Transcoded
    | TakenAhead
    | TakenIn
    | LoadFailed
    | Tokenized
    | Started
    | NeedsContext
    | Step
    | Failed
    | CopiedAhead
    | Paused
)
