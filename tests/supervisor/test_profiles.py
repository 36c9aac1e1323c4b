"""Stored measurements: found for the same model, build and device, refused with reasons else."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvserve.cli.tables import quality_lines
from kvserve.core.dtypes import parse_pair
from kvserve.core.loss import Quality, Speed
from kvserve.supervisor.profiles import Profile, ProfileKey, Profiles, ProfileWatch

KEY = ProfileKey("identity", "0.3.36 abc", "cpu")
QUALITY = Quality(speeds=(Speed(parse_pair("q8_0:q4_0"), 0, 100.0, 10.0),))
PROFILE = Profile(KEY, "some model/Q4", 1.0, {}, QUALITY)


def test_round_trip(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    path = profiles.write(PROFILE)
    known = profiles.read("some model/Q4", KEY)
    assert path.parent == tmp_path
    assert (known.quality, known.refusal, known.profile) == (QUALITY, None, PROFILE)


def test_a_profile_without_a_kld_claims_no_quality(tmp_path: Path) -> None:
    Profiles(tmp_path).write(PROFILE)
    [line] = quality_lines(Profiles(tmp_path).read("some model/Q4", KEY), 1024)
    assert line == "quality  priors; what was measured on 1970-01-01 holds no KLD"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        (replace(KEY, model="other"), "another model file"),
        (
            replace(KEY, build="0.3.37 def"),
            "another llama.cpp build (0.3.36 abc; this is 0.3.37 def)",
        ),
        (replace(KEY, device="NVIDIA H100"), "measured on cpu, not on NVIDIA H100"),
    ],
)
def test_another_file_build_or_device_is_refused(
    tmp_path: Path, wanted: ProfileKey, reason: str
) -> None:
    profiles = Profiles(tmp_path)
    written = profiles.write(PROFILE)
    found = profiles.read("some model/Q4", wanted)
    assert found.quality == Quality()
    assert found.refusal is not None
    assert reason in found.refusal
    # Nor does it help to give it the name that would be read.
    written.rename(profiles.path("some model/Q4", wanted))
    assert profiles.read("some model/Q4", wanted).refusal is not None


def test_another_models_file_is_no_reason(tmp_path: Path) -> None:
    Profiles(tmp_path).write(PROFILE)
    assert Profiles(tmp_path).read("another", KEY).refusal is None


def test_a_broken_file_is_none(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    profiles.write(PROFILE).write_text("{")
    assert profiles.read("some model/Q4", KEY).quality == Quality()


def test_a_watch_sees_what_is_written_later_and_what_is_taken_away(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    watch = ProfileWatch(profiles, "some model/Q4", KEY)
    assert watch.read().quality == Quality()
    path = profiles.write(PROFILE)
    assert watch.read().quality == QUALITY
    assert watch.read() is watch.read()
    more = Quality(speeds=(Speed(parse_pair("q8_0:q4_0"), 0, 100.0, 99.0),))
    profiles.write(replace(PROFILE, quality=more))
    assert watch.read().quality == more
    path.unlink()
    assert watch.read().quality == Quality()


def test_a_watch_tells_why_another_builds_profile_does_not_count(tmp_path: Path) -> None:
    profiles = Profiles(tmp_path)
    watch = ProfileWatch(profiles, "some model/Q4", KEY)
    other = replace(PROFILE, key=replace(KEY, build="0.3.37 def"))
    profiles.write(other).rename(profiles.path("some model/Q4", KEY))
    known = watch.read()
    assert known.quality == Quality()
    assert known.refusal is not None
    assert "another llama.cpp build" in known.refusal
