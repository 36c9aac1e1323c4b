"""The settings: each with its name, default, meaning and check."""

from ipaddress import ip_address
from typing import Annotated, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core.core_schema import ValidationInfo

from kvserve.core.growth import Adapt, GrowthPolicy
from kvserve.core.machine import Backend, Host, Machine
from kvserve.core.plan import Request
from kvserve.errors import UsageError
from kvserve.settings import values

_DRAFTED_TOGETHER = 16
"""Proposed tokens of all requests in a step, where one alone may not have more."""


class Settings(BaseModel):
    """All settings, checked. `load_settings` makes them; the fields' descriptions are the docs."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: values.TextOrNone = Field(
        None, description="Path of a GGUF file (the first one of a split model), or `demo`."
    )
    ctx: values.Context = Field(
        8192,
        description="Longest single request in tokens, prompt and answer together, as `8192` or "
        "`32K`; `max` takes the longest that fits.",
    )
    parallel: Annotated[int, BeforeValidator(values.whole(1, 256))] = Field(
        4, description="Requests that run at the same time, 1 to 256."
    )
    cache_type: values.PairOrAuto = Field(
        "auto",
        description="KV-cache types: `auto` chooses, `q8_0` fixes both, `q8_0:q4_0` fixes K and V.",
    )
    kv_floor: values.PairOrNone = Field(
        None, description="The worst KV types that may be chosen, as `q8_0` or `q8_0:q4_0`."
    )
    task: values.TaskOrNone = Field(
        None,
        description="What the context is for, which sets a floor: `math`, `code`, `retrieval`, "
        "`rag`, `chat`, `summarize`, `classify`, `tools`.",
    )
    max_kld: values.NumberOrNone = Field(
        None,
        description="The largest mean KLD in nats that `kvserve eval` may have measured for the KV "
        "types, as `0.01`; types that were not measured are out.",
    )
    min_top1: values.ShareOrNone = Field(
        None,
        description="The least share of tokens for which the likeliest is that of f16, as measured "
        "by `kvserve eval`: `0.95` or `95%`.",
    )
    device: Annotated[
        Literal["auto", "cpu", "cuda"], BeforeValidator(values.choice("auto", "cpu", "cuda"))
    ] = Field("auto", description="Where layers run: `auto` takes the GPU if there is one.")
    gpu_layers: values.Layers = Field(
        "auto", description="Layers on the GPU, the output layer counted as one; 0 for none."
    )
    max_ctx: values.ContextLimit = Field(
        None,
        description="The context never grows beyond this many tokens; the model's own length "
        "otherwise.",
    )
    adapt: Annotated[
        Literal["off", "grow", "full"], BeforeValidator(values.choice("off", "grow", "full"))
    ] = Field(
        "grow",
        description="What a request that needs more context than there is may cause: `off` refuses "
        "it, `grow` reloads with the next power of two and other KV types, `full` also goes back "
        "to `ctx` after a time without need.",
    )
    below_floor: Annotated[
        Literal["serve", "refuse"], BeforeValidator(values.choice("serve", "refuse"))
    ] = Field(
        "serve",
        description="What becomes of a request whose task needs better KV types than any plan has: "
        "`serve` with a warning in a header, or `refuse` with 409.",
    )
    reasoning_format: Annotated[
        Literal["auto", "deepseek", "none"],
        BeforeValidator(values.choice("auto", "deepseek", "none")),
    ] = Field(
        "auto",
        description="Where a model's reasoning goes: `auto`, or `deepseek` as llama-server also "
        "calls it, tells it as `reasoning_content`, `none` leaves it in the text.",
    )
    shrink_after: values.Seconds = Field(
        600.0, description="With `adapt = full`, the time without need after which it goes back."
    )
    min_reload_interval: values.Seconds = Field(
        30.0, description="Least time between a reload that shrinks and one that grows, or back."
    )
    threads: values.Threads = Field(
        "auto", description="CPU threads; `auto` takes the physical cores that are allowed."
    )
    batch: Annotated[int, BeforeValidator(values.whole(1, 65536))] = Field(
        512, description="Most tokens handed to llama.cpp in one step."
    )
    ubatch: values.MicroBatch = Field(
        "auto",
        description="Most tokens computed at once; more is faster prefill and more memory. "
        "Never above `batch`. `auto` is 512, or 256 or 128 where a better KV type fits with that.",
    )
    speculate: Annotated[
        Literal["auto", "off", "ngram", "draft"],
        BeforeValidator(values.choice("auto", "off", "ngram", "draft")),
    ] = Field(
        "auto",
        description="Speculative decoding, as far as it is measured to pay: `ngram` proposes what "
        "followed the last tokens where the text had them before, `draft` what `draft_model` "
        "generates, where `ngram` has nothing; `auto` is `draft` with a draft model, else `ngram`.",
    )
    draft_model: values.TextOrNone = Field(
        None,
        description="Path of a GGUF file with a small model of the same vocabulary, or `demo`, for "
        "speculative decoding.",
    )
    draft_max: Annotated[int, BeforeValidator(values.whole(1, 64))] = Field(
        8, description="Most tokens that speculation proposes for one request in a step, 1 to 64."
    )
    reserve: values.Reserve = Field(
        "auto",
        description="Memory left free on the device, as `256MiB` or `3%` of its total; `auto` is "
        "3 % or 256 MiB, whichever is more.",
    )
    vram_free: values.SizeOrNone = Field(
        None,
        description="Plan as if this much GPU memory were free, as `7.6GiB` (`kvserve plan` only).",
    )
    host: values.Text = Field("127.0.0.1", description="Address to listen on.")
    port: Annotated[int, BeforeValidator(values.whole(0, 65535))] = Field(
        8000, description="Port to listen on; 0 takes any free one."
    )
    api_key: values.Keys = Field(
        (), description="Keys that clients must send one of; several with commas, or a TOML list."
    )
    admin_key: values.Keys = Field(
        (),
        description="Keys for `/admin/*`, which the API keys then no longer open; written as those "
        "are.",
    )
    insecure: values.Switch = Field(
        False, description="Allow an address that other machines reach without an API key."
    )
    queue_limit: Annotated[int, BeforeValidator(values.whole(1, 1_000_000))] = Field(
        256, description="Requests that may wait; one more is answered 429."
    )
    request_timeout: values.SecondsOrNone = Field(
        600.0, description="Time that a request may take in total; 0 or `none` for no limit."
    )
    drain_timeout: values.Seconds = Field(
        0.0,
        description="How long a reload waits for running requests before it pauses them; paused "
        "ones go on in the same stream.",
    )
    pause_timeout: values.PositiveSeconds = Field(
        10.0,
        description="How long the step may take after which a worker pauses for a reload, beside "
        "the copying of its sequences; one that takes longer is killed, and its requests are "
        "computed again.",
    )
    carry_ram: values.SizeOrAuto = Field(
        "auto",
        description="Host memory for conversations' KV cache on its way to the next worker, as "
        "`4GiB`; 0 computes them again, `auto` is a quarter of what is free.",
    )
    cache_ram: values.SizeOrAuto = Field(
        "auto",
        description="Host memory for conversations that had to leave the KV cache and may come "
        "back, as `4GiB`; 0 for none, `auto` is an eighth of what is free.",
    )
    load_timeout: values.PositiveSeconds = Field(
        600.0, description="How long a model may take to load before the worker is ended."
    )
    step_timeout: values.PositiveSeconds = Field(
        120.0, description="A worker that has work and is silent this long is killed."
    )
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(values.choice("debug", "info", "warning", "error")),
    ] = Field("info", description="Least severe messages that are logged.")
    log_format: Annotated[
        Literal["auto", "console", "json"],
        BeforeValidator(values.choice("auto", "console", "json")),
    ] = Field("auto", description="Form of the log on stderr; `auto` is `console` on a terminal.")
    state_dir: values.AnyPath = Field(
        default_factory=lambda: platformdirs.user_state_path("kvserve"),
        description="Directory of the log file and of what a running daemon leaves for "
        "`kvserve status` and the other commands.",
    )
    config: values.PathOrNone = Field(
        None,
        description="The TOML file to read; without one, `config.toml` in the user's "
        "configuration directory for kvserve, if it exists.",
    )
    profile: values.TextOrNone = Field(
        None, description="The `[profiles.NAME]` table that overrides the file's top level."
    )

    @field_validator("max_ctx")
    @classmethod
    def _not_below_ctx(cls, value: int | None, info: ValidationInfo) -> int | None:
        ctx = info.data.get("ctx")
        if value is not None and isinstance(ctx, int) and value < ctx:
            raise ValueError(f"{value} is below the context of {ctx}: raise it, or lower ctx")
        return value

    @property
    def api_keys(self) -> tuple[str, ...]:
        """The keys in clear, for the comparison with what a client sends."""
        return tuple(key.get_secret_value() for key in self.api_key)

    @property
    def admin_keys(self) -> tuple[str, ...]:
        """The admin keys in clear."""
        return tuple(key.get_secret_value() for key in self.admin_key)

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach `host`; a name other than localhost counts as yes."""
        try:
            return not ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"

    def check_exposure(self) -> None:
        """Raise UsageError where anybody on the network could use the server without a key."""
        if self.exposed and not self.api_key and not self.insecure:
            raise UsageError(
                f"--host {self.host} lets other machines in without a key: "
                "set KVSERVE_API_KEY or --api-key KEY, or add --insecure if that is meant",
                param="host",
            )

    @property
    def carry_bytes(self) -> int | None:
        """`carry_ram` in bytes; None for `auto`."""
        return None if self.carry_ram == "auto" else self.carry_ram

    @property
    def cache_bytes(self) -> int | None:
        """`cache_ram` in bytes; None for `auto`."""
        return None if self.cache_ram == "auto" else self.cache_ram

    @property
    def speculation(self) -> Literal["off", "ngram", "draft"]:
        """Where proposed tokens come from, `auto` resolved. Raises UsageError for `draft` without a
        model."""
        if self.speculate == "draft" and self.draft_model is None:
            raise UsageError(
                "--speculate draft needs a model that drafts: add --draft-model FILE.gguf",
                param="draft_model",
            )
        if self.speculate == "auto":
            return "ngram" if self.draft_model is None else "draft"
        return self.speculate

    @property
    def n_draft(self) -> int:
        """Most tokens that speculation may add to a batch: their logits take memory."""
        if self.speculate == "off":
            return 0
        return min(self.draft_max * self.parallel, max(self.draft_max, _DRAFTED_TOGETHER))

    def growth(self, n_ctx_train: int) -> GrowthPolicy:
        """Return when the context of a model trained for `n_ctx_train` tokens moves by itself."""
        return GrowthPolicy(
            adapt=Adapt(self.adapt),
            max_ctx=min(self.max_ctx or n_ctx_train, n_ctx_train),
            shrink_after=self.shrink_after,
            min_interval=self.min_reload_interval,
        )

    def n_threads(self, host: Host) -> int:
        """Return the CPU threads to use on this host."""
        return host.n_cores if self.threads == "auto" else self.threads

    def to_request(self, machine: Machine) -> Request:
        """Return what the selector is asked; a reserve in percent is taken of `machine`'s memory.

        That is all GPUs together, or the host where the layers run there.
        """
        reserve_bytes = None if isinstance(self.reserve, str) else self.reserve
        if isinstance(reserve_bytes, values.Percent):
            on_gpu = machine.gpus and self.device != "cpu"
            total_bytes = sum(gpu.total_bytes for gpu in machine.gpus)
            reserve_bytes = reserve_bytes.of(total_bytes if on_gpu else machine.host.total_bytes)
        return Request(
            n_ctx=None if self.ctx == "max" else self.ctx,
            n_parallel=self.parallel,
            backend=None if self.device == "auto" else Backend(self.device),
            pair=None if self.cache_type == "auto" else self.cache_type,
            floor=self.kv_floor,
            task=self.task,
            n_gpu_layers=None if self.gpu_layers == "auto" else self.gpu_layers,
            n_batch=self.batch,
            n_ubatch=None if self.ubatch == "auto" else min(self.ubatch, self.batch),
            reserve_bytes=reserve_bytes,
            max_kld=self.max_kld,
            min_top1=self.min_top1,
            n_draft=self.n_draft,
        )
