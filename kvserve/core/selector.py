"""The choice: which K-V pair, how many layers on the GPU, and why every other candidate lost.

Order of preference: the best pair of the ladder with the whole model on the GPU, where pairs that
were measured to be equal count as one and the faster or smaller is taken; then fewer
layers (or fewer MoE experts) on the GPU at a pair that the floor allows; then refusal with the
numbers. Values in, values out.
"""

from dataclasses import replace

from kvserve.core.candidates import (
    MICRO_BATCHES,
    Device,
    best_split,
    launch_on,
    longest,
    micro_batches,
    price,
    splits,
)
from kvserve.core.dtypes import LADDER, CachePair
from kvserve.core.equals import best_of
from kvserve.core.findings import NOTHING_FOUND, Findings
from kvserve.core.floors import floor_of, is_below, why_below
from kvserve.core.loss import NOTHING_MEASURED, ExpectedLoss, Quality
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import (
    CPU_OVERHEADS,
    Overheads,
    prior_overheads,
)
from kvserve.core.plan import Candidate, Plan, Request
from kvserve.core.priors import prior_kld
from kvserve.core.shape import ModelShape
from kvserve.core.support import why_impossible, why_slow
from kvserve.errors import DoesNotFit, UsageError
from kvserve.units import MIB, format_bytes

MIN_RESERVE_BYTES = 256 * MIB
RESERVE_SHARE = 0.03
FALLBACK_CTX = 4096
"""Context for `--ctx max` where not even 256 tokens fit beside all the weights."""


def select(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    overheads: Overheads | None = None,
    findings: Findings = NOTHING_FOUND,
    quality: Quality = NOTHING_MEASURED,
) -> Plan:
    """Decide how to launch `shape` on `machine` for `request`.

    `overheads` are measured ones, None for the prior of the machine's GPU; `findings` are what
    llama.cpp said of some launches, and go before the formulas; `quality` is what was measured of
    pairs on this model and device, and goes before the priors. Raises UsageError for a
    request that contradicts the model or the machine, DoesNotFit where nothing allowed fits.
    """
    device = _device(shape, machine, request, overheads, findings)
    if request.n_ctx is not None and request.n_ctx > shape.n_ctx_train:
        raise UsageError(
            f"the model was trained for {shape.n_ctx_train} tokens and cannot take a context of "
            f"{request.n_ctx}: use --ctx {shape.n_ctx_train} or less",
            param="n_ctx",
        )
    _check_floor(request)
    pairs = _pairs(shape, request)
    refused = _refusals(pairs, shape, machine, request, device, quality)
    allowed = [pair for pair in pairs if pair not in refused]
    if not allowed:
        pair, reason = next(iter(refused.items()))
        raise UsageError(f"no cache type is left to choose from: {pair}: {reason}", param="pair")
    n_ctx = request.n_ctx or _longest(shape, request, device, allowed)

    whole = [_whole(shape, machine, device, request, pair, n_ctx) for pair in pairs]
    fitting = [c for c in whole if c.fits and c.launch.pair in allowed]
    split: list[Candidate] = []
    if fitting:
        chosen = best_of(fitting, quality)
    else:
        may_split = device.backend is Backend.CUDA and request.n_gpu_layers is None
        if may_split:
            split = list(splits(shape, machine, device, request, allowed, n_ctx))
        if not any(c.fits for c in split):
            raise _does_not_fit(shape, request, whole, split, allowed, n_ctx, device)
        chosen = best_split([c for c in split if c.fits], quality)
    judged = [_measured(_judge(c, chosen, refused, split=False), quality) for c in whole]
    judged += [_judge(c, chosen, refused, split=True) for c in split]
    judged = [
        replace(c, loss=_expected(shape, c.launch.pair, c.launch.n_ctx, quality)) for c in judged
    ]
    winner = next(c for c in judged if c.launch == chosen.launch)
    return Plan(
        shape=shape,
        machine=machine,
        request=request,
        chosen=winner,
        candidates=tuple(judged),
    )


def _whole(
    shape: ModelShape,
    machine: Machine,
    device: Device,
    request: Request,
    pair: CachePair,
    n_ctx: int,
) -> Candidate:
    """A pair with the largest micro-batch with which it fits; with the preferred one where it fits
    with none."""
    launch = launch_on(shape, request, device, pair, n_ctx)
    preferred = price(shape, machine, device, launch)
    if preferred.fits:
        return preferred
    for n in micro_batches(request)[1:]:
        smaller = price(shape, machine, device, replace(launch, n_ubatch=n))
        if smaller.fits:
            reason = f"chosen: the best quality that fits, in micro-batches of {n} tokens"
            return replace(smaller, reason=reason)
    return preferred


def default_reserve(free_bytes: int) -> int:
    """What stays free for the rest of the machine: 3 % of what is free, at least 256 MiB."""
    return max(MIN_RESERVE_BYTES, int(free_bytes * RESERVE_SHARE))


def _check_floor(request: Request) -> None:
    """A type that the user fixed stands above no floor, but not against one set beside it."""
    floor = floor_of(request)
    if request.pair is None or floor is None:
        return
    lowest, who = floor
    if is_below(request.pair, lowest):
        raise UsageError(
            f"--cache-type {request.pair} is below the floor {lowest} of {who}: leave one of the "
            "two out",
            param="pair",
        )


def _device(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    overheads: Overheads | None,
    findings: Findings,
) -> Device:
    def reserved(free_bytes: int) -> int:
        reserve = request.reserve_bytes
        return free_bytes - (default_reserve(free_bytes) if reserve is None else reserve)

    can_gpu = machine.build.cuda and bool(machine.gpus)
    if request.backend is Backend.CUDA and not can_gpu:
        raise UsageError(
            f"--device cuda: {_no_gpu(machine)}; use --device cpu or auto", param="device"
        )
    if request.n_gpu_layers and (not can_gpu or request.backend is Backend.CPU):
        on_cpu = request.backend is Backend.CPU
        missing = "--device cpu uses no GPU" if on_cpu else _no_gpu(machine)
        raise UsageError(
            f"--gpu-layers {request.n_gpu_layers}: {missing}; leave it out, or give 0",
            param="n_gpu_layers",
        )
    host_free = reserved(machine.host.free_bytes)
    on_gpu = can_gpu and request.backend is not Backend.CPU and request.n_gpu_layers != 0
    if on_gpu and request.backend is None and request.n_gpu_layers is None:
        on_gpu = _has_room_for_a_layer(shape, machine, overheads)
    if not on_gpu:
        prior = overheads or CPU_OVERHEADS
        return Device(Backend.CPU, host_free, host_free, prior, 1, findings)
    free = [reserved(gpu.free_bytes) for gpu in machine.gpus]
    capability = machine.gpus[0].compute_capability
    return Device(
        backend=Backend.CUDA,
        free_bytes=sum(free),
        host_free_bytes=host_free,
        overheads=overheads or prior_overheads(capability, shape),
        n_gpus=len(free),
        free_each=tuple(free) if len(free) > 1 else (),
        findings=findings,
    )


def _no_gpu(machine: Machine) -> str:
    return "no GPU is visible" if machine.build.cuda else "llama.cpp was built without CUDA"


def _has_room_for_a_layer(shape: ModelShape, machine: Machine, overheads: Overheads | None) -> bool:
    """Whether the GPUs have more free memory than a process costs them and one layer takes."""
    costs = overheads or prior_overheads(machine.gpus[0].compute_capability, shape)
    layer = min((layer.weights_bytes for layer in shape.layers), default=0)
    needed = len(machine.gpus) * costs.gpu_bytes + layer
    return sum(gpu.free_bytes for gpu in machine.gpus) > needed


def _pairs(shape: ModelShape, request: Request) -> tuple[CachePair, ...]:
    if request.pair is not None:
        return (request.pair,)
    if not shape.attention_layers:
        return LADDER[:1]
    return LADDER


def _refusals(
    pairs: tuple[CachePair, ...],
    shape: ModelShape,
    machine: Machine,
    request: Request,
    device: Device,
    quality: Quality,
) -> dict[CachePair, str]:
    """Why each pair that may not be chosen is out; what the user fixed is only held against
    what llama.cpp refuses."""
    refused: dict[CachePair, str] = {}
    for pair in pairs:
        reason = why_impossible(pair, shape)
        if reason is None and request.pair is None:
            slow = why_slow(pair, device.backend, machine.build)
            reason = why_below(pair, shape, request, quality) or slow
        if reason is not None:
            refused[pair] = reason
    return refused


def _longest(shape: ModelShape, request: Request, device: Device, allowed: list[CachePair]) -> int:
    lengths = [
        longest(shape, device, launch_on(shape, request, device, pair, shape.n_ctx_train))
        for pair in allowed
    ]
    return max(lengths) or min(shape.n_ctx_train, FALLBACK_CTX)


def _judge(
    candidate: Candidate, chosen: Candidate, refused: dict[CachePair, str], *, split: bool
) -> Candidate:
    pair = candidate.launch.pair
    if candidate.launch == chosen.launch:
        reason = chosen.reason or "chosen: the best quality that fits"
        if split:
            reason = "chosen: nothing allowed fits whole; best quality near the fastest split"
            if candidate.launch.n_ubatch < min(MICRO_BATCHES[0], candidate.launch.n_batch):
                reason += f", in micro-batches of {candidate.launch.n_ubatch} tokens"
    elif pair in refused:
        reason = refused[pair]
    elif not candidate.fits:
        reason = candidate.reason
    elif split:
        reason = "fits, but slower or of lower quality than the chosen split"
    elif _above(pair, chosen.launch.pair):
        reason = f"fits; {chosen.launch.pair} was measured to be as good"
    else:
        reason = f"fits, but of lower quality than {chosen.launch.pair}"
    return replace(candidate, reason=reason, may_be_chosen=pair not in refused)


def _above(pair: CachePair, other: CachePair) -> bool:
    return (pair.k.precision, pair.v.precision) > (other.k.precision, other.v.precision)


def _measured(candidate: Candidate, quality: Quality) -> Candidate:
    """With the measured speed in the predicted one's place."""
    tps = quality.decode_tps(candidate.launch.pair, candidate.launch.n_ctx)
    return candidate if tps is None else replace(candidate, predicted_tps=tps)


def _expected(
    shape: ModelShape, pair: CachePair, n_ctx: int, quality: Quality
) -> ExpectedLoss | None:
    loss = quality.loss(pair, n_ctx)
    if loss is not None:
        return ExpectedLoss(loss.mean_kld, loss.same_top, measured=True)
    prior = prior_kld(shape.architecture, pair)
    return None if prior is None else ExpectedLoss(prior, None, measured=False)


def _does_not_fit(
    shape: ModelShape,
    request: Request,
    whole: list[Candidate],
    split: list[Candidate],
    allowed: list[CachePair],
    n_ctx: int,
    device: Device,
) -> DoesNotFit:
    tried = [c for c in whole if c.launch.pair in allowed]
    smallest = min(tried, key=lambda c: c.memory.total_bytes)
    options = tuple(
        f"--ctx {length} fits with {pair}"
        for length, pair in sorted(
            {c.max_ctx: c.launch.pair for c in reversed(tried)}.items(), reverse=True
        )
        if 0 < length < n_ctx
    )
    where = "GPU memory" if device.backend is Backend.CUDA else "memory"
    splitting = ""
    if split:
        host_bytes = min(c.host_memory.total_bytes for c in split)
        splitting = (
            f", and with fewer layers there the host would need {format_bytes(host_bytes)} of "
            f"{format_bytes(device.host_free_bytes)}"
        )
    remedy = "use a smaller model"
    if request.n_gpu_layers is not None and device.backend is Backend.CUDA:
        remedy = f"use fewer --gpu-layers than {request.n_gpu_layers}, or auto"
    nearest = f"; nearest: {options[0]}" if options else f"; no context fits: {remedy}"
    name = shape.name or shape.architecture
    return DoesNotFit(
        f"{name} with {n_ctx} tokens does not fit: {smallest.launch.pair} needs "
        f"{format_bytes(smallest.memory.total_bytes)} of {format_bytes(device.free_bytes)} free "
        f"{where}{splitting}{nearest}",
        needed_bytes=smallest.memory.total_bytes,
        free_bytes=device.free_bytes,
        options=options,
        param="n_ctx",
    )
