"""Where the settings come from, and the one line that says which source is wrong.

pydantic-settings is not used: it cannot say which source a bad value came from, reads lists in
variables as JSON, and takes 0.16 s to import.
"""

import difflib
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from pydantic import ValidationError

from kvserve.errors import UsageError
from kvserve.settings.fields import Settings

ENV_PREFIX = "KVSERVE_"
NOT_IN_FILE = frozenset({"config", "vram_free"})
_NOT_IN_PROFILE = NOT_IN_FILE | {"profile"}


@dataclass(frozen=True, slots=True)
class _Layer:
    """Values from one source, and how an error names one of them."""

    values: Mapping[str, object]
    name: Callable[[str], str]


def flag_name(field: str) -> str:
    """Return the flag of a field: `--cache-type`."""
    return "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    """Return the environment variable of a field: `KVSERVE_CACHE_TYPE`."""
    return ENV_PREFIX + field.upper()


def load_settings(
    flags: Mapping[str, object],
    *,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    default_config: Path | None = None,
) -> Settings:
    """Put the settings together.

    `flags` are by field name, None where the flag was not given. An environment variable that is
    empty counts as unset. `default_config` is read where no file is named, if it exists; None is
    the user's own. Raises UsageError, one line that names the source, the problem and the fix.
    """
    environ = os.environ if environ is None else environ
    given = {name: value for name, value in flags.items() if value is not None}
    if config is not None:
        given["config"] = config
    variables = {name: environ.get(env_name(name)) for name in Settings.model_fields}
    layers = [
        _Layer(given, flag_name),
        _Layer({name: value for name, value in variables.items() if value}, env_name),
    ]
    path = _config_path(layers, default_config)
    if path is not None:
        layers.append(_Layer({"config": path}, lambda _: str(path)))
        layers += _file_layers(path, layers)
    elif (chosen := _chosen_profile(layers)) is not None:
        raise UsageError(
            f"{chosen[0]}: {chosen[1]!r} needs a settings file: name one with --config FILE",
            param="profile",
        )
    return _validated(layers)


def environment_warnings(environ: Mapping[str, str]) -> tuple[str, ...]:
    """List the `KVSERVE_*` variables that no setting has, one line each; they are not errors."""
    known = [env_name(name) for name in Settings.model_fields]
    return tuple(
        f"{name} is not a setting of kvserve and is ignored{_did_you_mean(name, known)}"
        for name in sorted(environ)
        if name.startswith(ENV_PREFIX) and name not in known
    )


def _config_path(layers: list[_Layer], default_config: Path | None) -> Path | None:
    named = _find(layers, "config")
    if named is None:
        default = default_config or platformdirs.user_config_path("kvserve") / "config.toml"
        return default if default.is_file() else None
    source, value = named
    path = Path(str(value)).expanduser()
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise UsageError(
            f"{source}: {path} {problem}: name a TOML file, such as configs/example.toml",
            param="config",
        )
    return path


def _file_layers(path: Path, above: list[_Layer]) -> list[_Layer]:
    """Read the file: the chosen profile over the top level, each checked for unknown keys."""
    top = _read_toml(path)
    profiles = top.pop("profiles", {})
    if not isinstance(profiles, dict) or not all(isinstance(p, dict) for p in profiles.values()):
        raise UsageError(f"{path}: profiles must be tables: write [profiles.NAME]", param="config")
    if isinstance(top.get("profile"), dict):
        raise UsageError(f"{path}: profile names one table: write [profiles.NAME]", param="profile")
    _check_keys(path, "", top, NOT_IN_FILE, extra=("profiles",))
    for name, table in profiles.items():
        _check_keys(path, f"profiles.{name}.", table, _NOT_IN_PROFILE)
    common = _Layer(top, lambda key: f"{path}: {key}")
    chosen = _chosen_profile([*above, common])
    if chosen is None:
        return [common]
    source, profile = chosen
    if profile not in profiles:
        there = f"it has {', '.join(sorted(profiles))}" if profiles else "it has no profiles"
        raise UsageError(f"{source}: {path} has no profile {profile!r}: {there}", param="profile")
    return [_Layer(profiles[profile], lambda key: f"{path}: profiles.{profile}.{key}"), common]


def _chosen_profile(layers: list[_Layer]) -> tuple[str, str] | None:
    found = _find(layers, "profile")
    if found is None or str(found[1]).strip().lower() == "none":
        return None
    return found[0], str(found[1]).strip()


def _read_toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = error.strerror or str(error)
    except UnicodeDecodeError:
        problem = "the text is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        problem = f"not TOML: {error}"
    raise UsageError(f"{path}: {problem}", param="config")


def _check_keys(
    path: Path,
    prefix: str,
    table: Mapping[str, object],
    barred: frozenset[str],
    extra: tuple[str, ...] = (),
) -> None:
    known = [name for name in Settings.model_fields if name not in barred]
    for key in table:
        if key == "vram_free":
            raise UsageError(
                f"{path}: {prefix}{key} is for `kvserve plan {flag_name(key)} SIZE` alone: take it "
                "out of the file",
                param=key,
            )
        if key not in known:
            hint = _did_you_mean(key, [*known, *extra]) or f"; known are {', '.join(known)}"
            raise UsageError(f"{path}: {prefix}{key} is not a setting{hint}", param=key)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.replace("-", "_"), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _find(layers: Iterable[_Layer], field: str) -> tuple[str, object] | None:
    """Return the name of the first source that has a field, and its value there."""
    for layer in layers:
        if field in layer.values:
            return layer.name(field), layer.values[field]
    return None


def _validated(layers: list[_Layer]) -> Settings:
    merged: dict[str, object] = {}
    for layer in reversed(layers):
        merged.update(layer.values)
    try:
        return Settings.model_validate(merged)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    field = str(error["loc"][0])
    source, _ = _find(layers, field) or (field, None)
    problem = error.get("ctx", {}).get("error", error["msg"])
    raise UsageError(f"{source}: {problem}", param=field)
