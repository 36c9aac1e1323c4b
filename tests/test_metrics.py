"""The series themselves, and the dashboard that names them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.core.lifecycle import Phase
from kvserve.ipc.messages import CarryReport
from kvserve.metrics import Levels, Metrics
from kvserve.supervisor.status import ReloadRecord

LEVELS = Levels(
    ready=True,
    phase="serving",
    n_waiting=3,
    n_running=2,
    n_cells_used=512,
    n_cells=2048,
    plan={"model": "m", "n_ctx": "2048"},
    predicted_bytes={"kv": 100, "device": 300},
    measured_bytes={"kv": 101, "device": None},
)
RECORD = ReloadRecord("grow", 0.0, 2.0, "done", "f16:f16", 4096, "q8_0:q8_0", 8192)


@pytest.fixture
def metrics():
    return Metrics("1.2.3", tuple(Phase))


def samples(metrics, levels=LEVELS):
    """Every sample by name and labels."""
    text = metrics.render(levels).decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_levels(metrics):
    found = samples(metrics)
    assert found["kvserve_ready",] == 1
    assert found["kvserve_num_requests_waiting",] == 3
    assert found["kvserve_num_requests_running",] == 2
    assert found["kvserve_kv_cells_used",] == 512
    assert found["kvserve_kv_cache_usage_ratio",] == 0.25
    assert found["kvserve_phase", ("phase", "serving")] == 1
    assert found["kvserve_phase", ("phase", "loading")] == 0
    assert found["kvserve_memory_predicted_bytes", ("item", "device")] == 300
    assert found["kvserve_memory_measured_bytes", ("item", "kv")] == 101
    assert ("kvserve_memory_measured_bytes", ("item", "device")) not in found
    assert found["kvserve_plan_info", ("model", "m"), ("n_ctx", "2048")] == 1
    assert found["kvserve_build_info", ("version", "1.2.3")] == 1


def test_the_plan_before_is_gone(metrics):
    samples(metrics)
    found = samples(metrics, replace(LEVELS, plan={"n_ctx": "4096"}, measured_bytes={}))
    plans = [key for key in found if key[0] == "kvserve_plan_info"]
    assert plans == [("kvserve_plan_info", ("n_ctx", "4096"))]
    assert not [key for key in found if key[0] == "kvserve_memory_measured_bytes"]


def test_without_a_plan_no_share_is_made_up(metrics):
    assert samples(metrics, replace(LEVELS, n_cells=0))["kvserve_kv_cache_usage_ratio",] == 0


def test_requests_and_tokens(metrics):
    metrics.step(n_prefilled=7, n_generated=2)
    metrics.first_token(0.3)
    metrics.next_tokens(3, 0.3)
    metrics.answered(n_prompt=9, n_cached=2, n_again=4)
    metrics.ended("stop", 1.0)
    metrics.ended("cancelled", 1.0)
    found = samples(metrics)
    assert found["kvserve_prefill_tokens_total",] == 7
    assert found["kvserve_generation_tokens_total",] == 2
    assert found["kvserve_prompt_tokens_total",] == 9
    assert found["kvserve_prefix_cache_hits_total",] == 2
    assert found["kvserve_reprefilled_tokens_total",] == 4
    assert found["kvserve_time_to_first_token_seconds_count",] == 1
    assert found["kvserve_inter_token_latency_seconds_count",] == 3
    assert found["kvserve_inter_token_latency_seconds_bucket", ("le", "0.1")] == 3
    assert found["kvserve_requests_total", ("outcome", "stop")] == 1
    assert found["kvserve_requests_total", ("outcome", "cancelled")] == 1
    assert found["kvserve_e2e_request_latency_seconds_count",] == 2


def test_reloads_phases_and_deaths(metrics):
    metrics.reloaded(replace(RECORD, carry=CarryReport(n_sequences=1, n_tokens=40)))
    metrics.reloaded(replace(RECORD, outcome="failed"))
    for phase in Phase:
        metrics.phase_left(phase, 0.5)
    metrics.worker_died("SIGKILL (killed, perhaps for lack of memory)")
    metrics.worker_died("exit status 1")
    found = samples(metrics)
    assert found["kvserve_reloads_total", ("outcome", "done"), ("reason", "grow")] == 1
    assert found["kvserve_reloads_total", ("outcome", "failed"), ("reason", "grow")] == 1
    assert found["kvserve_reload_duration_seconds_sum", ("reason", "grow")] == 4
    assert found["kvserve_carried_tokens_total",] == 40
    assert found["kvserve_reload_phase_duration_seconds_sum", ("phase", "loading")] == 0.5
    assert ("kvserve_reload_phase_duration_seconds_sum", ("phase", "serving")) not in found
    assert found["kvserve_worker_restarts_total", ("cause", "SIGKILL")] == 1
    assert found["kvserve_worker_restarts_total", ("cause", "exit status 1")] == 1


def test_two_daemons_in_one_process_do_not_share(metrics):
    metrics.ended("stop", 1.0)
    other = samples(Metrics("1", ()))
    assert not [key for key in other if key[0] == "kvserve_requests_total"]


def test_the_dashboard_names_every_metric_and_no_other():
    metrics = Metrics("1", tuple(Phase))
    metrics.ended("stop", 1.0)
    metrics.reloaded(RECORD)
    metrics.phase_left(Phase.LOADING, 1.0)
    metrics.worker_died("exit status 1")
    there = {key[0] for key in samples(metrics) if not key[0].endswith("_created")}
    board = json.loads((Path(__file__).parent.parent / "configs/grafana.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = set(re.findall(r"kvserve_\w+", " ".join(expressions)))
    assert named <= there
    part = re.compile(r"_(bucket|sum|count)$")
    assert {part.sub("", name) for name in there} == {part.sub("", name) for name in named}
