"""`/metrics` over HTTP, and what the supervisor tells the counters."""

from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kvserve.core.lifecycle import Phase
from kvserve.metrics import CONTENT_TYPE, Metrics
from tests.api.scripted import CONFIG, SERVING, ScriptedService, ask, live_server


def test_what_a_scrape_says_of_the_status():
    service = ScriptedService()
    with live_server(service, metrics=Metrics("1", tuple(Phase))) as live:
        response = httpx.get(f"{live.url}/metrics")
        service.now = replace(SERVING, plan=None, measured=None, phase=Phase.LOADING)
        service.ready = False
        later = httpx.get(f"{live.url}/metrics").text
    assert response.headers["content-type"] == CONTENT_TYPE
    found = {
        (sample.name, sample.labels.get("item")): sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }
    plan = found["kvserve_plan_info", None].labels
    assert (plan["model"], plan["cache_type_k"], plan["n_ctx"]) == ("llama-3-8b", "q8_0", "32768")
    assert found["kvserve_num_requests_waiting", None].value == 1
    assert found["kvserve_kv_cells", None].value == 32768
    assert found["kvserve_memory_measured_bytes", "kv"].value == 2_281_701_376
    assert found["kvserve_memory_predicted_bytes", "device"].value > 7e9
    assert "kvserve_ready 0.0" in later
    assert 'kvserve_phase{phase="loading"} 1.0' in later
    assert "kvserve_memory_measured_bytes{" not in later


@pytest.mark.parametrize(
    ("key", "status"), [("api-key-1", 200), ("chief-key", 200), ("token", 200), ("no", 401)]
)
def test_every_key_opens_it(key, status):
    config = replace(
        CONFIG, api_keys=("api-key-1",), admin_keys=("chief-key",), admin_token="token"
    )
    with live_server(ScriptedService(), config, Metrics("1", ())) as live:
        headers = {"authorization": f"Bearer {key}"}
        assert httpx.get(f"{live.url}/metrics", headers=headers).status_code == status


def test_without_metrics_there_is_no_such_route():
    assert ask("GET", "/metrics").status_code == 404
