"""One daemon on the real small model for the tests that do not harm it."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.integration.daemons import Daemon


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    state_dir = tmp_path_factory.mktemp("state")
    with Daemon(state_dir, "--model", "demo", "--ctx", "4096", "--threads", "2") as running:
        yield running


@pytest.fixture(scope="session")
def client(daemon: Daemon) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"
