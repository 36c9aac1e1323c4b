"""Times the planned KV pair and all of the ladder on the real model, each in its own process."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import msgspec
from msgspec import structs

from kvserve.core.dtypes import LADDER, CachePair
from kvserve.core.machine import Backend
from kvserve.core.plan import Launch
from kvserve.doctor.facts import KernelSpeed
from kvserve.ipc.measuring import KernelTime
from kvserve.supervisor.loads import load_of, worker_environment

KERNELS_ARGV = (sys.executable, "-m", "kvserve.worker.kernels")
N_CTX_GPU = 8192
N_CTX_CPU = 512
"""A processor takes minutes to fill what a GPU fills in a second."""
_TIMEOUT_SECONDS = 300.0


def probe_kernels(
    model_path: str,
    chosen: Launch,
    n_threads: int,
    argv: Sequence[str] = KERNELS_ARGV,
    pairs: Sequence[CachePair] = LADDER,
) -> tuple[KernelSpeed, ...]:
    """Load the model as planned, with each of `pairs` and the planned one, and a short context for
    one request; pairs whose cache would be larger than the planned one are left out. Takes a load
    and a prefill for each pair; raises nothing."""
    longest = N_CTX_GPU if chosen.backend is Backend.CUDA else N_CTX_CPU
    launch = replace(chosen, n_ctx=min(longest, chosen.n_ctx), n_parallel=1)
    room = chosen.n_ctx * _cell_bytes(chosen.pair)
    return tuple(
        _probe(model_path, replace(launch, pair=pair), n_threads, argv)
        for pair in dict.fromkeys((*pairs, chosen.pair))
        if launch.n_ctx * _cell_bytes(pair) <= room
    )


def _cell_bytes(pair: CachePair) -> int:
    """Bytes of a K and a V block, to compare pairs by."""
    return pair.k.block_bytes + pair.v.block_bytes


def _probe(model_path: str, launch: Launch, n_threads: int, argv: Sequence[str]) -> KernelSpeed:
    load = structs.replace(load_of(model_path, launch, n_threads), n_seq_max=1)
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter
            argv,
            input=msgspec.json.encode(load),
            env=worker_environment(launch.backend),
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode == 0:
            return KernelSpeed(launch.pair, msgspec.json.decode(done.stdout, type=KernelTime))
    except subprocess.TimeoutExpired:
        return KernelSpeed(launch.pair, error=f"no end after {_TIMEOUT_SECONDS:.0f} s")
    except (OSError, msgspec.DecodeError) as error:
        return KernelSpeed(launch.pair, error=str(error))
    words = done.stderr.decode(errors="replace").strip().splitlines()
    return KernelSpeed(launch.pair, error=words[-1] if words else f"status {done.returncode}")
