"""Room for a measurement: the weights and contexts beside each other, placed as `start` would.
Values in, values out."""

from dataclasses import dataclass, replace

from kvserve.core.candidates import micro_batches
from kvserve.core.cells import pad_context
from kvserve.core.dtypes import CachePair
from kvserve.core.loss import REFERENCE_PAIR
from kvserve.core.machine import Backend, Machine
from kvserve.core.memory import Overheads, deciding, estimate, prior_overheads
from kvserve.core.plan import N_CTX_PADDING, Launch, Request
from kvserve.core.selector import default_reserve, select
from kvserve.core.shape import ModelShape
from kvserve.errors import DoesNotFit
from kvserve.units import format_bytes

_F32 = 4


@dataclass(frozen=True, slots=True)
class Need:
    """What a measurement holds at a time: `n_contexts` f16 contexts of `n_ctx` tokens, each with
    `n_outputs` rows of logits, and on the host `n_rows` more rows and `host_bytes`. `flag` is what
    the user makes it smaller by; `n_beside` tokens of the context come on top of that."""

    n_ctx: int
    n_contexts: int = 1
    n_outputs: int = 1
    n_rows: int = 0
    host_bytes: int = 0
    flag: str = "--ctx"
    n_beside: int = 0


def place(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    need: Need,
    overheads: Overheads | None = None,
) -> Launch:
    """The launch of the f16 reference, with room for all else that is needed: with the layers,
    the experts and the shares of several GPUs that `start` would choose there.

    Of `request` the device, the layers, the batch and the reserve count. Raises UsageError, and
    DoesNotFit, which names the longest context that fits.
    """
    try:
        return _place(shape, machine, request, need, overheads)
    except DoesNotFit as error:
        longest = longest_context(shape, machine, request, need, overheads)
        beside = _beside_bytes(shape, machine, request, need)
        needed, free = error.needed_bytes + beside, error.free_bytes + beside
        what = "an f16 reference and a candidate" if need.n_contexts > 1 else "a context"
        options = (f"{need.flag} {longest - need.n_beside}",) if longest > need.n_beside else ()
        nearest = f"{options[0]} fits" if options else "no context fits"
        raise DoesNotFit(
            f"measuring {need.n_ctx} tokens takes the weights and {what} beside them, "
            f"{format_bytes(needed)} of {format_bytes(free)} free: {nearest}; or make room "
            "(`kvserve stop`), or choose another --device or fewer --gpu-layers",
            needed_bytes=needed,
            free_bytes=free,
            options=options,
            param=need.flag.split()[0].strip("-,"),
        ) from error


def longest_context(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    need: Need,
    overheads: Overheads | None = None,
) -> int:
    """The longest context within `need.n_ctx`, a multiple of 256, for which there is room; 0 where
    there is none. Raises UsageError."""
    low, high = 0, need.n_ctx // N_CTX_PADDING
    while low < high:
        middle = (low + high + 1) // 2
        try:
            smaller = replace(need, n_ctx=middle * N_CTX_PADDING)
            _place(shape, machine, request, smaller, overheads)
            low = middle
        except DoesNotFit:
            high = middle - 1
    return low * N_CTX_PADDING


def whole_launch(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    pair: CachePair,
    n_ctx: int,
    overheads: Overheads | None = None,
) -> Launch | None:
    """The launch of one context of `pair` with all layers on the device, or as many as were asked
    for; None where it does not fit. Raises UsageError."""
    layers = request.n_gpu_layers
    if layers is None and _may_use_gpu(machine, request):
        layers = shape.n_layer + 1
    kept = _reserve_bytes(machine, request, _first_bytes(shape, machine, request))
    asked = replace(_bare(request), n_ctx=n_ctx, pair=pair, n_gpu_layers=layers, reserve_bytes=kept)
    try:
        return select(shape, machine, asked, overheads).chosen.launch
    except DoesNotFit:
        return None


def _place(
    shape: ModelShape,
    machine: Machine,
    request: Request,
    need: Need,
    overheads: Overheads | None,
) -> Launch:
    taken = need.host_bytes + need.n_rows * shape.n_vocab * _F32
    host = replace(machine.host, free_bytes=max(0, machine.host.free_bytes - taken))
    beside = _beside_bytes(shape, machine, request, need)
    machine = replace(machine, host=host)
    asked = replace(
        _bare(request),
        n_ctx=need.n_ctx,
        pair=REFERENCE_PAIR,
        reserve_bytes=_reserve_bytes(machine, request, beside),
    )
    return select(shape, machine, asked, overheads).chosen.launch


def _reserve_bytes(machine: Machine, request: Request, beside_bytes: int) -> int:
    """What stays free of each device: the user's reserve or the usual one, and its part of what is
    needed beside the context that is planned."""
    gpus = machine.gpus if _may_use_gpu(machine, request) else ()
    free = min((gpu.free_bytes for gpu in gpus), default=machine.host.free_bytes)
    usual = default_reserve(free) if request.reserve_bytes is None else request.reserve_bytes
    return usual + beside_bytes // max(1, len(gpus))


def _bare(request: Request) -> Request:
    """The request for one sequence, without any floor, and with one micro-batch for all pairs: what
    is compared shall differ in its types alone."""
    return replace(
        request,
        n_parallel=1,
        n_ubatch=micro_batches(request)[0],
        floor=None,
        task=None,
        also=None,
        max_kld=None,
        min_top1=None,
    )


def _may_use_gpu(machine: Machine, request: Request) -> bool:
    on_gpu = request.backend is not Backend.CPU and request.n_gpu_layers != 0
    return bool(machine.gpus) and machine.build.cuda and on_gpu


def _beside_bytes(shape: ModelShape, machine: Machine, request: Request, need: Need) -> int:
    """What the other contexts take where the layers run, and the logits of all."""
    others = (need.n_contexts - 1) * _context_bytes(shape, machine, request, need.n_ctx)
    logits = need.n_contexts * need.n_outputs * shape.n_vocab * _F32
    return others + logits + _first_bytes(shape, machine, request)


def _first_bytes(shape: ModelShape, machine: Machine, request: Request) -> int:
    """The smallest context, which the model is loaded with and which stays (worker/evaluation)."""
    return _context_bytes(shape, machine, request, N_CTX_PADDING)


def _context_bytes(shape: ModelShape, machine: Machine, request: Request, n_ctx: int) -> int:
    on_gpu = _may_use_gpu(machine, request)
    launch = Launch(
        backend=Backend.CUDA if on_gpu else Backend.CPU,
        pair=REFERENCE_PAIR,
        n_ctx=pad_context(n_ctx),
        n_parallel=1,
        n_batch=request.n_batch,
        n_ubatch=micro_batches(request)[0],
        n_gpu_layers=shape.n_layer + 1 if on_gpu else 0,
    )
    bill = estimate(shape, launch, prior_overheads(None, shape), 1)
    return deciding(bill, launch).own_bytes
