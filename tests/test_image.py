"""The image's files agree with the code; building it is scripts/image's work, and takes minutes."""

import re
from pathlib import Path

import pytest

from kvserve.core.dtypes import LADDER
from kvserve.settings import environment_warnings

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", ["Dockerfile", "compose.yaml"])
def test_every_variable_is_a_setting(name):
    text = (ROOT / name).read_text()
    found = set(re.findall(r"(?m)^\s*(?:ENV )?(KVSERVE_\w+)[=:]", text))
    assert found
    assert environment_warnings(dict.fromkeys(found, "x")) == ()


def test_the_kernels_are_those_of_the_setup():
    (quants,) = re.findall(r'ARG FA_QUANTS="(.*)"', DOCKERFILE)
    assert {f"{pair.k}-{pair.v}" for pair in LADDER} <= set(quants.split(","))
    assert f'fa_quants="{quants}"' in (ROOT / "scripts/setup").read_text()


def test_everything_that_is_copied_is_let_through():
    let_through = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in let_through
    lines = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKERFILE)
    copied = [name for line in lines for name in line.split()]
    assert "kvserve" in copied
    for name in copied:
        assert f"!{name}" in let_through
        assert (ROOT / name).exists()


def test_it_runs_as_nobody_in_particular_and_stops_by_a_signal():
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"(?m)^USER kvserve", final)
    assert 'ENTRYPOINT ["tini", "--", "kvserve"]' in final
    assert "HEALTHCHECK" in final
    assert "g++" not in final
