"""What Prometheus scrapes; the only importer of `prometheus_client`.

Names are `kvserve_` and what vLLM or llama-server call the same thing. One registry for each
`Metrics`, never the process's own. All methods are for the event loop's thread.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

CONTENT_TYPE = CONTENT_TYPE_LATEST

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 5.0, 30.0)
_LATENCY_BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PHASE_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Reload(Protocol):
    """The part of `supervisor.status.ReloadRecord` that is counted."""

    @property
    def reason(self) -> str:
        """What it was for: `start`, `context`, `grow`, …"""
        ...

    @property
    def outcome(self) -> str:
        """`done`, `rolled_back` or `failed`."""
        ...

    @property
    def seconds(self) -> float:
        """How long it took."""
        ...

    @property
    def n_tokens_carried(self) -> int:
        """Tokens of sequences that the new worker took over."""
        ...


@dataclass(frozen=True, slots=True)
class Levels:
    """The daemon at the moment of a scrape. `plan` are the labels of the plan in force; memory is
    in bytes by item, None where it is not known."""

    ready: bool
    phase: str
    n_waiting: int
    n_running: int
    n_cells_used: int
    n_cells: int
    plan: Mapping[str, str]
    predicted_bytes: Mapping[str, int]
    measured_bytes: Mapping[str, int | None]


class Metrics:
    """All series; an observer of the supervisor (`supervisor.observing.Observer`)."""

    def __init__(self, version: str, phases: tuple[str, ...]) -> None:
        self._registry = registry = CollectorRegistry()
        self._phases = phases
        build = Info("kvserve_build", "The program.", registry=registry)
        build.info({"version": version})

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"kvserve_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"kvserve_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"kvserve_{name}", text, labels, registry=registry, buckets=buckets)

        self._requests = counter(
            "requests",
            "Requests that ended, by outcome: stop, length, cancelled, or an error's code.",
            "outcome",
        )
        self._ttft = histogram(
            "time_to_first_token_seconds", "From submission to the first token.", _TTFT_BUCKETS
        )
        self._between = histogram(
            "inter_token_latency_seconds", "Between tokens of one request.", _TOKEN_BUCKETS
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From submission to the end.", _LATENCY_BUCKETS
        )
        self._prompt = counter("prompt_tokens", "Tokens of the prompts of answered requests.")
        self._generated = counter("generation_tokens", "Tokens that were drawn.")
        self._drafts = counter(
            "spec_decode_num_drafts", "Steps that checked tokens proposed by speculation."
        )
        self._drafted = counter(
            "spec_decode_num_draft_tokens", "Tokens that speculation proposed and a step checked."
        )
        self._accepted = counter(
            "spec_decode_num_accepted_tokens", "Those of them that were drawn."
        )
        self._hits = counter(
            "prefix_cache_hits", "Prompt tokens of answered requests that the KV cache had."
        )
        self._prefilled = counter("prefill_tokens", "Prompt tokens that were computed.")
        self._again = counter(
            "reprefilled_tokens", "Tokens that were computed again after a worker was replaced."
        )
        self._carried = counter(
            "carried_tokens", "Tokens whose KV state was carried over a reload."
        )
        self._reloads = counter(
            "reloads", "Loads and reloads that ended, by reason and outcome.", "reason", "outcome"
        )
        self._reload_seconds = histogram(
            "reload_duration_seconds", "Whole loads and reloads.", _PHASE_BUCKETS, "reason"
        )
        self._phase_seconds = histogram(
            "reload_phase_duration_seconds",
            "Time in each phase outside of serving: idle (waiting for memory, planning, spawning), "
            "loading, draining, leaving, failed.",
            _PHASE_BUCKETS,
            "phase",
        )
        self._deaths = counter(
            "worker_restarts", "Workers that ended by themselves, by cause.", "cause"
        )
        self._ready = gauge("ready", "1 while requests are answered and no reload is under way.")
        self._phase = gauge("phase", "1 for the phase the daemon is in.", "phase")
        self._running = gauge("num_requests_running", "Requests with a place in the batch.")
        self._waiting = gauge("num_requests_waiting", "Requests without a place.")
        self._cells_used = gauge("kv_cells_used", "KV cells of running requests.")
        self._cells = gauge("kv_cells", "KV cells that there are.")
        self._usage = gauge("kv_cache_usage_ratio", "KV cells used of all, 0 to 1.")
        self._predicted = gauge("memory_predicted_bytes", "Memory as planned, by item.", "item")
        self._measured = gauge(
            "memory_measured_bytes", "Memory as the engine and the device say, by item.", "item"
        )
        self._plan = Info("kvserve_plan", "The plan in force.", registry=registry)

    def render(self, levels: Levels) -> bytes:
        """The text that a scrape gets, of content type `CONTENT_TYPE`."""
        self._ready.set(levels.ready)
        for phase in self._phases:
            self._phase.labels(phase).set(phase == levels.phase)
        self._running.set(levels.n_running)
        self._waiting.set(levels.n_waiting)
        self._cells_used.set(levels.n_cells_used)
        self._cells.set(levels.n_cells)
        self._usage.set(levels.n_cells_used / levels.n_cells if levels.n_cells else 0.0)
        for family, items in (
            (self._predicted, levels.predicted_bytes),
            (self._measured, levels.measured_bytes),
        ):
            family.clear()
            for item, n_bytes in items.items():
                if n_bytes is not None:
                    family.labels(item).set(n_bytes)
        self._plan.info(dict(levels.plan))
        return generate_latest(self._registry)

    def step(self, n_prefilled: int, n_generated: int) -> None:
        """Count one decode step."""
        self._prefilled.inc(n_prefilled)
        self._generated.inc(n_generated)

    def drafted(self, n_drafted: int, n_accepted: int) -> None:
        """Count a step that checked proposed tokens."""
        self._drafts.inc()
        self._drafted.inc(n_drafted)
        self._accepted.inc(n_accepted)

    def first_token(self, seconds: float) -> None:
        """Count a request's first token."""
        self._ttft.observe(seconds)

    def next_tokens(self, n_tokens: int, seconds: float) -> None:
        """Count further tokens, each with its share of the time."""
        for _ in range(n_tokens):
            self._between.observe(seconds / n_tokens)

    def answered(self, n_prompt: int, n_cached: int, n_again: int) -> None:
        """Count a complete answer."""
        self._prompt.inc(n_prompt)
        self._hits.inc(n_cached)
        self._again.inc(n_again)

    def ended(self, outcome: str, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(outcome).inc()
        self._latency.observe(seconds)

    def phase_left(self, phase: str, seconds: float) -> None:
        """Count the time in a phase; serving and stopping are no part of a reload."""
        if phase not in ("serving", "stopping"):
            self._phase_seconds.labels(phase).observe(seconds)

    def reloaded(self, record: Reload) -> None:
        """Count a load or a reload."""
        self._reloads.labels(record.reason, record.outcome).inc()
        self._reload_seconds.labels(record.reason).observe(record.seconds)
        self._carried.inc(record.n_tokens_carried)

    def worker_died(self, cause: str) -> None:
        """Count a worker's end; what stands in brackets is for people."""
        self._deaths.labels(cause.partition(" (")[0]).inc()
