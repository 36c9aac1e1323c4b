"""Files are replaced whole: contents, rights, and what is left after a failure."""

import stat
from pathlib import Path

import pytest

from kvserve.whole_file import replace_file


def test_the_contents_are_replaced_and_nothing_stays_beside(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "profile.json"
    replace_file(path, b"a long first text")
    replace_file(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(path.parent.iterdir()) == [path]


def test_the_mode_holds_from_the_start(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"open to all")
    path.chmod(0o644)
    replace_file(path, b"closed", 0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    # A folder that is not empty cannot be replaced by a file, whoever asks.
    path = tmp_path / "taken"
    path.mkdir()
    (path / "inside").write_bytes(b"kept")
    with pytest.raises(IsADirectoryError):
        replace_file(path, b"text")
    assert (path / "inside").read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [path]
