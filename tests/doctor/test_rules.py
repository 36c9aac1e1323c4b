"""Each rule: the facts that call for it, and those that do not."""

from dataclasses import replace

import pytest

from kvserve.core.dtypes import LADDER, parse_pair
from kvserve.core.machine import Gpu, Host
from kvserve.core.plan import Request
from kvserve.core.selector import select
from kvserve.device.cgroup import Limits
from kvserve.device.hardware import Processor
from kvserve.doctor.diagnosis import RULES, diagnose
from kvserve.doctor.facts import Driver, Facts, GpuUser, Kernel, Library, Model, Port
from kvserve.doctor.findings import Level
from kvserve.errors import BadModelFile, DoesNotFit, UsageError
from tests.core.shapes import llama3_8b, machine

GIB = 2**30
X86 = frozenset({"pni", "ssse3", "avx", "avx2", "f16c", "fma", "bmi2"})
CPU_INFO = "CPU : SSE3 = 1 | SSSE3 = 1 | AVX = 1 | AVX2 = 1 | F16C = 1 | FMA = 1 | BMI2 = 1 |"
ALL_PAIRS = ",".join(f"{pair.k}-{pair.v}" for pair in LADDER)
CUDA_INFO = f"CUDA : ARCHS = 890 | FA_QUANTS = {ALL_PAIRS} | {CPU_INFO}"
CARD = Gpu(0, "GPU-1", "NVIDIA GeForce RTX 4060", 8 * GIB, 7 * GIB, compute_capability=(8, 9))
PLAN = select(llama3_8b(), machine(7.6), Request(n_ctx=8192))

HEALTHY = Facts(
    python="/venv/bin/python",
    nvcc="/usr/local/cuda/bin/nvcc",
    driver=Driver("580.1", (CARD,)),
    n_cards=1,
    library=Library("0.3.36", CUDA_INFO),
    processor=Processor(X86),
    host=Host(16 * GIB, 12 * GIB, 8),
    n_host_bytes=16 * GIB,
    limits=Limits(),
    port=Port("127.0.0.1", 8000),
    kernel=Kernel(n_open_files=1024),
    model=Model("/m.gguf", plan=replace(PLAN, chosen=replace(PLAN.chosen, exact=True))),
)


def worries(**changed):
    """The findings that are not OK, by check."""
    found = diagnose(replace(HEALTHY, **changed))
    return {finding.check: finding for finding in found if finding.level is not Level.OK}


def test_a_healthy_machine_has_no_findings_but_says_what_was_looked_at():
    found = diagnose(HEALTHY)
    assert {finding.level for finding in found} == {Level.OK}
    assert len(found) >= len(RULES) - 1


def test_everything_that_is_not_well_has_a_reason_and_a_remedy():
    nothing = diagnose(
        replace(
            HEALTHY,
            driver=Driver(None, (), reason="no driver"),
            library=Library("0.3.36", "CPU : AMX_INT8 = 1 | AVX2 = 1 |"),
            host=replace(HEALTHY.host, limited_by_cgroup=True),
            limits=Limits(cpus=1.5),
            port=Port("127.0.0.1", 80, "Permission denied"),
            kernel=Kernel("Function not implemented", 64),
            model=Model("/m.gguf", has_chat_template=False, plan=PLAN),
            state_dir_error="not writable",
            exposure_error="open",
            unknown_variables=("KVSERVE_CTXX is not a setting",),
        )
    )
    bad = [finding for finding in nothing if finding.level is not Level.OK]
    assert len(bad) == 13
    assert all(finding.why and finding.remedy for finding in bad)


def test_a_build_without_cuda_gets_the_command_that_mends_it():
    (found,) = worries(library=Library("0.3.36", CPU_INFO)).values()
    assert (found.check, found.level) == ("cuda", Level.PROBLEM)
    command = found.remedy
    assert command.startswith('CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_CUDA=ON ')
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real" in command
    assert "-DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc" in command
    assert "/venv/bin/python -m pip install --force-reinstall" in command
    assert all(f"{pair.k}-{pair.v}" in command for pair in LADDER)


def test_without_a_compiler_it_says_so_first():
    found = worries(library=Library("0.3.36", CPU_INFO), nvcc=None)["cuda"]
    assert found.remedy.startswith("install the CUDA toolkit")


def test_a_card_without_a_driver():
    found = worries(driver=Driver(None, (), reason="no NVIDIA driver answers"), n_cards=2)
    assert found["driver"].level is Level.PROBLEM
    assert "2 NVIDIA card(s)" in found["driver"].what


def test_no_card_is_no_problem():
    found = worries(
        driver=Driver(None, (), reason="no driver"), n_cards=0, library=Library("1", CPU_INFO)
    )
    assert found == {}


def test_a_hidden_card():
    reason = "CUDA_VISIBLE_DEVICES is empty, which hides all GPUs"
    found = worries(driver=Driver("580.1", (), (CARD,), reason))
    assert found["driver"].level is Level.PROBLEM
    assert found["driver"].remedy == "unset CUDA_VISIBLE_DEVICES"


def test_one_card_of_two_hidden():
    other = replace(CARD, uuid="GPU-2", name="NVIDIA GeForce RTX 3090")
    found = worries(driver=Driver("580.1", (CARD,), (other,)))
    assert (found["driver"].level, "RTX 3090" in found["driver"].what) == (Level.NOTE, True)


def test_pairs_without_a_kernel():
    info = f"CUDA : FA_QUANTS = f16-f16,q8_0-q8_0,q4_0-q4_0 | {CPU_INFO}"
    found = worries(library=Library("0.3.36", info))["kv pairs"]
    assert found.level is Level.PROBLEM
    assert found.what == "no compiled kernel for q8_0:q5_1, q8_0:q4_0, q5_1:q4_0"
    assert "GGML_CUDA_FA_QUANTS" in found.remedy


def test_a_fixed_pair_without_a_kernel():
    pair = parse_pair("q4_1")
    gpu = machine(7.6)
    plan = select(llama3_8b(), gpu, Request(n_ctx=8192, pair=pair))
    found = worries(
        model=Model("/m.gguf", plan=replace(plan, chosen=replace(plan.chosen, exact=True)))
    )
    (found,) = found.values()
    assert (found.check, found.level) == ("kv pairs", Level.PROBLEM)
    assert "q4_1:q4_1: no compiled kernel" in found.what
    assert "q8_0:q4_0" in found.remedy


def test_a_build_that_names_no_pairs_has_the_default_ones():
    found = worries(library=Library("0.3.36", f"CUDA : ARCHS = 890 | {CPU_INFO}"))["kv pairs"]
    assert "q8_0:q4_0" in found.what
    assert "q8_0:q8_0" not in found.what


def test_who_holds_a_cards_memory():
    card = replace(CARD, free_bytes=1 * GIB)
    users = (
        GpuUser("GPU-1", 7, "python", 2 * GIB),
        GpuUser("GPU-1", 9, None, 4 * GIB),
        GpuUser("GPU-1", 3, "Xorg", None),
        GpuUser("GPU-2", 4, "other", 4 * GIB),
    )
    found = worries(driver=Driver("580.1", (card,), users=users))["gpu memory"]
    assert found.what == (
        "NVIDIA GeForce RTX 4060: 1.00 GiB free of 8.00 GiB; held by outside this container "
        "(pid 9) 4.00 GiB, python (pid 7) 2.00 GiB, Xorg (pid 3) an unknown amount"
    )


@pytest.mark.parametrize(
    ("features", "info", "says"),
    [
        (X86 | {"hypervisor", "amx_int8"}, "CPU : AMX_INT8 = 1 |", "built for AMX"),
        (X86, "CPU : AVX512 = 1 | AVX2 = 1 |", "AVX512, which this processor lacks"),
        (X86 | {"amx_int8"}, "CPU : AMX_INT8 = 1 |", None),
        (X86 | {"hypervisor", "amx_int8"}, "CPU : AVX2 = 1 |", None),
        (X86 | {"avx512f", "avx512vbmi"}, "CPU : AVX512 = 1 | AVX512_VBMI = 1 |", None),
        (frozenset(), "CPU : AVX512 = 1 |", None),
        (X86, "CPU : AVX512 = 0 | NEON = 1 |", None),
    ],
)
def test_processors(features, info, says):
    found = worries(
        processor=Processor(features),
        library=Library("0.3.36", info),
        driver=Driver(None, (), reason=""),
        n_cards=0,
    )
    assert list(found) == ([] if says is None else ["processor"])
    if says is not None:
        assert says in found["processor"].what
        assert "-DGGML_NATIVE=OFF" in found["processor"].remedy


def test_a_library_that_cannot_be_loaded_is_told_once():
    found = worries(library=Library(None, error="it died of SIGILL"))
    assert list(found) == ["llama.cpp"]


@pytest.mark.parametrize(
    ("model", "check"),
    [
        (Model("/m", error=BadModelFile("/m: not a GGUF file")), "model"),
        (Model("/m", plan=UsageError("no such pair")), "plan"),
        (
            Model(
                "/m",
                plan=DoesNotFit("2 GiB too big", needed_bytes=9, free_bytes=7, options=("a", "b")),
            ),
            "plan",
        ),
    ],
)
def test_models_that_cannot_be_served(model, check):
    (found,) = worries(model=model).values()
    assert (found.check, found.level) == (check, Level.PROBLEM)
    if isinstance(model.plan, DoesNotFit):
        assert found.remedy == "a; or b"


def test_a_model_without_a_chat_template():
    found = worries(model=replace(HEALTHY.model, has_chat_template=False))
    assert found["model"].level is Level.NOTE


def test_computed_sizes_that_llama_cpp_does_not_confirm():
    chosen = replace(PLAN.chosen, exact=True, formula_bytes=PLAN.chosen.memory.own_bytes * 2)
    plan = replace(PLAN, chosen=chosen, candidates=(chosen,))
    found = worries(model=Model("/m.gguf", plan=plan))["oracle"]
    assert "+100.0 % off" in found.what
    assert "could not be asked" in worries(model=Model("/m.gguf", plan=PLAN))["oracle"].what


@pytest.mark.parametrize(
    ("port", "level", "says"),
    [
        (Port("0.0.0.0", 80, "Permission denied"), Level.PROBLEM, "Permission denied"),
        (Port("127.0.0.1", 8000, "Address already in use", "llama"), Level.NOTE, "serves llama"),
    ],
)
def test_ports(port, level, says):
    found = worries(port=port)["port"]
    assert found.level is level
    assert says in found.what
