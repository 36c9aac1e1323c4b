"""llama.cpp's figures for launches, remembered on disk between runs of the daemon.

One JSON file for all models. A file that is missing, old or broken is as good as empty.
"""

import contextlib
from pathlib import Path

import msgspec

from kvserve.core.findings import Findings
from kvserve.core.plan import Estimate, Launch
from kvserve.whole_file import replace_file

MOST_MODELS = 16
MOST_LAUNCHES = 512


class _Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    launch: Launch
    bill: Estimate | None = None
    refused: str | None = None


_File = dict[str, list[_Entry]]


class Measurements:
    """Findings by model and build; `mark` stands for everything that changes what llama.cpp says
    of the same file: its version and libraries, and the GPUs."""

    def __init__(self, path: Path, model_identity: str, mark: str) -> None:
        self._path = path
        self._key = f"{model_identity} {mark}"

    def read(self) -> Findings:
        """All that is known of the model."""
        entries = self._file().get(self._key, [])
        return Findings(
            exact={e.launch: e.bill for e in entries if e.bill is not None},
            refused={e.launch: e.refused for e in entries if e.refused is not None},
        )

    def write(self, findings: Findings) -> None:
        """Replace what is known of the model. The models and launches that were written longest
        ago are forgotten when there are too many; a file that cannot be written is let be."""
        entries = [_Entry(launch, refused=reason) for launch, reason in findings.refused.items()]
        entries += [_Entry(launch, bill=bill) for launch, bill in findings.exact.items()]
        every = self._file()
        every.pop(self._key, None)
        every[self._key] = entries[-MOST_LAUNCHES:]
        kept = dict(list(every.items())[-MOST_MODELS:])
        with contextlib.suppress(OSError):
            replace_file(self._path, msgspec.json.encode(kept))

    def _file(self) -> _File:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=_File)
        except (OSError, msgspec.DecodeError):
            return {}
