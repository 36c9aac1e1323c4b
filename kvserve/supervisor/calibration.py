"""What a worker costs on a GPU beside llama.cpp's buffers, learnt from loads and kept on disk."""

import contextlib
import json
from pathlib import Path

from kvserve.core.machine import Build, Gpu
from kvserve.core.memory import Overheads, prior_overheads
from kvserve.core.shape import ModelShape
from kvserve.units import GIB, MIB
from kvserve.whole_file import replace_file

GROWTH_BYTES = 8 * MIB
"""What a worker may still add after its load."""

_PLAUSIBLE_BYTES = range(64 * MIB, 3 * GIB)


class Calibration:
    """Overheads by GPU, build and architecture: models with experts take more than others. A file
    that is missing, old or broken is as good as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def overheads(self, gpus: tuple[Gpu, ...], build: Build, shape: ModelShape) -> Overheads:
        """The measured overhead of the first GPU, or the prior for its kind."""
        if not gpus:
            return prior_overheads(None, shape)
        prior = prior_overheads(gpus[0].compute_capability, shape)
        learnt = self._read().get(_key(gpus[0], build, shape))
        if isinstance(learnt, int) and learnt in _PLAUSIBLE_BYTES:
            return Overheads(gpu_bytes=learnt, host_bytes=prior.host_bytes)
        return prior

    def learn(self, gpu: Gpu, build: Build, shape: ModelShape, gpu_bytes: int) -> bool:
        """Keep a measurement. Returns False for one that cannot be true, such as a reading that
        another process's memory is in."""
        if gpu_bytes not in _PLAUSIBLE_BYTES:
            return False
        known = self._read()
        known[_key(gpu, build, shape)] = gpu_bytes + GROWTH_BYTES
        with contextlib.suppress(OSError):
            replace_file(self._path, json.dumps(known, indent=1).encode())
        return True

    def _read(self) -> dict[str, object]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._path.read_text())
            if isinstance(known, dict):
                return known
        return {}


def _key(gpu: Gpu, build: Build, shape: ModelShape) -> str:
    return f"{gpu.uuid} {build.version} {shape.architecture}"
