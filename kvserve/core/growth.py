"""When the context target moves by itself: up for a request that needs more, down after a while
without need. Values in, values out; times are seconds of one clock."""

from dataclasses import dataclass, replace
from enum import StrEnum

from kvserve.core.plan import Launch

SMALLEST_STEP = 256


class Adapt(StrEnum):
    """What may happen unasked: nothing, growing, or growing and going back."""

    OFF = "off"
    GROW = "grow"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class GrowthPolicy:
    """`max_ctx` is the longest context that may be grown to. After `shrink_after` without a
    request that needed more than the context the user asked for, FULL goes back to it; two
    reloads in opposite directions are at least `min_interval` apart."""

    adapt: Adapt
    max_ctx: int
    shrink_after: float = 600.0
    min_interval: float = 30.0


@dataclass(frozen=True, slots=True)
class Reloads:
    """The reloads so far: the context the user asked for, the one in force, when the last one
    ended and whether it went down, and when a request last needed more than was asked for."""

    asked_ctx: int
    n_ctx: int
    changed_at: float
    went_down: bool
    needed_at: float


def grown(needed: int, policy: GrowthPolicy) -> int | None:
    """The context for a request of `needed` tokens: the next power of two, within the policy's
    limit. None where the policy does not allow it."""
    if policy.adapt is Adapt.OFF or needed > policy.max_ctx:
        return None
    step = SMALLEST_STEP
    while step < needed:
        step *= 2
    return min(step, policy.max_ctx)


def roomier(n_ctx: int, together: int, policy: GrowthPolicy) -> int | None:
    """The context that holds `together` tokens of several requests, or as many as the policy
    allows; None where that is no more than `n_ctx`, which one of them needs."""
    wider = grown(min(together, policy.max_ctx), policy)
    return wider if wider is not None and wider > n_ctx else None


def costs_no_more(launch: Launch, wider: Launch) -> bool:
    """Whether a launch with more context is otherwise the same: KV types, layers on the GPU."""
    return replace(wider, n_ctx=launch.n_ctx, tensor_split=launch.tensor_split) == launch


def may_grow_now(now: float, reloads: Reloads, policy: GrowthPolicy) -> bool:
    """Whether a reload upward may start: at once, but not right after one downward."""
    return not reloads.went_down or now - reloads.changed_at >= policy.min_interval


def shrunk(now: float, reloads: Reloads, policy: GrowthPolicy) -> int | None:
    """The context to go back to now; None to stay."""
    if policy.adapt is not Adapt.FULL or reloads.n_ctx <= reloads.asked_ctx:
        return None
    unused = now - max(reloads.needed_at, reloads.changed_at)
    if unused < policy.shrink_after or now - reloads.changed_at < policy.min_interval:
        return None
    return reloads.asked_ctx
