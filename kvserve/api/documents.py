"""The daemon's status as plain JSON values: the contract of `/admin/*`.

Keys are added, never renamed; sizes are integer bytes, unknown values are null.
"""

from dataclasses import asdict

import msgspec

from kvserve.api.plan_documents import Document, plan_document
from kvserve.core.lifecycle import Phase
from kvserve.core.machine import Backend
from kvserve.core.plan import Candidate
from kvserve.supervisor.news import Item, PhaseEntered, WeightsLoaded
from kvserve.supervisor.status import Measured, ReloadOutcome, ReloadRecord, Status

_ENGINE_ITEMS = ("weights_bytes", "kv_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")


def status_document(status: Status, *, model_id: str, ready: bool, now: float) -> Document:
    """The daemon at one moment; `now` is in seconds since the epoch."""
    plan = status.plan
    return {
        "model_id": model_id,
        "phase": str(status.phase),
        "ready": ready,
        "started_at": status.started_at,
        "uptime_seconds": max(0.0, now - status.started_at),
        "engine": status.engine,
        "chat_template": status.template,
        "worker_pid": status.worker_pid,
        "worker_deaths": status.n_worker_deaths,
        "load_fraction": status.load_fraction,
        "error": status.error,
        "retry_at": status.retry_at,
        "requests": {
            "waiting": status.n_waiting,
            "running": status.n_running,
            "answered": status.n_answered,
            "failed": status.n_failed,
        },
        "kv_cells_used": status.n_cells_used,
        "speculation": {
            "method": status.speculation,
            "draft_tokens": status.n_drafted,
            "accepted_tokens": status.n_accepted,
        },
        "memory": None if plan is None else memory_check(plan.chosen, status.measured),
        "reloads": [_reload(record) for record in status.reloads],
        "plan": None if plan is None else plan_document(plan),
    }


def reload_document(outcome: ReloadOutcome) -> Document:
    """The answer to a change of context."""
    return {
        "changed": outcome.changed,
        "seconds": outcome.seconds,
        "plan": plan_document(outcome.plan),
    }


def news_document(item: Item, now: float) -> Document:
    """One event of `/admin/events`; `now` is in seconds since the epoch."""
    match item:
        case PhaseEntered(phase, previous, seconds):
            facts: Document = {
                "event": "phase",
                "phase": str(phase),
                "previous": str(previous),
                "seconds": seconds,
            }
        case WeightsLoaded(fraction):
            facts = {"event": "load", "load_fraction": fraction}
        case ReloadRecord():
            facts = {"event": "reload", **_reload(item)}
    return {**facts, "at": now}


def describe_phase(phase: Phase, load_fraction: float | None) -> str:
    """One line for people on where the daemon stands."""
    loading = "the model is loading"
    if load_fraction is not None:
        loading += f" ({load_fraction:.0%})"
    return {
        Phase.IDLE: "no worker runs; one is about to start",
        Phase.LOADING: loading,
        Phase.SERVING: "requests are answered",
        Phase.OVERLAPPING: "requests are answered while the next worker loads",
        Phase.HANDOVER: "the next worker takes the conversations over",
        Phase.DRAINING: "running requests finish before a reload",
        Phase.LEAVING: "the old worker leaves before a reload",
        Phase.FAILED: "the worker cannot be started",
        Phase.STOPPING: "the server is stopping",
        Phase.STOPPED: "the server has stopped",
    }[phase]


def _reload(record: ReloadRecord) -> Document:
    carry = None if record.carry is None else msgspec.structs.asdict(record.carry)
    return {**asdict(record), "carry": carry}


def memory_check(chosen: Candidate, measured: Measured | None) -> Document:
    """Each item in bytes, predicted and measured (None where not known).

    The engine reports its items for all devices together, so the host's share is added to them;
    `device_bytes` is the deciding device alone.
    """
    items: Document = {}
    for name in _ENGINE_ITEMS:
        predicted = getattr(chosen.memory, name)
        if chosen.launch.backend is not Backend.CPU:
            predicted += getattr(chosen.host_memory, name)
        seen = None if measured is None else getattr(measured.engine, name)
        items[name] = {"predicted": predicted, "measured": seen}
    items["device_bytes"] = {
        "predicted": chosen.memory.total_bytes,
        "measured": None if measured is None else measured.device_bytes,
    }
    return items
