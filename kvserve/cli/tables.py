"""A plan and a status as text for a terminal. Pure: values in, lines out."""

from collections.abc import Sequence
from datetime import UTC, datetime

from kvserve.core.loss import REFERENCE_PAIR
from kvserve.core.machine import Backend
from kvserve.core.plan import Candidate, Plan
from kvserve.core.shape import ModelShape
from kvserve.supervisor.profiles import NOTHING_KNOWN, Known
from kvserve.units import GIB, format_bytes, format_gib

_COLUMNS = (
    "K:V",
    "layers",
    "weights",
    "KV",
    "compute",
    "runtime",
    "total",
    "left",
    "longest ctx",
    "tok/s",
    "KLD",
)


def plan_text(plan: Plan, known: Known = NOTHING_KNOWN) -> str:
    """The decision: the model, the machine, every candidate with its GiB and its loss, and why it
    lost; `known` tells where the losses are from."""
    rows = [_row(candidate, plan.shape) for candidate in plan.candidates]
    reasons = [candidate.reason for candidate in plan.candidates]
    marks = ["*" if candidate == plan.chosen else " " for candidate in plan.candidates]
    table = _aligned(_COLUMNS, rows)
    lines = [model_line(plan.shape), machine_line(plan), "", f"  {table[0]}"]
    lines += [
        f"{mark} {line}  {reason}"
        for mark, line, reason in zip(marks, table[1:], reasons, strict=True)
    ]
    lines += ["", *quality_lines(known, plan.chosen.launch.n_ctx), *difference_lines(plan)]
    lines.append(chosen_line(plan))
    return "\n".join(lines)


def quality_lines(known: Known, n_ctx: int) -> list[str]:
    """What the measurements are from, or why those that are there do not count."""
    if known.refusal is not None:
        return [f"quality  priors; a profile was refused: {known.refusal}"]
    if known.profile is None:
        return []
    day = datetime.fromtimestamp(known.profile.measured_at, UTC).date()
    if not known.quality.losses:
        return [f"quality  priors; what was measured on {day} holds no KLD"]
    noise = known.quality.noise(n_ctx)
    return [f"quality  measured on {day}: KLD in nats against f16, whose own noise is {noise:.4f}"]


def difference_lines(plan: Plan) -> list[str]:
    """Where llama.cpp, asked, told other sizes than were computed."""
    return [
        f"note     {candidate.launch.pair}: cache and buffers take "
        f"{format_bytes(candidate.memory.own_bytes)}, as llama.cpp says, not the "
        f"{format_bytes(candidate.formula_bytes)} that were computed; the table has its figures"
        for candidate in plan.differences
        if candidate.formula_bytes is not None
    ]


def model_line(shape: ModelShape) -> str:
    """The model in one line."""
    name = shape.name or shape.architecture
    kind = f" {shape.quantization}" if shape.quantization else ""
    return (
        f"model    {name}{kind}: {shape.n_layer} layers, {format_bytes(shape.weights_bytes)} of "
        f"weights, trained for {shape.n_ctx_train} tokens"
    )


def machine_line(plan: Plan) -> str:
    """The memory that decides, in one line."""
    chosen = plan.chosen
    if chosen.launch.backend is Backend.CPU:
        host = plan.machine.host
        limit = " (cgroup limit)" if host.limited_by_cgroup else ""
        kept = host.free_bytes - chosen.free_bytes
        return (
            f"memory   host: {format_bytes(host.free_bytes)} free of "
            f"{format_bytes(host.total_bytes)}{limit}, {format_bytes(kept)} kept free"
        )
    free = sum(gpu.free_bytes for gpu in plan.machine.gpus)
    total = sum(gpu.total_bytes for gpu in plan.machine.gpus)
    names = ", ".join(gpu.name for gpu in plan.machine.gpus)
    kept = free - chosen.free_bytes
    return (
        f"memory   {names}: {format_bytes(free)} free of {format_bytes(total)}, "
        f"{format_bytes(kept)} kept free"
    )


def chosen_line(plan: Plan) -> str:
    """The choice in one line."""
    launch = plan.chosen.launch
    layers = _layers(plan.chosen, plan.shape)
    where = "on the CPU" if launch.backend is Backend.CPU else f"with {layers} layers on the GPU"
    if len(launch.tensor_split) > 1:
        where += f"s ({' + '.join(f'{n:g}' for n in launch.tensor_split)})"
    experts = f", the experts of {launch.n_cpu_moe} on the CPU" if launch.n_cpu_moe else ""
    n_draft_bytes = plan.chosen.memory.draft_bytes
    draft = f" ({format_bytes(n_draft_bytes)} the draft model)" if n_draft_bytes else ""
    return (
        f"chosen   KV cache {launch.pair} at {launch.n_ctx} tokens {where}{experts}: "
        f"{format_bytes(plan.chosen.memory.total_bytes)}{draft}, "
        f"{format_bytes(plan.chosen.headroom_bytes)} to spare ({_source(plan)})"
    )


def _source(plan: Plan) -> str:
    return "sizes confirmed by llama.cpp" if plan.confirmed else "sizes computed"


def _row(candidate: Candidate, shape: ModelShape) -> tuple[str, ...]:
    memory = candidate.memory
    tps = candidate.predicted_tps
    return (
        str(candidate.launch.pair),
        _layers(candidate, shape),
        format_gib(memory.weights_bytes),
        format_gib(memory.kv_bytes + memory.recurrent_bytes),
        format_gib(memory.compute_bytes + memory.output_bytes),
        format_gib(memory.runtime_bytes),
        format_gib(memory.total_bytes),
        f"{candidate.headroom_bytes / GIB:+.2f}",
        str(candidate.max_ctx) if candidate.max_ctx else "-",
        f"~{tps:.0f}" if tps is not None else "?",
        _loss(candidate),
    )


def _loss(candidate: Candidate) -> str:
    loss = candidate.loss
    if candidate.launch.pair == REFERENCE_PAIR:
        return "reference"
    if loss is None:
        return "?"
    return f"{loss.mean_kld:.4f} measured" if loss.measured else f"~{loss.mean_kld:.3f} prior"


def _layers(candidate: Candidate, shape: ModelShape) -> str:
    if candidate.launch.backend is Backend.CPU:
        return "CPU"
    return f"{candidate.launch.n_gpu_layers}/{shape.n_layer + 1}"


def _aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """First column to the left, the others to the right, each as wide as it must be."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "  ".join([first, *rest])

    return [line(header), *(line(row) for row in rows)]
