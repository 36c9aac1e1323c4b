"""Timed pairs: the process that times one, who runs it for each, and what is made of the times."""

import sys
from dataclasses import replace

import pytest

from kvserve.core.dtypes import LADDER, parse_pair
from kvserve.core.machine import Backend
from kvserve.doctor.facts import KernelSpeed, Model
from kvserve.doctor.findings import Level
from kvserve.doctor.kernel_probe import N_CTX_CPU, N_CTX_GPU, probe_kernels
from kvserve.doctor.kernel_rules import kernels
from kvserve.ipc.measuring import KernelTime
from tests.doctor.test_rules import HEALTHY, PLAN
from tests.models import write_model

GPU_LAUNCH = replace(PLAN.chosen.launch, n_ctx=32768)
CPU_LAUNCH = replace(GPU_LAUNCH, backend=Backend.CPU, n_gpu_layers=0)
ECHO = "import json,sys; l=json.load(sys.stdin); "


def speed(pair, shallow, deep):
    return KernelSpeed(pair, KernelTime(8168, shallow / 1e3, deep / 1e3))


def told(*speeds, launch=GPU_LAUNCH):
    plan = replace(PLAN, chosen=replace(PLAN.chosen, launch=launch))
    return list(kernels(replace(HEALTHY, kernels=speeds, model=Model("/m", plan=plan))))


# Milliseconds of an 8B shape on an H100: f16, q8_0 and q8_0:q4_0 with kernels, and one without.
F16, Q8, Q8_Q4 = (3.83, 4.50), (4.24, 5.21), (4.13, 5.15)
CONVERTED = (4.24, 6.21)


def test_pairs_with_kernels_are_well():
    found = told(speed(LADDER[0], *F16), speed(LADDER[1], *Q8), speed(LADDER[3], *Q8_Q4))
    assert [finding.level for finding in found] == [Level.OK]
    assert "after 8168 tokens: f16:f16 3.8 and 4.5 ms, q8_0:q8_0 4.2 and 5.2 ms" in found[0].what


def test_a_pair_that_is_converted_at_each_step_is_found():
    (found,) = told(speed(LADDER[0], *F16), speed(LADDER[1], *Q8), speed(LADDER[3], *CONVERTED))
    assert found.level is Level.PROBLEM
    assert found.why.startswith("q8_0:q4_0 cost so much more")
    assert "-DGGML_CUDA_FA_QUANTS=" in found.remedy


def test_nothing_follows_from_a_slow_pair_on_the_cpu():
    (found,) = told(speed(LADDER[0], 4, 5), speed(LADDER[3], 4, 12), launch=CPU_LAUNCH)
    assert found.level is Level.OK


def test_nothing_follows_from_times_that_do_not_grow():
    (found,) = told(speed(LADDER[0], 4.0, 3.9), speed(LADDER[3], 4.0, 4.2))
    assert found.level is Level.OK


def test_a_pair_that_fails_is_told_of():
    failed, rest = told(KernelSpeed(LADDER[1], error="out of memory"), speed(LADDER[0], *F16))
    assert (failed.level, failed.what) == (Level.PROBLEM, "q8_0:q8_0: out of memory")
    assert rest.level is Level.OK
    assert told() == []


def test_pairs_larger_than_the_plan_are_left_out():
    answer = ECHO + "print(json.dumps({'depth': 1, 'shallow_seconds': 1, 'deep_seconds': 2}))"
    launch = replace(GPU_LAUNCH, n_ctx=8192, pair=LADDER[2])
    speeds = probe_kernels("/m.gguf", launch, 2, (sys.executable, "-c", answer))
    assert [found.pair for found in speeds] == list(LADDER[2:])


def test_the_planned_pair_is_tried_too():
    answer = ECHO + "print(json.dumps({'depth': 1, 'shallow_seconds': 1, 'deep_seconds': 2}))"
    launch = replace(GPU_LAUNCH, pair=parse_pair("q5_0"))
    speeds = probe_kernels("/m.gguf", launch, 2, (sys.executable, "-c", answer))
    assert [found.pair for found in speeds] == [*LADDER, launch.pair]


@pytest.mark.parametrize(("launch", "n_ctx"), [(CPU_LAUNCH, N_CTX_CPU), (GPU_LAUNCH, N_CTX_GPU)])
def test_each_pair_is_asked_for_as_planned(launch, n_ctx):
    program = ECHO + (
        f"assert l['n_gpu_layers'] == {launch.n_gpu_layers} and l['n_seq_max'] == 1, l;"
        "print(json.dumps({'depth': l['n_ctx'], 'shallow_seconds': 1, 'deep_seconds': 2}))"
    )
    speeds = probe_kernels("/m.gguf", launch, 2, (sys.executable, "-c", program))
    assert [found.pair for found in speeds] == list(LADDER)
    assert {found.time for found in speeds} == {KernelTime(n_ctx, 1, 2)}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("sys.exit('first\\nout of memory')", "out of memory"),
        ("sys.exit(3)", "status 3"),
        ("print('nonsense')", "JSON"),
    ],
)
def test_a_process_that_fails_is_an_answer(program, says):
    speeds = probe_kernels("/m.gguf", CPU_LAUNCH, 2, (sys.executable, "-c", ECHO + program))
    assert len(speeds) == len(LADDER)
    assert says in speeds[0].error


def test_a_real_model_is_timed_with_every_pair(tmp_path):
    path = write_model(tmp_path / "m.gguf", n_layer=2, n_embd=256, n_head=4, n_head_kv=2)
    launch = replace(CPU_LAUNCH, n_ctx=256, n_batch=64, n_ubatch=64)
    speeds = probe_kernels(str(path), launch, 1, pairs=LADDER[::5])
    assert [str(found.pair) for found in speeds] == ["f16:f16", "q4_0:q4_0"]
    for found in speeds:
        assert found.error is None, found.error
        assert found.time.depth == 256 - 24
        assert 0 < found.time.shallow_seconds < 10
        assert 0 < found.time.deep_seconds < 10


def test_a_file_that_is_no_model_is_one_line(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    found = probe_kernels(str(tmp_path / "m.gguf"), CPU_LAUNCH, 1, pairs=LADDER[:1])[0]
    assert found.time is None
    assert "\n" not in found.error
