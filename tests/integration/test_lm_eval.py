"""What lm-evaluation-harness sends and reads: likelihoods of answers by an echo of token prompts,
and its tasks out of kvserve's items."""

import json
import subprocess
import sys
from pathlib import Path

import openai
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "lm_eval_tasks.py"
CONTEXTS = ([2, 818, 5279, 529], [2, 818], [2, 3689])
ANSWERS = ([7001, 563], [5279, 529, 7001], [563])


def likelihoods(client: openai.OpenAI, which: list[int]) -> list[tuple[float, bool]]:
    """As lm-eval's `local-completions` asks and reads, all prompts in one request."""
    answer = client.completions.create(
        model="gemma-3-270m",
        prompt=[CONTEXTS[index] + ANSWERS[index] for index in which],
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    found = []
    for index, choice in zip(which, sorted(answer.choices, key=lambda c: c.index), strict=True):
        told = choice.logprobs
        assert told is not None
        n_context = len(CONTEXTS[index])
        each = told.token_logprobs[n_context:-1]
        tops = told.top_logprobs[n_context:-1]
        assert len(each) == len(ANSWERS[index])
        greedy = all(one == max(top.values()) for one, top in zip(each, tops, strict=True))
        found.append((sum(each), greedy))
    return found


def test_answers_are_scored_in_a_batch_as_alone(client: openai.OpenAI) -> None:
    together = likelihoods(client, [0, 1, 2])
    alone = [likelihoods(client, [index])[0] for index in (0, 1, 2)]
    for (total, greedy), (other, other_greedy) in zip(together, alone, strict=True):
        assert total < 0
        # The order of sums differs with the batch; another answer's likelihood is nats away.
        assert total == pytest.approx(other, abs=0.5)
        assert greedy == other_greedy
    assert len({round(total) for total, _ in together}) == 3


def test_tasks_have_their_answer_among_the_choices(tmp_path: Path) -> None:
    argv = [sys.executable, str(SCRIPT), str(tmp_path), "--items", "6", "--lines", "12"]
    subprocess.run(argv, check=True, timeout=60)
    assert len(list(tmp_path.glob("kvserve_*.yaml"))) == 3
    for name in ("citation", "classify"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) == 6
        for row in rows:
            assert len(set(row["choices"])) == 4
            assert row["choices"][row["gold"]]
    [row, *_] = [json.loads(line) for line in (tmp_path / "recall.jsonl").read_text().splitlines()]
    assert row["answer"] in row["prompt"]
