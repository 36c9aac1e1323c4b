"""The main job with the real small model and the official client."""

import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.integration.daemons import Daemon, run_cli

WORDS = ("zebra", "apple", "river", "stone", "cloud", "green")
PROMPTS = [f"{word} {word} {word} {word} {word} {word} {word} {word}" for word in WORDS]
"""Prompts that a small model goes on with beyond any doubt: what one request answers does not
hang on how its batch was computed, and an answer that went to the wrong caller shows."""


def complete(client: openai.OpenAI, prompt: str, n: int = 24) -> str:
    answer = client.completions.create(model="demo", prompt=prompt, max_tokens=n, temperature=0)
    return answer.choices[0].text


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def test_the_decision_was_printed(daemon: Daemon) -> None:
    text = "\n".join(daemon.output)
    assert "chosen: the best quality that fits" in text
    assert "q4_0:q4_0" in text
    assert "loading" in text
    assert "template default:gemma" in text


def test_models_carry_context_and_cache_types(client: openai.OpenAI) -> None:
    entry = client.models.list().data[0]
    extra = entry.model_extra or {}
    assert extra["max_model_len"] == 4096
    assert (extra["cache_type_k"], extra["cache_type_v"]) == ("f16", "f16")
    assert client.models.retrieve(entry.id).id == entry.id


def test_a_completion(client: openai.OpenAI, model: str) -> None:
    raw = client.completions.with_raw_response.create(
        model=model, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    assert raw.headers["x-kvserve-ctx"] == "4096"
    assert raw.headers["x-kvserve-cache-type"] == "f16:f16"
    assert raw.headers["x-request-id"]
    answer = raw.parse()
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"
    assert (answer.system_fingerprint or "").startswith("kvs-")


def test_streams_say_the_same_as_answers(client: openai.OpenAI, model: str) -> None:
    messages = [{"role": "user", "content": "Count from one to ten."}]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=32, temperature=0
    )
    parts, usage, reason = [], None, None
    with client.chat.completions.create(
        model=model,
        messages=messages,
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                reason = choice.finish_reason or reason
    assert "".join(parts) == whole.choices[0].message.content
    assert usage == whole.usage
    assert reason == whole.choices[0].finish_reason


def test_many_at_a_time_get_what_each_gets_alone(client: openai.OpenAI, model: str) -> None:
    alone = [complete(client, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda p: complete(client, p), PROMPTS * 2))
    assert together == alone * 2


def test_a_client_that_hangs_up_frees_its_place(
    daemon: Daemon, client: openai.OpenAI, model: str
) -> None:
    before = daemon.status()["requests"]
    streams = [
        client.completions.create(
            model=model,
            prompt="Once upon a time",
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for _ in range(4)
    ]
    for stream in streams:
        next(iter(stream))
    assert daemon.status()["requests"]["running"] == 4
    for stream in streams:
        stream.close()
    assert complete(client, "The capital of France is", 4)
    after = daemon.status()["requests"]
    assert after["running"] == after["waiting"] == 0
    assert after["failed"] == before["failed"] + 4


def test_a_prompt_beyond_the_model_is_refused_with_the_numbers(
    client: openai.OpenAI, model: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=model, prompt="word " * 33000, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 32768 tokens" in caught.value.message


def test_stop_strings_and_seeds(client: openai.OpenAI, model: str) -> None:
    stopped = client.completions.create(
        model=model, prompt="1, 2, 3, 4,", max_tokens=40, temperature=0, stop=["7"]
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert "7" not in stopped.choices[0].text
    drawn = {
        client.completions.create(
            model=model, prompt="Once", max_tokens=12, temperature=1.0, seed=7
        )
        .choices[0]
        .text
        for _ in range(2)
    }
    assert len(drawn) == 1


def test_health_and_admin(daemon: Daemon) -> None:
    assert daemon.get("/health/live").status_code == 200
    assert daemon.get("/health/ready").status_code == 200
    status = daemon.status()
    assert status["phase"] == "serving"
    assert status["chat_template"] == "default:gemma"
    assert status["memory"]["device_bytes"]["measured"] > 0
    done = run_cli("status", "--port", daemon.port, state_dir=daemon.state_dir)
    assert "KV cache f16:f16 at 4096 tokens" in done.stdout
    logs = run_cli("logs", "--port", daemon.port, state_dir=daemon.state_dir)
    assert "serving" in logs.stdout


def test_a_reload_under_load_loses_no_request(
    daemon: Daemon, client: openai.OpenAI, model: str
) -> None:
    expected = {prompt: complete(client, prompt, 48) for prompt in PROMPTS}
    fingerprint = client.completions.create(
        model=model, prompt="Hi", max_tokens=1
    ).system_fingerprint
    stop = threading.Event()
    answers: list[tuple[str, str]] = []

    def keep_asking(prompt: str) -> None:
        while not stop.is_set():
            answers.append((prompt, complete(client, prompt, 48)))

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        askers = [pool.submit(keep_asking, prompt) for prompt in PROMPTS]
        try:
            up = run_cli("reload", "--ctx", "8192", "--port", daemon.port,
                         state_dir=daemon.state_dir, timeout=90)  # fmt: skip
            assert up.returncode == 0, up.stderr
            assert "at 8192 tokens" in up.stdout
            assert client.models.list().data[0].model_extra["max_model_len"] == 8192
            down = run_cli("reload", "--ctx", "4096", "--port", daemon.port,
                           state_dir=daemon.state_dir, timeout=90)  # fmt: skip
            assert down.returncode == 0, down.stderr
        finally:
            stop.set()
        for asker in askers:
            asker.result()
    assert len(answers) >= len(PROMPTS)
    assert all(text == expected[prompt] for prompt, text in answers)
    again = run_cli("reload", "--ctx", "4096", "--port", daemon.port, state_dir=daemon.state_dir)
    assert "unchanged" in again.stdout
    after = client.completions.create(model=model, prompt="Hi", max_tokens=1).system_fingerprint
    assert after == fingerprint
    records = daemon.status()["reloads"]
    assert [r["to_n_ctx"] for r in records][-2:] == [8192, 4096]
    assert all(r["outcome"] == "done" for r in records)


def test_a_context_that_the_model_does_not_have_is_refused(daemon: Daemon) -> None:
    done = run_cli("reload", "--ctx", "65536", "--port", daemon.port, state_dir=daemon.state_dir)
    assert done.returncode == 2
    assert "--ctx 32768 or less" in done.stderr
