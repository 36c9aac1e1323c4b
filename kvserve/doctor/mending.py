"""The commands that mend a llama-cpp-python: exact, for this interpreter and these cards."""

from kvserve.core.dtypes import LADDER
from kvserve.doctor.facts import Facts

_WANTED = "llama-cpp-python>=0.3.36,<0.3.37"
_FA_QUANTS = ",".join(dict.fromkeys(["f16-f16", "bf16-bf16"] + [f"{p.k}-{p.v}" for p in LADDER]))


def rebuild_with_cuda(facts: Facts) -> str:
    """Build it for the cards that are here, with kernels for every pair that may be chosen."""
    gpus = facts.driver.gpus or facts.driver.hidden
    numbers = sorted({gpu.compute_capability for gpu in gpus if gpu.compute_capability})
    archs = ";".join(f"{major}{minor}-real" for major, minor in numbers)
    flags = f"-DGGML_NATIVE=OFF -DGGML_CUDA=ON -DGGML_CUDA_FA_QUANTS={_FA_QUANTS}"
    if archs:
        flags += f" -DCMAKE_CUDA_ARCHITECTURES={archs}"
    if facts.nvcc is None:
        return f"install the CUDA toolkit (nvcc is not here), then {_command(facts, flags)}"
    return _command(facts, f"{flags} -DCMAKE_CUDA_COMPILER={facts.nvcc}")


def rebuild_for_cpu(facts: Facts) -> str:
    """Build it for any x86-64 with AVX2, not for the features this processor announces."""
    return _command(facts, "-DGGML_NATIVE=OFF")


def rebuild_as_before(facts: Facts) -> str:
    """Build it again with CUDA where that was there or belongs there."""
    on_gpu = facts.library.cuda or facts.driver.gpus
    return rebuild_with_cuda(facts) if on_gpu else rebuild_for_cpu(facts)


def _command(facts: Facts, flags: str) -> str:
    return (
        f'CMAKE_ARGS="{flags}" {facts.python} -m pip install --force-reinstall --no-deps '
        f'--no-cache-dir --no-binary llama-cpp-python "{_WANTED}"'
    )
