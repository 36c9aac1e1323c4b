"""Asking llama.cpp before a launch: the loop, the process that answers, and what is remembered."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from kvserve.cli.tables import plan_text
from kvserve.core.findings import Findings
from kvserve.core.machine import Backend
from kvserve.core.memory import HOPPER_OVERHEADS, estimate
from kvserve.core.plan import Estimate, Launch, Memory, Plan, Request
from kvserve.core.selector import select
from kvserve.supervisor.calibration import Calibration
from kvserve.supervisor.confirming import MOST_ROUNDS, Oracle, confirm
from kvserve.supervisor.deciding import Decider, Machines
from kvserve.supervisor.measurements import MOST_LAUNCHES, MOST_MODELS, Measurements
from kvserve.supervisor.planning import MachinePlanner
from kvserve.units import GIB
from tests.core.shapes import llama3_8b, machine

REQUEST = Request(n_ctx=32768)
LAUNCH = select(llama3_8b(), machine(7.6), REQUEST).chosen.launch
OTHER = replace(LAUNCH, n_ctx=8192)
CPU = replace(LAUNCH, backend=Backend.CPU, n_gpu_layers=0)
BILL = Estimate(gpu=Memory(0, 1, 2, 3, 4), host=Memory(0, 5, 6, 7, 8))


class Said:
    """Answers with the formula's figures plus what the test adds to the compute buffer."""

    def __init__(self, more_bytes: Callable[[Launch], int | None]) -> None:
        self.findings = Findings()
        self.asked: list[tuple[Launch, ...]] = []
        self._more_bytes = more_bytes

    def ask(self, launches: Sequence[Launch]) -> None:
        self.asked.append(tuple(launches))
        exact = {}
        for launch in launches:
            more = self._more_bytes(launch)
            if more is not None:
                bill = estimate(llama3_8b(), launch, HOPPER_OVERHEADS, 1)
                gpu = replace(bill.gpu, compute_bytes=bill.gpu.compute_bytes + more)
                exact[launch] = replace(bill, gpu=gpu)
        self.findings = self.findings.joined(Findings(exact))


def decide(findings: Findings) -> Plan:
    return select(llama3_8b(), machine(7.6), REQUEST, findings=findings)


def test_a_plan_that_llama_cpp_agrees_with_takes_one_question() -> None:
    oracle = Said(lambda _: 0)
    plan = confirm(decide(Findings()), oracle, decide)
    assert plan.confirmed
    assert oracle.asked == [(LAUNCH,)]


def test_a_launch_that_is_bigger_than_computed_makes_place_for_the_next() -> None:
    oracle = Said(lambda launch: 2 * GIB if launch.pair == LAUNCH.pair else 0)
    plan = confirm(decide(Findings()), oracle, decide)
    assert plan.confirmed
    assert plan.chosen.launch.pair != LAUNCH.pair
    assert [c.launch for c in plan.differences] == [LAUNCH]
    [told] = [line for line in plan_text(plan).splitlines() if line.startswith("note")]
    assert told == (
        "note     q8_0:q8_0: cache and buffers take 4.31 GiB, as llama.cpp says, not the 2.31 GiB "
        "that were computed; the table has its figures"
    )


def test_without_answers_the_formulas_stand() -> None:
    oracle = Said(lambda _: None)
    plan = confirm(decide(Findings()), oracle, decide)
    assert not plan.confirmed
    assert plan.chosen.launch == LAUNCH
    assert len(oracle.asked) == 1


def test_the_rounds_are_bounded() -> None:
    flips = iter(range(100))

    def unsteady(_: Findings) -> Plan:
        box = machine(7.6)
        return select(llama3_8b(), box, replace(REQUEST, n_ctx=2048 + 256 * next(flips)))

    oracle = Said(lambda _: 0)
    confirm(decide(Findings()), oracle, unsteady)
    assert len(oracle.asked) == MOST_ROUNDS


def test_what_may_come_next_is_asked_in_the_first_round() -> None:
    oracle = Said(lambda _: 0)
    confirm(decide(Findings()), oracle, decide, ahead=(OTHER,))
    assert oracle.asked == [(LAUNCH, OTHER)]


def decider(tmp_path: Path, oracle: Said, vram_gib: float) -> Decider:
    box = machine(vram_gib)
    machines = Machines(
        box.build, read_gpus=lambda: box.gpus, read_host=lambda: box.host,
        gpu_process_memory=lambda _uuid, _pid: None, host_process_memory=lambda _pid: None,
    )  # fmt: skip
    calibration = Calibration(tmp_path / "calibration.json")
    return Decider(llama3_8b(), REQUEST, machines, calibration, oracle=oracle)


def planner(tmp_path: Path, oracle: Said, vram_gib: float) -> MachinePlanner:
    return MachinePlanner(decider(tmp_path, oracle, vram_gib))


def test_the_planner_confirms_what_it_decides(tmp_path: Path) -> None:
    oracle = Said(lambda _: 0)
    plan = asyncio.run(planner(tmp_path, oracle, 7.6).plan(32768))
    assert plan.confirmed
    assert oracle.asked


def test_beside_a_full_gpu_nothing_is_asked_and_what_is_known_counts(tmp_path: Path) -> None:
    oracle = Said(lambda _: 0)
    full = planner(tmp_path, oracle, 0.5)
    plan = asyncio.run(full.plan(32768, returning_bytes=7 * GIB))
    assert not plan.confirmed
    assert not oracle.asked
    oracle.ask([plan.chosen.launch])
    assert asyncio.run(full.plan(32768, returning_bytes=7 * GIB)).confirmed


def oracle_that(tmp_path: Path, program: str, timeout: float = 30.0) -> Oracle:
    """An oracle whose process is `program`, with the request in `request`."""
    head = "import json, sys, time\nrequest = json.load(sys.stdin)\n"
    argv = (sys.executable, "-c", head + program)
    return Oracle("/m.gguf", Measurements(tmp_path / "m.json", "id", "mark"), argv, timeout)


ANSWER = """
for index, load in enumerate(request["launches"]):
    devices = [{"device": "CPU", "output_bytes": 1, "kv_bytes": 2},
               {"device": "CUDA_Host", "compute_bytes": 4},
               {"device": "CUDA0", "kv_bytes": load["n_ctx"], "compute_bytes": 7},
               {"device": "CUDA1", "kv_bytes": 1}]
    print(json.dumps({"type": "measured", "index": index, "buffers": devices}), flush=True)
"""


def test_devices_are_summed_as_the_plan_sees_them(tmp_path: Path) -> None:
    oracle = oracle_that(tmp_path, ANSWER)
    oracle.ask([LAUNCH, OTHER])
    assert oracle.findings.exact[LAUNCH] == Estimate(
        gpu=Memory(kv_bytes=32769, compute_bytes=7),
        host=Memory(kv_bytes=2, compute_bytes=4, output_bytes=1),
    )
    assert oracle.findings.exact[OTHER].gpu.kv_bytes == 8193


def test_several_gpus_are_told_apart(tmp_path: Path) -> None:
    launch = replace(LAUNCH, tensor_split=(17.0, 16.0))
    oracle = oracle_that(tmp_path, ANSWER)
    oracle.ask([launch])
    each = oracle.findings.exact[launch].each
    assert each == (Memory(kv_bytes=32768, compute_bytes=7), Memory(kv_bytes=1))
    assert oracle_that(tmp_path, "sys.exit(9)").findings.exact[launch].each == each


def test_answers_are_kept_for_the_next_daemon_and_not_asked_again(tmp_path: Path) -> None:
    oracle_that(tmp_path, ANSWER).ask([LAUNCH])
    again = oracle_that(tmp_path, "sys.exit(9)")
    assert LAUNCH in again.findings.exact
    again.ask([LAUNCH])
    assert LAUNCH in again.findings.exact


def test_a_refusal_is_an_answer(tmp_path: Path) -> None:
    refuse = """print(json.dumps({"type": "refused", "index": 0, "reason": "no"}))"""
    oracle = oracle_that(tmp_path, refuse)
    oracle.ask([LAUNCH])
    assert oracle.findings.refused == {LAUNCH: "no"}
    assert oracle_that(tmp_path, "").findings.refused == {LAUNCH: "no"}


@pytest.mark.parametrize(
    "program",
    ["sys.exit(3)", "print('nonsense')", "import os; os.abort()",
     """print(json.dumps({"type": "measured", "index": 7, "buffers": []}))"""],
)  # fmt: skip
def test_whatever_goes_wrong_leaves_the_launch_unknown(tmp_path: Path, program: str) -> None:
    oracle = oracle_that(tmp_path, program)
    oracle.ask([LAUNCH])
    assert not oracle.findings.knows(LAUNCH)


def test_a_process_that_hangs_is_ended_and_its_answers_count(tmp_path: Path) -> None:
    hang = """
print(json.dumps({"type": "measured", "index": 0, "buffers": []}), flush=True)
time.sleep(60)
"""
    oracle = oracle_that(tmp_path, hang, timeout=2.0)
    oracle.ask([LAUNCH, OTHER])
    assert oracle.findings.knows(LAUNCH)
    assert not oracle.findings.knows(OTHER)


def test_a_program_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    measurements = Measurements(tmp_path / "m.json", "id", "mark")
    oracle = Oracle("/m.gguf", measurements, argv=("/no/such/program",))
    oracle.ask([LAUNCH])
    assert not oracle.findings.knows(LAUNCH)


def test_launches_of_one_device_share_a_process(tmp_path: Path) -> None:
    count = """
import os
print(json.dumps({"type": "refused", "index": 0, "reason": repr(os.environ.get(
    "CUDA_VISIBLE_DEVICES")) + str(len(request["launches"]))}))
"""
    oracle = oracle_that(tmp_path, count)
    oracle.ask([CPU])
    assert oracle.findings.refused[CPU] == "''1"


def test_measurements_of_another_build_or_model_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    Measurements(path, "id", "mark").write(Findings({LAUNCH: BILL}))
    assert Measurements(path, "id", "mark").read().exact == {LAUNCH: BILL}
    assert not Measurements(path, "id", "other").read().exact
    assert not Measurements(path, "other", "mark").read().exact


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id mark": [{"launch": 3}]}', "\x00"])
def test_a_broken_file_is_an_empty_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "m.json"
    path.write_text(text)
    measurements = Measurements(path, "id", "mark")
    assert measurements.read() == Findings()
    measurements.write(Findings({LAUNCH: BILL}))
    assert measurements.read().exact == {LAUNCH: BILL}


def test_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    many = {replace(LAUNCH, n_ctx=256 * n): BILL for n in range(1, MOST_LAUNCHES + 10)}
    Measurements(path, "full", "mark").write(Findings(many))
    assert len(Measurements(path, "full", "mark").read().exact) == MOST_LAUNCHES
    for n in range(MOST_MODELS):
        Measurements(path, f"model {n}", "mark").write(Findings({LAUNCH: BILL}))
    assert not Measurements(path, "full", "mark").read().exact
    assert Measurements(path, "model 0", "mark").read().exact


def test_a_difference_is_logged_by_the_daemon_alone_and_once(tmp_path: Path) -> None:
    made = decider(tmp_path, Said(lambda _: 2 * GIB), 24)
    with capture_logs() as told:
        assert made.decide_confirmed(made.machines.read(), 32768, 0, 0).differences
        assert told == []
        reloading = MachinePlanner(made)
        for _ in range(2):
            asyncio.run(reloading.plan(32768))
    assert [(one["log_level"], one["cache_type"]) for one in told] == [("warning", "f16:f16")]
