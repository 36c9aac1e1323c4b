"""Ways to launch a model on a device, each with its price; `selector` chooses among them."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvserve.core.cells import pad_context, uses_gpu
from kvserve.core.devices import share_out
from kvserve.core.dtypes import LADDER, CachePair
from kvserve.core.findings import Findings
from kvserve.core.loss import Quality
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import (
    Overheads,
    deciding,
    estimate,
    gpu_layer_bytes,
    max_context,
    may_fit,
)
from kvserve.core.plan import N_CTX_PADDING, Candidate, Estimate, Launch, Request
from kvserve.core.shape import ModelShape
from kvserve.core.speed import predict_tps
from kvserve.units import format_bytes

SPEED_TOLERANCE = 0.9
"""Of split plans within 10 % of the fastest, the best quality is taken."""
SMALLER_BATCH_GAIN = 1.05
"""How much faster a split plan must decode to be taken with a smaller micro-batch: what lies on the
host is copied to the GPU once for each, so that prefill takes up to as many times longer."""


@dataclass(frozen=True, slots=True)
class Device:
    """The memory that decides, reserve taken off, and what a process costs there; `free_each` is
    that of every GPU where there are several."""

    backend: Backend
    free_bytes: int
    host_free_bytes: int
    overheads: Overheads
    n_gpus: int
    findings: Findings
    free_each: tuple[int, ...] = ()


MICRO_BATCHES = (512, 256, 128)
"""Where the user leaves the micro-batch open, the first with which a pair fits: half as many tokens
at once take half the activations, and prefill somewhat slower."""


def micro_batches(request: Request) -> tuple[int, ...]:
    """The micro-batches that may be tried, the preferred one first."""
    open_ones = MICRO_BATCHES if request.n_ubatch is None else (request.n_ubatch,)
    return tuple(dict.fromkeys(min(n, request.n_batch) for n in open_ones))


def launch_on(
    shape: ModelShape, request: Request, device: Device, pair: CachePair, n_ctx: int
) -> Launch:
    """The launch of a pair with as many layers on the device as the request wants there."""
    everything = shape.n_layer + 1
    asked = everything if request.n_gpu_layers is None else min(request.n_gpu_layers, everything)
    return Launch(
        backend=device.backend,
        pair=pair,
        n_ctx=pad_context(n_ctx),
        n_parallel=request.n_parallel,
        n_batch=request.n_batch,
        n_ubatch=micro_batches(request)[0],
        n_gpu_layers=asked if device.backend is Backend.CUDA else 0,
        n_draft=request.n_draft if shape.takes_back else 0,
        draft_model=request.draft_model,
    )


def price(shape: ModelShape, machine: Machine, device: Device, launch: Launch) -> Candidate:
    """Price one launch, its layers shared out over the GPUs; `_judge` fills in the reason."""
    try:
        launch = placed(shape, device, launch)
        computed = deciding(estimate(shape, launch, device.overheads, device.n_gpus), launch)
        priced = launch
    except ValueError:  # rows that do not divide into blocks; `why_impossible` tells it better
        priced = replace(launch, pair=LADDER[0])
        computed = deciding(estimate(shape, priced, device.overheads, device.n_gpus), launch)
    exact = launch in device.findings.exact
    bill = _bill(shape, device, priced)
    memory = deciding(bill, launch)
    headroom, where = _headroom(device, bill, launch)
    host_short = bill.host.total_bytes > device.host_free_bytes
    refusal = device.findings.refused.get(launch)
    return Candidate(
        launch=launch,
        memory=memory,
        host_memory=bill.host,
        free_bytes=device.free_bytes,
        headroom_bytes=headroom,
        fits=headroom >= 0 and not host_short and refusal is None,
        reason=f"llama.cpp refuses it: {refusal}"
        if refusal is not None
        else _shortage(headroom, where, bill.host.total_bytes - device.host_free_bytes),
        max_ctx=longest(shape, device, priced),
        predicted_tps=predict_tps(shape, priced, machine),
        exact=exact,
        formula_bytes=computed.own_bytes if exact else None,
    )


def longest(shape: ModelShape, device: Device, launch: Launch) -> int:
    """The longest context of a launch, by the formulas and by how far off they were for the same
    launch at the length nearest to it that llama.cpp laid out."""
    if device.free_each and uses_gpu(launch):
        return _longest_on_several(shape, device, launch)

    def fitting(free_bytes: int) -> int:
        return max_context(shape, launch, device.overheads, device.n_gpus, free_bytes)

    n_ctx = fitting(device.free_bytes)
    error = _error_near(shape, device, replace(launch, n_ctx=n_ctx))
    return fitting(device.free_bytes - error) if error else n_ctx


def _longest_on_several(shape: ModelShape, device: Device, launch: Launch) -> int:
    """The same with layers that move between the GPUs as the context grows."""

    def fits(n_ctx: int) -> bool:
        trial = placed(shape, device, replace(launch, n_ctx=n_ctx))
        bill = estimate(shape, trial, device.overheads, device.n_gpus)
        return _headroom(device, bill, trial)[0] >= 0

    lengths = range(N_CTX_PADDING, pad_context(shape.n_ctx_train) + 1, N_CTX_PADDING)
    n_fitting = bisect_left(lengths, True, key=lambda n_ctx: not fits(n_ctx))
    return min(lengths[n_fitting - 1], shape.n_ctx_train) if n_fitting else 0


def _bill(shape: ModelShape, device: Device, launch: Launch) -> Estimate:
    """The estimate, with llama.cpp's figures where it laid the launch out, and with its difference
    from the formulas where it laid out the same launch with another context."""
    bill = estimate(shape, launch, device.overheads, device.n_gpus)
    if launch in device.findings.exact:
        return device.findings.corrected(bill, launch)
    error = 0 if bill.each else _error_near(shape, device, launch)
    if not error:
        return bill
    memory = deciding(bill, launch)
    shifted = replace(memory, compute_bytes=max(0, memory.compute_bytes + error))
    return Estimate(shifted, bill.host) if memory is bill.gpu else Estimate(bill.gpu, shifted)


def _error_near(shape: ModelShape, device: Device, launch: Launch) -> int:
    """The exact bytes less the computed ones of the launch, at the nearest context that is known;
    0 where none is."""
    known = [k for k in device.findings.exact if replace(k, n_ctx=launch.n_ctx) == launch]
    if not known:
        return 0
    nearest = min(known, key=lambda k: abs(k.n_ctx - launch.n_ctx))
    bill = estimate(shape, nearest, device.overheads, device.n_gpus)
    exact = device.findings.corrected(bill, nearest)
    return deciding(exact, nearest).total_bytes - deciding(bill, nearest).total_bytes


def placed(shape: ModelShape, device: Device, launch: Launch) -> Launch:
    """The launch with its layers shared out over the GPUs, where there are several."""
    if not device.free_each or not uses_gpu(launch):
        return launch
    sizes = gpu_layer_bytes(shape, launch)
    return share_out(shape, launch, device.free_each, device.overheads.gpu_bytes, sizes)


def _headroom(device: Device, bill: Estimate, launch: Launch) -> tuple[int, str]:
    """What is left on the device that decides, or on the fullest of several GPUs, and its name."""
    if not bill.each:
        return device.free_bytes - deciding(bill, launch).total_bytes, ""
    left = [f - m.total_bytes for f, m in zip(device.free_each, bill.each, strict=True)]
    gpu = left.index(min(left))
    return left[gpu], f" for GPU {gpu}"


def _shortage(headroom: int, where: str, host_shortage: int) -> str:
    if headroom < 0:
        return f"{format_bytes(-headroom)} too big{where}"
    if host_shortage > 0:
        return f"{format_bytes(host_shortage)} short of host memory"
    return ""


def splits(
    shape: ModelShape,
    machine: Machine,
    device: Device,
    request: Request,
    allowed: list[CachePair],
    n_ctx: int,
) -> Iterator[Candidate]:
    """For each pair, the most layers on the GPU that fit, and for MoE models the fewest layers
    whose experts must leave it; with a smaller micro-batch where that keeps more of them there."""
    for pair in allowed:
        whole = launch_on(shape, request, device, pair, n_ctx)
        by_layers = [replace(whole, n_gpu_layers=n) for n in range(shape.n_layer, 0, -1)]
        found = list(_better_and_better(shape, device, request, by_layers))
        for launch in found:
            yield price(shape, machine, device, launch)
        if not found:
            on_host = replace(whole, backend=Backend.CPU, n_gpu_layers=0)
            host = replace(
                device,
                backend=Backend.CPU,
                free_bytes=device.host_free_bytes,
                n_gpus=1,
                free_each=(),
            )
            yield price(shape, machine, host, on_host)
        if shape.expert_bytes:
            by_experts = [replace(whole, n_cpu_moe=n) for n in range(1, shape.n_layer + 1)]
            for launch in _better_and_better(shape, device, request, by_experts):
                yield price(shape, machine, device, launch)


def _better_and_better(
    shape: ModelShape, device: Device, request: Request, launches: list[Launch]
) -> Iterator[Launch]:
    """The first launch that fits, in the preferred micro-batches and in each smaller one with which
    an earlier one does; `launches` take less and less of the GPU."""
    best = len(launches)
    for n_ubatch in micro_batches(request):
        trials = [replace(launch, n_ubatch=n_ubatch) for launch in launches[:best]]
        first = _first_fitting(shape, device, trials)
        if first is not None:
            best = trials.index(first)
            yield first


def _first_fitting(shape: ModelShape, device: Device, launches: list[Launch]) -> Launch | None:
    """The first launch that fits, of launches that take less and less of the GPU."""

    def fits(launch: Launch) -> bool:
        if not may_fit(shape, launch, device.overheads, device.n_gpus, device.free_bytes):
            return False
        launch = placed(shape, device, launch)
        if launch in device.findings.refused:
            return False
        return _headroom(device, _bill(shape, device, launch), launch)[0] >= 0

    first = bisect_left(launches, True, key=fits)
    # Compute buffers do not always shrink with the layers: one that seemed too big may fit.
    while first > 0 and fits(launches[first - 1]):
        first -= 1
    return launches[first] if first < len(launches) and fits(launches[first]) else None


def best_split(fitting: list[Candidate], quality: Quality) -> Candidate:
    """The best quality among the split plans that are about as fast as the fastest: the least
    measured loss where all of them were measured, the ladder's order otherwise."""

    usual = max(c.launch.n_ubatch for c in fitting)

    def speed(candidate: Candidate) -> float:
        # Without a known bandwidth, more of the model on the GPU stands for faster.
        fast = candidate.predicted_tps or float(candidate.memory.weights_bytes)
        return fast if candidate.launch.n_ubatch == usual else fast / SMALLER_BATCH_GAIN

    fastest = max(speed(c) for c in fitting)
    near = [c for c in fitting if speed(c) >= SPEED_TOLERANCE * fastest]
    losses = {c: quality.excess(c.launch.pair, c.launch.n_ctx) for c in near}
    measured = None not in losses.values()

    def rank(candidate: Candidate) -> tuple[float, int, int]:
        pair, loss = candidate.launch.pair, losses[candidate]
        return -(loss or 0.0) if measured else 0.0, pair.k.precision, pair.v.precision

    best = max(rank(c) for c in near)
    return max((c for c in near if rank(c) == best), key=speed)
