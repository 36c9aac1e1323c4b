import re
import tomllib
from pathlib import Path

import pytest

from kvserve.core.dtypes import LADDER, CachePair, KvType
from kvserve.settings import Settings, load_settings
from kvserve.settings.table import settings_table

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
PROFILES = [
    (path, profile)
    for path in CONFIGS
    for profile in tomllib.loads(path.read_text()).get("profiles", {})
]
NOT_A_SETTING_OF_A_FILE = {"config", "vram_free"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_file_loads(path):
    assert load_settings({}, config=path, environ={}).config == path


@pytest.mark.parametrize(("path", "profile"), PROFILES)
def test_each_profile_loads(path, profile):
    settings = load_settings({"profile": profile}, config=path, environ={})
    assert settings.profile == profile
    assert settings.model.startswith("/models/")


def test_the_8gb_file_has_the_four_configurations():
    path = ROOT / "configs/rtx4060-8gb.toml"
    found = {}
    for file, profile in PROFILES:
        if file == path:
            settings = load_settings({"profile": profile}, config=path, environ={})
            found[profile] = (settings.ctx, settings.cache_type)
    assert found == {
        "f16-16k": (16384, CachePair(KvType.F16, KvType.F16)),
        "q8-32k": (32768, CachePair(KvType.Q8_0, KvType.Q8_0)),
        "q4-32k-rag": (32768, CachePair(KvType.Q4_0, KvType.Q4_0)),
        "qwen-32b-8k": (8192, CachePair(KvType.Q8_0, KvType.Q4_0)),
    }


@pytest.fixture
def example(tmp_path):
    """The example file with every commented setting of the top level switched on."""
    text = (ROOT / "configs/example.toml").read_text().partition("# [profiles")[0]
    switched_on = re.sub(r"(?m)^# (?=\w+ = )", "", text)
    path = tmp_path / "example.toml"
    path.write_text(switched_on)
    return path


def test_the_example_names_every_setting(example):
    keys = tomllib.loads(example.read_text()).keys()
    assert set(keys) == set(Settings.model_fields) - NOT_A_SETTING_OF_A_FILE


def test_the_example_holds_the_defaults(example):
    shown = load_settings({}, config=example, environ={}).model_dump()
    for name, field in Settings.model_fields.items():
        if name not in {"model", "state_dir", "config"}:
            assert shown[name] == field.default, name


def test_the_documentation_has_the_table_of_all_settings():
    text = (ROOT / "docs/configuration.md").read_text()
    assert settings_table() in text, "run `python -m kvserve.settings` and paste the table"


def test_each_setting_is_described():
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"`--{name.replace('_', '-')}`" in settings_table()


def test_the_setup_compiles_kernels_for_every_pair_of_the_ladder():
    (quants,) = re.findall(r'fa_quants="(.*)"', (ROOT / "scripts/setup").read_text())
    assert {f"{pair.k}-{pair.v}" for pair in LADDER} <= set(quants.split(","))


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    pinned = (ROOT / "scripts/constraints.txt").read_text()
    for requirement in wanted:
        name = re.match(r"[\w-]+", requirement)[0]
        assert re.search(rf"(?m)^{name}==", pinned), name
