"""Which pairs a request rules out: by type, by measured numbers, by task, by architecture.

A task's floor is a measured threshold where the pair was measured, and a documented prior where it
was not. A measurement overrules every prior.
"""

from dataclasses import replace

from kvserve.core.dtypes import CachePair, KvType
from kvserve.core.loss import REFERENCE_PAIR, Quality
from kvserve.core.plan import Request, Task
from kvserve.core.priors import ARCHITECTURE_PRIORS
from kvserve.core.shape import ModelShape

_F16, _Q8, _Q4 = (CachePair(t, t) for t in (KvType.F16, KvType.Q8_0, KvType.Q4_0))

TASK_FLOORS: dict[Task, CachePair] = {
    Task.MATH: _F16,
    Task.CODE: _F16,
    Task.RETRIEVAL: _F16,
    Task.RAG: _Q8,
    Task.CHAT: _Q8,
    Task.TOOLS: _Q8,
    Task.SUMMARIZE: _Q8,
    Task.CLASSIFY: _Q4,
}
"""Priors: exact multi-step work breaks first under quantization, gist last (docs/quality.md)."""

EXCESS_LIMITS: dict[CachePair, float] = {_F16: 0.002, _Q8: 0.02, _Q4: 0.2}
"""For each prior floor, the KLD above the control's that a measured pair may cost."""

TASK_EVIDENCE: dict[Task, tuple[str, ...]] = {
    Task.MATH: ("arithmetic",),
    Task.CODE: ("code",),
    Task.RETRIEVAL: ("citation", "needles", "recall"),
    Task.RAG: ("citation", "needles"),
    Task.CHAT: ("recall", "facts"),
    Task.TOOLS: ("tools",),
    Task.CLASSIFY: ("classify",),
}
"""The measured tasks whose significant loss rules a pair out for a use."""

SIGNIFICANT = 0.05


def floor_of(request: Request) -> tuple[CachePair, str] | None:
    """The worst pair a request allows by its type, and who says so."""
    if request.floor is not None:
        return request.floor, "--kv-floor"
    if request.task is not None:
        return TASK_FLOORS[request.task], f"--task {request.task}"
    return None


def is_below(pair: CachePair, floor: CachePair) -> bool:
    """Whether K or V has less precision than the floor's."""
    return pair.k.precision < floor.k.precision or pair.v.precision < floor.v.precision


def why_below(pair: CachePair, shape: ModelShape, request: Request, quality: Quality) -> str | None:
    """Why `pair` is too poor for the request; None where it may be chosen."""
    reason = _why_below(pair, shape, request, quality)
    if reason is None and request.also is not None:
        return _why_below(pair, shape, replace(request, task=request.also), quality)
    return reason


def _why_below(
    pair: CachePair, shape: ModelShape, request: Request, quality: Quality
) -> str | None:
    if pair == REFERENCE_PAIR:
        return None
    n_ctx = request.n_ctx or shape.n_ctx_train
    by_numbers = _by_numbers(pair, request, quality, n_ctx)
    if by_numbers is not None:
        return by_numbers
    if request.floor is not None:
        return _by_type(pair, request.floor, "--kv-floor")
    if quality.loss(pair, n_ctx) is None:
        return _by_prior(pair, shape, request)
    if request.task is not None:
        return _by_measurement(pair, request.task, quality, n_ctx)
    return None


def _by_numbers(pair: CachePair, request: Request, quality: Quality, n_ctx: int) -> str | None:
    if request.max_kld is None and request.min_top1 is None:
        return None
    loss = quality.loss(pair, n_ctx)
    if loss is None:
        flag = "--max-kld" if request.max_kld is not None else "--min-top1"
        return f"not measured, which {flag} needs: run kvserve eval"
    if request.max_kld is not None and loss.mean_kld > request.max_kld:
        return f"measured KLD {loss.mean_kld:.4f} is over --max-kld {request.max_kld:g}"
    if request.min_top1 is not None and loss.same_top < request.min_top1:
        return f"{loss.same_top:.1%} same top tokens are under --min-top1 {request.min_top1:.1%}"
    return None


def _by_type(pair: CachePair, floor: CachePair, who: str) -> str | None:
    if is_below(pair, floor):
        return f"below the floor {floor} of {who}"
    return None


def _by_prior(pair: CachePair, shape: ModelShape, request: Request) -> str | None:
    prior = ARCHITECTURE_PRIORS.get(shape.architecture)
    if prior is not None and prior.lowest_k and pair.k.precision < prior.lowest_k.precision:
        return f"prior: {prior.source}; run kvserve eval to know"
    if request.task is None:
        return None
    floor, who = TASK_FLOORS[request.task], f"--task {request.task}"
    if prior is not None and (prior.q8_0_kld or 0.0) > EXCESS_LIMITS[floor]:
        return f"prior: {prior.source}, too much for {who}; run kvserve eval to know"
    return _by_type(pair, floor, who)


def _by_measurement(pair: CachePair, task: Task, quality: Quality, n_ctx: int) -> str | None:
    for result in quality.tasks:
        worse = result.n_lost > result.n_won and result.p_value < SIGNIFICANT
        telling = result.measurable and result.task in TASK_EVIDENCE.get(task, ())
        if result.pair == pair and telling and worse:
            return (
                f"measured: {result.n_candidate} of {result.n} right at {result.task}, "
                f"{result.n_reference} at f16 (p {result.p_value:.3f})"
            )
    limit = EXCESS_LIMITS[TASK_FLOORS[task]]
    excess = quality.excess(pair, n_ctx) or 0.0
    if excess > limit:
        return f"measured: KLD {excess:.4f} above the noise, over {limit:g} for --task {task}"
    return None
