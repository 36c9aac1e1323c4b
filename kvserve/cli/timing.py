"""`kvserve bench --kv`: each pair's prefill and decode speed, kept with the measured quality."""

import sys
from dataclasses import dataclass

from kvserve.cli.evaluating import print_outcome, target_of
from kvserve.cli.models import open_model
from kvserve.core.machine import Backend
from kvserve.errors import UsageError
from kvserve.eval.scope import NORMAL, depths, narrowed
from kvserve.eval.session import Job, run
from kvserve.ipc.evaluating import EvalRequest, Pacing
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
    target = target_of(settings, model)
    n_train = model.file.shape.n_ctx_train
    scope = narrowed(NORMAL, n_ctx_train=n_train, pairs=options.pairs, ctx="none")
    backend = target.backend
    pacing = Pacing(_depths(options, backend, n_train), N_PREFILL[backend], N_DECODE[backend])
    job = Job(
        request=EvalRequest(
            load=target.load, pairs=tuple(str(pair) for pair in scope.pairs), pacing=pacing
        ),
        environment=target.environment,
        key=target.key,
        model_id=model.id,
        settings={"depths": ",".join(map(str, pacing.depths))},
    )
    print_outcome(run(job, Profiles(), sys.stderr), options.as_json)


def _depths(options: KvBenchOptions, backend: Backend, n_ctx_train: int) -> tuple[int, ...]:
    deepest = n_ctx_train - N_PREFILL[backend] - N_DECODE[backend] - 2
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
