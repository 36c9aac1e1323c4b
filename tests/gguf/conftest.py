from pathlib import Path

import pytest

from tests.models import PRESETS, write_sparse


@pytest.fixture(scope="session")
def presets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each full-size model without data, written once."""
    folder = tmp_path_factory.mktemp("presets")
    return {preset: write_sparse(folder / f"{preset}.gguf", preset) for preset in PRESETS}
