"""`kvserve bench --kv`: each pair's prefill and decode speed, kept with the measured quality."""

import sys
from dataclasses import dataclass, replace

from msgspec import structs

from kvserve.cli.evaluating import print_outcome
from kvserve.cli.models import open_model
from kvserve.core.dtypes import CachePair
from kvserve.core.eval_room import Need
from kvserve.core.machine import Backend
from kvserve.core.plan import Launch
from kvserve.core.speed import bandwidth_ratio
from kvserve.errors import UsageError
from kvserve.eval.scope import NORMAL, depths, narrowed
from kvserve.eval.session import Job, run
from kvserve.eval.tables import ARTICLE_NOTE
from kvserve.eval.target import Placed, Target, read_target
from kvserve.ipc.evaluating import N_OUTPUTS, N_WARM_UP, EvalRequest, Pacing
from kvserve.settings import load_settings
from kvserve.supervisor.profiles import Profiles

CPU_DEPTHS = (0, 1024, 4096)
GPU_DEPTHS = (0, 8192, 32000)
N_PREFILL = {Backend.CPU: 128, Backend.CUDA: 512}
N_DECODE = {Backend.CPU: 16, Backend.CUDA: 64}


@dataclass(frozen=True, slots=True)
class KvBenchOptions:
    """What is timed. `depths` are tokens in the cache, by commas; 0 may be among them."""

    model: str | None
    pairs: str | None
    depths: str | None
    threads: int | None
    cpu: bool
    as_json: bool


def bench_kv(options: KvBenchOptions) -> None:
    """Time each pair at each depth on this device, store it in the model's profile, print it."""
    flags = {
        "model": options.model,
        "threads": None if options.threads is None else str(options.threads),
        "device": "cpu" if options.cpu else None,
    }
    settings = load_settings(flags)
    model = open_model(settings)
    target = read_target(settings, model.file)
    n_train = model.file.shape.n_ctx_train
    scope = narrowed(NORMAL, n_ctx_train=n_train, pairs=options.pairs, ctx="none")
    backend = target.backend
    pacing = Pacing(_depths(options, backend, n_train), N_PREFILL[backend], N_DECODE[backend])
    placed, pacing = _place(target, scope.pairs, pacing, shrink=options.depths is None)
    job = Job(
        request=EvalRequest(
            load=placed.load, pairs=tuple(str(pair) for pair in scope.pairs), pacing=pacing
        ),
        environment=placed.environment,
        key=placed.key,
        model_id=model.id,
        settings={
            "depths": ",".join(map(str, pacing.depths)),
            "published estimate": ARTICLE_NOTE,
        },
        predicted={
            (pair, depth): bandwidth_ratio(model.file.shape, pair, depth)
            for pair in scope.pairs
            for depth in pacing.depths
        },
    )
    outcome = run(job, Profiles(), sys.stderr)
    print_outcome(outcome, options.as_json)


def _place(
    target: Target, pairs: tuple[CachePair, ...], pacing: Pacing, *, shrink: bool
) -> tuple[Placed, Pacing]:
    """All layers on the device, and each pair as deep as it fits there then. Where that is nowhere,
    the split that `start` would choose for f16, for all pairs alike. Raises DoesNotFit, where the
    usual depths may not `shrink`."""
    launches: list[Launch] = []
    deepest: dict[str, int] = {}
    for pair in pairs:
        deepest[str(pair)] = -1
        for depth in sorted(pacing.depths, reverse=True):
            found = target.whole(pair, depth + pacing.n_beside)
            if found is not None:
                launches.append(found)
                deepest[str(pair)] = depth
                break
    if launches:
        return target.placed(launches[0]), structs.replace(pacing, deepest=deepest)
    need = Need(pacing.n_ctx, 1, N_OUTPUTS, flag="--depths", n_beside=pacing.n_beside)
    longest = target.longest(need) - pacing.n_beside
    if shrink and 0 <= longest < max(pacing.depths):
        fitting = tuple(dict.fromkeys(min(depth, longest) for depth in pacing.depths))
        pacing = structs.replace(pacing, depths=fitting)
    return target.place(replace(need, n_ctx=pacing.n_ctx)), pacing


def _depths(options: KvBenchOptions, backend: Backend, n_ctx_train: int) -> tuple[int, ...]:
    deepest = n_ctx_train - N_PREFILL[backend] - N_DECODE[backend] - N_WARM_UP
    if options.depths is None:
        usual = GPU_DEPTHS if backend is Backend.CUDA else CPU_DEPTHS
        return tuple(dict.fromkeys(min(depth, deepest) for depth in usual))
    parts = [part.strip() for part in options.depths.split(",")]
    others = ",".join(part for part in parts if part != "0")
    found: tuple[int, ...] = (0,) if "0" in parts else ()
    found += depths(others, "depths") if others else ()
    if max(found) > deepest:
        raise UsageError(
            f"--depths {max(found)}: at most {deepest} with this model's {n_ctx_train} tokens",
            param="depths",
        )
    return found
