"""What was measured of a model, one JSON file for each model, build and device in the user's data
directory. Measurements of another file or build are refused, with the reason."""

import contextlib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import msgspec
import platformdirs

from kvserve.core.loss import NOTHING_MEASURED, Quality
from kvserve.core.machine import Backend, Machine
from kvserve.supervisor.building import library_mark
from kvserve.whole_file import replace_file

FORMAT = 1


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """What measurements hold for: `model` is `ModelFile.identity`, `build` stands for llama.cpp's
    version and libraries, `device` is `cpu` or the GPUs' names."""

    model: str
    build: str
    device: str

    @property
    def digest(self) -> str:
        """Twelve hex digits."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]


@dataclass(frozen=True, slots=True)
class Profile:
    """A file's contents. `measured_at` is in seconds since the epoch; `settings` say how the last
    run measured, for people."""

    key: ProfileKey
    model_id: str
    measured_at: float
    settings: dict[str, str]
    quality: Quality
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class Known:
    """What there is to go by: the measurements (none: the priors stand), and why others that are
    there do not count."""

    quality: Quality = NOTHING_MEASURED
    refusal: str | None = None
    profile: Profile | None = None


NOTHING_KNOWN = Known()


class Profiles:
    """The files. One that cannot be read, or is of another format, is as good as none."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or platformdirs.user_data_path("kvserve") / "profiles"

    def path(self, model_id: str, key: ProfileKey) -> Path:
        """Where the measurements of a model are kept."""
        return self.folder / f"{_slug(model_id)}-{key.digest}.json"

    def read(self, model_id: str, key: ProfileKey) -> Known:
        """What was measured for exactly this key; else why what there is does not count."""
        path = self.path(model_id, key)
        profile = _read(path)
        if profile is not None:
            reason = refusal(profile.key, key)
            if reason is None:
                return Known(profile.quality, profile=profile)
            return Known(refusal=f"{path.name}: {reason}")
        with contextlib.suppress(OSError):
            for other in sorted(self.folder.glob(f"{_slug(model_id)}-*.json")):
                profile = _read(other)
                if profile is not None and profile.model_id == model_id:
                    reason = refusal(profile.key, key) or "its name does not fit its contents"
                    return Known(refusal=f"{other.name}: {reason}")
        return Known()

    def write(self, profile: Profile) -> Path:
        """Replace a model's file. Raises OSError where the directory cannot be written."""
        path = self.path(profile.model_id, profile.key)
        replace_file(path, msgspec.json.format(msgspec.json.encode(profile), indent=1))
        return path


class ProfileWatch:
    """One model's measurements, read again whenever its file has changed: what `kvserve eval`
    writes beside a running daemon counts from the next plan on."""

    def __init__(self, profiles: Profiles, model_id: str, key: ProfileKey) -> None:
        self._profiles = profiles
        self._model_id = model_id
        self._key = key
        self._path = profiles.path(model_id, key)
        self._mark = self._identity()
        self._known = profiles.read(model_id, key)

    def read(self) -> Known:
        """What there is to go by now. Never raises."""
        mark = self._identity()
        if mark != self._mark:
            self._mark = mark
            self._known = self._profiles.read(self._model_id, self._key)
            # Here since `kvserve plan` imports this module, and is done before structlog is.
            import structlog  # noqa: PLC0415

            log = structlog.get_logger(__name__)
            log.info(
                "measured quality read again",
                profile=str(self._path),
                n_losses=len(self._known.quality.losses),
                n_speeds=len(self._known.quality.speeds),
                refusal=self._known.refusal,
            )
        return self._known

    def _identity(self) -> tuple[int, int, int] | None:
        """Changes when the file does: it is always replaced, never written in place."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size


def refusal(found: ProfileKey, wanted: ProfileKey) -> str | None:
    """Why measurements under `found` do not hold for `wanted`; None where they do."""
    if found.model != wanted.model:
        return "measured on another model file of that name; run `kvserve eval` on this one"
    if found.build != wanted.build:
        return (
            f"measured with another llama.cpp build ({found.build}; this is {wanted.build}); "
            "run `kvserve eval` again"
        )
    if found.device != wanted.device:
        return f"measured on {found.device}, not on {wanted.device}; run `kvserve eval` here"
    return None


def profile_key(model_identity: str, machine: Machine, backend: Backend | None) -> ProfileKey:
    """The key for a model on this machine; `backend` is the one asked for, None for any."""
    gpus = () if backend is Backend.CPU or not machine.build.cuda else machine.gpus
    device = ", ".join(gpu.name for gpu in gpus) or "cpu"
    return ProfileKey(model_identity, f"{machine.build.version} {library_mark()}", device)


def _read(path: Path) -> Profile | None:
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
    except (OSError, msgspec.DecodeError):
        return None
    return profile if profile.format == FORMAT else None


def _slug(model_id: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", model_id)[:80]
