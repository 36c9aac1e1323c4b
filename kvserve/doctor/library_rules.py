"""The installed llama.cpp and this processor: can it be loaded, and will it trap?"""

from collections.abc import Iterator

from kvserve.doctor.facts import Facts
from kvserve.doctor.findings import Finding, ok, problem
from kvserve.doctor.mending import rebuild_as_before

_FEATURES = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVX_VNNI": "avx_vnni",
    "BMI2": "bmi2",
    "F16C": "f16c",
    "FMA": "fma",
    "AVX512": "avx512f",
    "AVX512_VBMI": "avx512vbmi",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}
"""llama.cpp's names of x86 features (ggml-cpu.cpp), and the kernel's."""


def library(facts: Facts) -> Iterator[Finding]:
    """Whether it can be loaded, and its own words about itself."""
    found = facts.library
    if found.error is not None:
        yield problem(
            "llama.cpp",
            found.error,
            "no model can be loaded",
            rebuild_as_before(facts),
        )
        return
    yield ok("llama.cpp", f"llama-cpp-python {found.version}: {found.system_info}")


def processor(facts: Facts) -> Iterator[Finding]:
    """Features that the build uses and the processor lacks, or has in name only."""
    if facts.library.error is not None or not facts.processor.features:
        return
    used = _compiled(facts.library.system_info)
    there = facts.processor.features
    missing = sorted(name for name in used if _FEATURES[name] not in there)
    if missing:
        yield problem(
            "processor",
            f"llama.cpp was built for {', '.join(missing)}, which this processor lacks",
            "it dies of SIGILL at the first such instruction",
            rebuild_as_before(facts),
        )
    elif "AMX_INT8" in used and facts.processor.virtual:
        yield problem(
            "processor",
            "llama.cpp was built for AMX, on a virtual machine",
            "some hypervisors announce AMX and trap it: the worker dies of SIGILL or SIGSEGV at "
            "the first matrix product, and kvserve loads again without repacked weights, slower",
            rebuild_as_before(facts),
        )
    elif used:
        yield ok("processor", f"has what llama.cpp was built for: {', '.join(sorted(used))}")


def _compiled(system_info: str) -> set[str]:
    """The x86 features of the CPU part: `CPU : SSE3 = 1 | AVX = 1 | …`."""
    _, found, rest = system_info.partition("CPU :")
    fields = (item.partition("=") for item in rest.split("|")) if found else ()
    return {
        name.strip()
        for name, _, value in fields
        if value.strip() == "1" and name.strip() in _FEATURES
    }
