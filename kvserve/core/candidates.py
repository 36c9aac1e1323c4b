"""Ways to launch a model on a device, each with its price; `selector` chooses among them."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvserve.core.cells import pad_context
from kvserve.core.dtypes import LADDER, CachePair
from kvserve.core.findings import Findings
from kvserve.core.loss import Quality
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import Overheads, deciding, estimate, max_context, may_fit
from kvserve.core.plan import Candidate, Launch, Request
from kvserve.core.shape import ModelShape
from kvserve.core.speed import predict_tps
from kvserve.units import format_bytes

SPEED_TOLERANCE = 0.9
"""Of split plans within 10 % of the fastest, the best quality is taken."""


@dataclass(frozen=True, slots=True)
class Device:
    """The memory that decides, reserve taken off, and what a process costs there."""

    backend: Backend
    free_bytes: int
    host_free_bytes: int
    overheads: Overheads
    n_gpus: int
    tensor_split: tuple[float, ...]
    findings: Findings


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
        tensor_split=device.tensor_split,
        n_draft=request.n_draft if shape.takes_back else 0,
    )


def price(shape: ModelShape, machine: Machine, device: Device, launch: Launch) -> Candidate:
    """Price one launch; the reason is filled in by `_judge`."""
    try:
        bill = estimate(shape, launch, device.overheads, device.n_gpus)
    except ValueError:  # rows that do not divide into blocks; `why_impossible` tells it better
        f16 = replace(launch, pair=LADDER[0])
        bill = estimate(shape, f16, device.overheads, device.n_gpus)
        launch_priced = f16
    else:
        launch_priced = launch
    computed, exact = deciding(bill, launch), launch in device.findings.exact
    bill = device.findings.corrected(bill, launch)
    memory = deciding(bill, launch)
    headroom = device.free_bytes - memory.total_bytes
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
        else _shortage(headroom, bill.host.total_bytes - device.host_free_bytes),
        max_ctx=max_context(
            shape, launch_priced, device.overheads, device.n_gpus, device.free_bytes
        ),
        predicted_tps=predict_tps(shape, launch_priced, machine),
        exact=exact,
        formula_bytes=computed.own_bytes if exact else None,
    )


def _shortage(headroom: int, host_shortage: int) -> str:
    if headroom < 0:
        return f"{format_bytes(-headroom)} too big"
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
    whose experts must leave it."""
    for pair in allowed:
        whole = launch_on(shape, request, device, pair, n_ctx)
        launches = [replace(whole, n_gpu_layers=n) for n in range(shape.n_layer, 0, -1)]
        most = _first_fitting(shape, device, launches)
        if most is not None:
            yield price(shape, machine, device, most)
        else:
            on_host = replace(whole, backend=Backend.CPU, n_gpu_layers=0, tensor_split=())
            host = replace(device, backend=Backend.CPU, free_bytes=device.host_free_bytes, n_gpus=1)
            yield price(shape, machine, host, on_host)
        if shape.expert_bytes:
            launches = [replace(whole, n_cpu_moe=n) for n in range(1, shape.n_layer + 1)]
            fewest = _first_fitting(shape, device, launches)
            if fewest is not None:
                yield price(shape, machine, device, fewest)


def _first_fitting(shape: ModelShape, device: Device, launches: list[Launch]) -> Launch | None:
    """The first launch that fits, of launches that take less and less of the GPU."""

    def fits(launch: Launch) -> bool:
        if launch in device.findings.refused or not may_fit(
            shape, launch, device.overheads, device.n_gpus, device.free_bytes
        ):
            return False
        bill = estimate(shape, launch, device.overheads, device.n_gpus)
        bill = device.findings.corrected(bill, launch)
        return bill.gpu.total_bytes <= device.free_bytes

    first = bisect_left(launches, True, key=fits)
    # Compute buffers do not always shrink with the layers: one that seemed too big may fit.
    while first > 0 and fits(launches[first - 1]):
        first -= 1
    return launches[first] if first < len(launches) and fits(launches[first]) else None


def best_split(fitting: list[Candidate], quality: Quality) -> Candidate:
    """The best quality among the split plans that are about as fast as the fastest: the least
    measured loss where all of them were measured, the ladder's order otherwise."""

    def speed(candidate: Candidate) -> float:
        # Without a known bandwidth, more of the model on the GPU stands for faster.
        return candidate.predicted_tps or float(candidate.memory.weights_bytes)

    fastest = max(speed(c) for c in fitting)
    near = [c for c in fitting if speed(c) >= SPEED_TOLERANCE * fastest]
    losses = {c: quality.excess(c.launch.pair, c.launch.n_ctx) for c in near}
    measured = None not in losses.values()

    def rank(candidate: Candidate) -> tuple[float, int, int]:
        pair, loss = candidate.launch.pair, losses[candidate]
        return -(loss or 0.0) if measured else 0.0, pair.k.precision, pair.v.precision

    best = max(rank(c) for c in near)
    return max((c for c in near if rank(c) == best), key=speed)
