"""A context that grows for the request that needs it, on the real model."""

from pathlib import Path

import openai

from tests.integration.daemons import Daemon


def test_a_longer_prompt_is_answered_and_a_running_stream_goes_on(state_dir: Path) -> None:
    arguments = ("--model", "demo", "--ctx", "512", "--drain-timeout", "100ms", "--threads", "2")
    with (
        Daemon(state_dir, *arguments) as daemon,
        openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client,
    ):
        counted = {"model": "default", "prompt": "zebra " * 8, "max_tokens": 200, "temperature": 0}
        alone = client.completions.create(**counted, extra_body={"ignore_eos": True})
        stream = client.completions.create(**counted, extra_body={"ignore_eos": True}, stream=True)
        chunks = iter(stream)
        text = next(chunks).choices[0].text
        raw = client.completions.with_raw_response.create(
            model="default", prompt="apple " * 700, max_tokens=4, temperature=0
        )
        assert raw.headers["x-kvserve-ctx"] == "1024"
        assert "apple" in raw.parse().choices[0].text
        text += "".join(chunk.choices[0].text for chunk in chunks)
        assert text == alone.choices[0].text
        status = daemon.status()
        assert status["plan"]["chosen"]["n_ctx"] == 1024
        assert [r["reason"] for r in status["reloads"]] == ["start", "grow"]
        wider = client.chat.completions.with_raw_response.create(
            model="default",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=2,
            extra_body={"kvserve": {"ctx": 2000}},
        )
        assert wider.headers["x-kvserve-ctx"] == "2048"
