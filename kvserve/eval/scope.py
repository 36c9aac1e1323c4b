"""How much an evaluation measures: presets, and the flags that change them. Pure."""

from dataclasses import dataclass, replace

from kvserve.core.dtypes import LADDER, CachePair, KvType, parse_pair
from kvserve.core.loss import REFERENCE_PAIR
from kvserve.errors import UsageError
from kvserve.eval.tasks.suite import chosen
from kvserve.settings.values import read_tokens

FEWEST_PREFIX = 16
"""Tokens that are read before the first one is scored."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What is measured. `depths` are contexts in tokens; of each of `n_chunks` pieces of text
    `n_prefill` and `n_decode` tokens are scored; `n_items` are those of each task, whose documents
    have up to `n_lines` lines."""

    pairs: tuple[CachePair, ...]
    depths: tuple[int, ...]
    n_chunks: int
    n_prefill: int
    n_decode: int
    n_items: int
    n_lines: int
    carried: bool = True
    tasks: tuple[str, ...] = ()


_QUICK_PAIRS = (
    REFERENCE_PAIR,
    CachePair(KvType.Q8_0, KvType.Q8_0),
    CachePair(KvType.Q8_0, KvType.Q4_0),
    CachePair(KvType.Q4_0, KvType.Q4_0),
)
_ALL_TASKS = chosen("all")
QUICK = Scope(_QUICK_PAIRS, (1024,), n_chunks=2, n_prefill=192, n_decode=24, n_items=8, n_lines=24)
NORMAL = Scope(
    LADDER,
    (4096,),
    n_chunks=4,
    n_prefill=256,
    n_decode=64,
    n_items=20,
    n_lines=120,
    tasks=_ALL_TASKS,
)
FULL = Scope(
    LADDER,
    (8192, 32768),
    n_chunks=8,
    n_prefill=512,
    n_decode=128,
    n_items=50,
    n_lines=400,
    tasks=_ALL_TASKS,
)


def preset(*, quick: bool, full: bool) -> Scope:
    """The preset of the flags. Raises UsageError for both."""
    if quick and full:
        raise UsageError("--quick and --full: choose one of them", param="quick")
    return QUICK if quick else FULL if full else NORMAL


def narrowed(
    scope: Scope,
    *,
    n_ctx_train: int,
    pairs: str | None = None,
    ctx: str | None = None,
    chunks: int | None = None,
    tasks: str | None = None,
) -> Scope:
    """The scope with what the user asked for, or what the model allows.

    `pairs` is `all`, or pairs by commas as `q8_0:q4_0` or `q8_0-q4_0`; the reference is always
    among them. `ctx` is depths by commas, or `none` for tasks alone. Raises UsageError, naming the
    flag.
    """
    if pairs is not None:
        scope = replace(scope, pairs=_pairs(pairs))
    if ctx == "none":
        scope = replace(scope, depths=())
    elif ctx is not None:
        scope = replace(scope, depths=depths(ctx, "ctx"))
        for depth in scope.depths:
            if depth > n_ctx_train:
                raise UsageError(
                    f"--ctx {depth}: the model was trained for {n_ctx_train} tokens", param="ctx"
                )
    else:
        within = tuple(depth for depth in scope.depths if depth <= n_ctx_train)
        scope = replace(scope, depths=within or (n_ctx_train,))
    if tasks is not None:
        scope = replace(scope, tasks=chosen(tasks))
    if chunks is not None:
        if chunks < 1:
            raise UsageError(f"--chunks {chunks}: at least 1", param="chunks")
        scope = replace(scope, n_chunks=chunks)
    least = scope.n_prefill + scope.n_decode + FEWEST_PREFIX
    if scope.depths and min(scope.depths) < least:
        raise UsageError(
            f"--ctx {min(scope.depths)}: at least {least} tokens are needed to score "
            f"{scope.n_prefill + scope.n_decode} of them",
            param="ctx",
        )
    return scope


def shortened(scope: Scope, longest: int) -> Scope:
    """The scope with the depths of at most `longest` tokens, or with that one where all are
    deeper. A scope whose fewest tokens are more than that stays as it is."""
    within = tuple(depth for depth in scope.depths if depth <= longest)
    least = scope.n_prefill + scope.n_decode + FEWEST_PREFIX
    if within == scope.depths or (not within and longest < least):
        return scope
    return replace(scope, depths=within or (longest,))


def depths(text: str, flag: str) -> tuple[int, ...]:
    """Token counts by commas, as `8192,32K`, in rising order. Raises UsageError."""
    try:
        found = {read_tokens(part) for part in text.split(",")}
    except ValueError as error:
        raise UsageError(f"--{flag} {text}: {error}", param=flag) from error
    return tuple(sorted(found))


def _pairs(text: str) -> tuple[CachePair, ...]:
    if text == "all":
        return LADDER
    try:
        chosen = [parse_pair(part.replace("-", ":")) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--pairs: {error}", param="pairs") from error
    return tuple(dict.fromkeys([REFERENCE_PAIR, *chosen]))
