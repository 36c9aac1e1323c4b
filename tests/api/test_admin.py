"""Health, status, plans and changes of context, and their documents."""

import json
from dataclasses import replace

import pytest

from kvserve.api.plan_documents import plan_document
from kvserve.core.lifecycle import Phase
from kvserve.core.plan import Request, Task
from kvserve.core.selector import select
from kvserve.errors import ReloadInProgress, UsageError, WorkerFailed
from tests.api.scripted import NOW, PLAN, SERVING, ScriptedService, ask
from tests.core.shapes import llama3_8b, machine

CONTRACT = {
    "cache_type_k",
    "cache_type_v",
    "n_ctx",
    "n_gpu_layers",
    "n_cpu_moe",
    "flash_attn",
    "memory",
    "free_bytes",
    "headroom_bytes",
    "predicted_tps",
    "fits",
    "reason",
    "max_ctx",
    "exact",
    "formula_bytes",
    "formula_error",
}
MEMORY = {
    "weights_bytes",
    "kv_bytes",
    "recurrent_bytes",
    "compute_bytes",
    "output_bytes",
    "runtime_bytes",
    "draft_bytes",
    "total_bytes",
}


def test_the_plan_document_keeps_its_contract():
    document = json.loads(json.dumps(plan_document(PLAN), allow_nan=False))
    assert set(document) == {
        "model",
        "machine",
        "request",
        "chosen",
        "candidates",
        "confirmed",
    }
    assert {"n_ctx", "parallel", "task"} <= set(document["request"])
    assert len(document["candidates"]) == len(PLAN.candidates) > 1
    for candidate in [document["chosen"], *document["candidates"]]:
        assert set(candidate) >= CONTRACT
        assert set(candidate["memory"]) == MEMORY
        parts = [size for item, size in candidate["memory"].items() if item != "total_bytes"]
        assert sum(parts) == candidate["memory"]["total_bytes"]
    assert document["chosen"]["cache_type_k"] == str(PLAN.chosen.launch.pair.k)
    assert document["machine"]["gpus"][0]["compute_capability"] == "8.9"
    assert "q8_0:q4_0" in document["machine"]["build"]["kv_pairs"]


def test_the_plan_document_of_a_machine_without_a_gpu():
    plan = select(llama3_8b(), machine(None), Request(n_ctx=8192, task=Task.CODE))
    document = json.loads(json.dumps(plan_document(plan), allow_nan=False))
    assert document["machine"]["gpus"] == []
    assert document["request"]["task"] == "code"
    assert document["chosen"]["device"] == "cpu"


def test_unknown_values_are_null():
    bare = replace(
        PLAN,
        machine=replace(
            PLAN.machine,
            gpus=tuple(
                replace(g, compute_capability=None, bandwidth=None) for g in PLAN.machine.gpus
            ),
            build=replace(PLAN.machine.build, kv_pairs=None),
        ),
    )
    document = plan_document(bare)
    assert document["machine"]["gpus"][0]["compute_capability"] is None
    assert document["machine"]["build"]["kv_pairs"] is None
    assert document["request"]["cache_type"] is None


def test_status():
    document = ask("GET", "/admin/status").json()
    assert document["phase"] == "serving"
    assert document["ready"] is True
    assert document["model_id"] == "llama-3-8b"
    assert document["uptime_seconds"] == 100
    assert document["chat_template"] == "model file"
    assert document["requests"] == {"waiting": 1, "running": 2, "answered": 3, "failed": 4}
    assert document["plan"] == plan_document(PLAN)
    assert document["reloads"] == [
        {
            "reason": "start",
            "started_at": NOW - 60,
            "seconds": 4.5,
            "outcome": "done",
            "from_cache_type": None,
            "from_n_ctx": None,
            "to_cache_type": "q8_0:q8_0",
            "to_n_ctx": 32768,
            "detail": None,
            "carry": None,
            "overlapped": False,
            "pause_seconds": None,
        }
    ]


def test_memory_predicted_beside_measured():
    memory = ask("GET", "/admin/status").json()["memory"]
    chosen = PLAN.chosen
    assert memory["kv_bytes"] == {
        "predicted": chosen.memory.kv_bytes + chosen.host_memory.kv_bytes,
        "measured": 2_281_701_376,
    }
    assert memory["device_bytes"] == {
        "predicted": chosen.memory.total_bytes,
        "measured": 7_400_000_000,
    }


def test_the_host_is_counted_once_without_a_gpu():
    service = ScriptedService()
    plan = select(llama3_8b(), machine(None), Request(n_ctx=8192))
    service.now = replace(SERVING, plan=plan, measured=None)
    memory = ask("GET", "/admin/status", service=service).json()["memory"]
    assert memory["kv_bytes"] == {"predicted": plan.chosen.memory.kv_bytes, "measured": None}


def test_status_before_the_first_plan():
    service = ScriptedService()
    service.now = replace(SERVING, phase=Phase.IDLE, plan=None, measured=None, reloads=())
    document = ask("GET", "/admin/status", service=service).json()
    assert (document["plan"], document["memory"], document["reloads"]) == (None, None, [])


@pytest.mark.parametrize(
    ("query", "asked"), [("", None), ("?ctx=max", None), ("?ctx=8192", 8192), ("?ctx=1", 1)]
)
def test_plan(query, asked):
    service = ScriptedService()
    assert ask("GET", f"/admin/plan{query}", service=service).json() == plan_document(PLAN)
    assert service.asked == [asked]


@pytest.mark.parametrize("ctx", ["0", "-1", "1.5", "", "8k", "MAX", "²", "2147483648", "9" * 5000])
def test_plans_for_no_context(ctx):
    response = ask("GET", "/admin/plan", params={"ctx": ctx})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "ctx"


@pytest.mark.parametrize(("n_ctx", "asked"), [("max", None), (8192, 8192)])
def test_change_of_context(n_ctx, asked):
    service = ScriptedService()
    response = ask("POST", "/admin/context", service=service, json={"n_ctx": n_ctx})
    assert response.json() == {"changed": True, "seconds": 1.5, "plan": plan_document(PLAN)}
    assert service.asked == [asked]


@pytest.mark.parametrize("n_ctx", [0, -1, "8192", 1.5, True, None, 2**31, [], "maximum"])
def test_changes_to_no_context(n_ctx):
    response = ask("POST", "/admin/context", json={"n_ctx": n_ctx})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "n_ctx"


def test_a_misspelled_change_is_refused():
    response = ask("POST", "/admin/context", json={"n_ctx": 8192, "parallell": 2})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "parallell")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ReloadInProgress("another one runs", retry_after=3), 409),
        (UsageError("the model's context ends at 8192"), 400),
        (WorkerFailed("the new worker died; the old plan serves again"), 503),
    ],
)
def test_changes_that_fail(error, status):
    def fail(_n_ctx):
        raise error

    service = ScriptedService()
    service.on_plan = fail
    response = ask("POST", "/admin/context", service=service, json={"n_ctx": 8192})
    assert response.status_code == status
    assert response.json()["error"]["message"] == error.message


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_ready(path):
    assert ask("GET", path).json() == {"status": "ok", "phase": "serving"}


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_not_ready(path, phase):
    service = ScriptedService()
    service.ready = False
    service.now = replace(SERVING, phase=phase, load_fraction=0.25, plan=None)
    response = ask("GET", path, service=service)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    error = response.json()["error"]
    assert (error["code"], error["phase"], error["load_fraction"]) == ("not_ready", phase, 0.25)
    assert ("25%" in error["message"]) is (phase is Phase.LOADING)
    assert ask("GET", "/health/live", service=service).json() == {"status": "ok"}


@pytest.mark.parametrize(("retry_at", "header"), [(NOW + 12.3, "13"), (NOW - 5, "1")])
def test_when_to_ask_again_after_a_failure(retry_at, header):
    service = ScriptedService()
    service.ready = False
    service.now = replace(SERVING, phase=Phase.FAILED, error="out of memory", retry_at=retry_at)
    response = ask("GET", "/health/ready", service=service)
    assert response.headers["retry-after"] == header
    assert "out of memory" in response.json()["error"]["message"]
