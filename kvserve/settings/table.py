"""The table of all settings in `docs/configuration.md`."""

from kvserve.settings.fields import Settings
from kvserve.settings.load import NOT_IN_FILE, env_name, flag_name


def settings_table() -> str:
    """Return the table as Markdown."""
    rows = [
        "| TOML key | Flag | Environment | Default | What it does |",
        "|---|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        key = "" if name in NOT_IN_FILE else f"`{name}`"
        rows.append(
            f"| {key} | `{flag_name(name)}` | `{env_name(name)}` | "
            f"{_default_text(name)} | {field.description} |"
        )
    return "\n".join(rows)


def _default_text(name: str) -> str:
    if name == "state_dir":
        return "`kvserve` in the user's state directory"
    default = Settings.model_fields[name].default
    if default is None or default == ():
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, float):
        return f"`{default:g}s`"
    return f"`{default}`"
