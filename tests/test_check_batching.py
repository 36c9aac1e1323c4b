"""How far apart two answers are where they part, as `scripts/check-batching` counts it."""

import importlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
END, A, B, C = range(4)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("check_batching")


def alone(drawn: int, top: dict[int, float]) -> SimpleNamespace:
    likely = {
        token: SimpleNamespace(token=token, logprob=logprob) for token, logprob in top.items()
    }
    return SimpleNamespace(drawn=likely[drawn], top=list(likely.values()))


@pytest.mark.parametrize(
    ("mine", "gaps"),
    [
        ([A, A], []),
        ([A, B], [0.5]),
        ([B, A], [0.01]),  # only the first place counts, and the end token is no rival
        ([C, A], [1.0]),  # at least
    ],
)
def test_the_difference_is_of_the_two_tokens(
    script: ModuleType, mine: list[int], gaps: list[float]
) -> None:
    logprobs = [alone(A, {END: -1.0, A: -2.0, B: -2.01, 9: -3.0}), alone(A, {A: -1.0, B: -1.5})]
    lone = SimpleNamespace(logprobs=logprobs)
    found = script.gap_where_they_part(SimpleNamespace(tokens=mine), lone)
    assert found == pytest.approx(gaps)
