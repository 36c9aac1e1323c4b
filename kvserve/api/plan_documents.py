"""A plan as plain JSON values: the contract of `plan --json` and `/admin/plan`.

Keys are added, never renamed; sizes are integer bytes, unknown values are null.
"""

from dataclasses import asdict
from typing import Any

from kvserve.core.machine import Gpu, Machine
from kvserve.core.plan import Candidate, Memory, Plan, Request
from kvserve.core.shape import ModelShape

Document = dict[str, Any]


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


def _name(value: object) -> str | None:
    return None if value is None else str(value)
