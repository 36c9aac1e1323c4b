"""A plan and a status as plain JSON values: the contract of `plan --json` and `/admin/*`.

Keys are added, never renamed; sizes are integer bytes, unknown values are null.
"""

from dataclasses import asdict
from typing import Any

import msgspec

from kvserve.core.lifecycle import Phase
from kvserve.core.machine import Backend, Gpu, Machine
from kvserve.core.plan import Candidate, Memory, Plan, Request
from kvserve.core.shape import ModelShape
from kvserve.supervisor.news import Item, PhaseEntered, WeightsLoaded
from kvserve.supervisor.status import Measured, ReloadOutcome, ReloadRecord, Status

Document = dict[str, Any]
_ENGINE_ITEMS = ("weights_bytes", "kv_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")


def plan_document(plan: Plan) -> Document:
    """A decision with its grounds and every candidate."""
    return {
        "model": _model(plan.shape),
        "machine": _machine(plan.machine),
        "request": _request(plan.request),
        "chosen": _candidate(plan.chosen),
        "candidates": [_candidate(candidate) for candidate in plan.candidates],
        "confirmed": plan.confirmed,
    }


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
        Phase.DRAINING: "running requests finish before a reload",
        Phase.LEAVING: "the old worker leaves before a reload",
        Phase.FAILED: "the worker cannot be started",
        Phase.STOPPING: "the server is stopping",
        Phase.STOPPED: "the server has stopped",
    }[phase]


def _reload(record: ReloadRecord) -> Document:
    carry = None if record.carry is None else msgspec.structs.asdict(record.carry)
    return {**asdict(record), "carry": carry}


def _model(shape: ModelShape) -> Document:
    return {
        "architecture": shape.architecture,
        "name": shape.name,
        "quantization": shape.quantization,
        "file_bytes": shape.file_bytes,
        "weights_bytes": shape.weights_bytes,
        "expert_bytes": shape.expert_bytes,
        "n_ctx_train": shape.n_ctx_train,
        "n_vocab": shape.n_vocab,
        "n_embd": shape.n_embd,
        "n_layer": shape.n_layer,
        "n_attention_layers": len(shape.attention_layers),
        "n_head": shape.n_head,
        "n_head_kv": shape.n_head_kv,
        "n_expert": shape.n_expert,
        "n_expert_used": shape.n_expert_used,
        "has_chat_template": shape.has_chat_template,
    }


def _machine(machine: Machine) -> Document:
    pairs = machine.build.kv_pairs
    return {
        "host": asdict(machine.host),
        "gpus": [_gpu(gpu) for gpu in machine.gpus],
        "build": {
            "version": machine.build.version,
            "cuda": machine.build.cuda,
            "kv_pairs": None if pairs is None else sorted(str(pair) for pair in pairs),
        },
    }


def _gpu(gpu: Gpu) -> Document:
    capability = gpu.compute_capability
    return {
        "index": gpu.index,
        "uuid": gpu.uuid,
        "name": gpu.name,
        "total_bytes": gpu.total_bytes,
        "free_bytes": gpu.free_bytes,
        "compute_capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "bandwidth_bytes_per_second": gpu.bandwidth,
    }


def _request(request: Request) -> Document:
    return {
        "n_ctx": request.n_ctx,
        "parallel": request.n_parallel,
        "task": _name(request.task),
        "device": _name(request.backend),
        "cache_type": _name(request.pair),
        "kv_floor": _name(request.floor),
        "n_gpu_layers": request.n_gpu_layers,
        "n_batch": request.n_batch,
        "n_ubatch": request.n_ubatch,
        "reserve_bytes": request.reserve_bytes,
        "max_kld": request.max_kld,
        "min_top1": request.min_top1,
    }


def _candidate(candidate: Candidate) -> Document:
    launch = candidate.launch
    return {
        "device": str(launch.backend),
        "cache_type_k": str(launch.pair.k),
        "cache_type_v": str(launch.pair.v),
        "n_ctx": launch.n_ctx,
        "parallel": launch.n_parallel,
        "n_batch": launch.n_batch,
        "n_ubatch": launch.n_ubatch,
        "n_gpu_layers": launch.n_gpu_layers,
        "n_cpu_moe": launch.n_cpu_moe,
        "flash_attn": launch.flash_attn,
        "tensor_split": list(launch.tensor_split),
        "memory": _memory(candidate.memory),
        "host_memory": _memory(candidate.host_memory),
        "free_bytes": candidate.free_bytes,
        "headroom_bytes": candidate.headroom_bytes,
        "predicted_tps": candidate.predicted_tps,
        "fits": candidate.fits,
        "reason": candidate.reason,
        "max_ctx": candidate.max_ctx,
        "exact": candidate.exact,
        "formula_bytes": candidate.formula_bytes,
        "formula_error": candidate.formula_error,
        "loss": None if candidate.loss is None else asdict(candidate.loss),
    }


def _memory(memory: Memory) -> Document:
    return {**asdict(memory), "total_bytes": memory.total_bytes}


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


def _name(value: object) -> str | None:
    return None if value is None else str(value)
