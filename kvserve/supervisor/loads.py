"""What a process that loads a model is given: its message and its environment."""

import os

from kvserve.core.machine import Backend
from kvserve.core.plan import Launch
from kvserve.ipc.messages import Load

_OPENMP_WAITS = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
_SPIN_COUNT = "60000"
"""A fifth of libgomp's own, and as quick (docs/performance.md)."""


def load_of(model_path: str, launch: Launch, n_threads: int) -> Load:
    """The message that has a process load a model as `launch` says."""
    return Load(
        model_path=model_path,
        type_k=launch.pair.k,
        type_v=launch.pair.v,
        n_ctx=launch.n_ctx,
        n_seq_max=launch.n_parallel,
        n_batch=launch.n_batch,
        n_ubatch=launch.n_ubatch,
        n_gpu_layers=launch.n_gpu_layers,
        n_cpu_moe=launch.n_cpu_moe,
        flash_attn=launch.flash_attn,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        tensor_split=launch.tensor_split,
        n_draft=launch.n_draft,
    )


def worker_environment(backend: Backend) -> dict[str, str]:
    """The daemon's environment, with CUDA's device order made NVML's, and without GPUs for a
    worker that uses none: a visible GPU costs a CUDA context before any load.

    OpenMP's threads on a CPU wait for each other busily for a shorter time, unless the daemon's own
    environment says how they should. While a reload's two workers share the cores, each would wait
    out its turn for threads of the other: then they wait briefly (`ShareCores`).
    """
    environment = dict(os.environ)
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    if backend is Backend.CPU:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        if not _OPENMP_WAITS & environment.keys():
            environment["GOMP_SPINCOUNT"] = _SPIN_COUNT
    return environment
