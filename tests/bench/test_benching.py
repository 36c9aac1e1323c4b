"""What `kvserve bench` refuses before it puts a load on anything."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvserve.cli.benching import MOST_STREAMS, BenchOptions, bench, parse_streams
from kvserve.cli.failing import writable
from kvserve.errors import UsageError
from tests.models import write_model

OPTIONS = BenchOptions(
    url="http://127.0.0.1:9/v1",  # nobody answers there: a load would fail in another way
    model=None,
    versus=(),
    streams=(1,),
    requests=1,
    prompt_words=8,
    shared_words=0,
    max_tokens=4,
    cache_type="f16",
    threads=None,
    cpu=True,
    svg=None,
    as_json=False,
)


def test_streams_are_numbers_by_commas() -> None:
    assert parse_streams("1,4, 8") == (1, 4, 8)
    assert parse_streams(str(MOST_STREAMS)) == (MOST_STREAMS,)


@pytest.mark.parametrize("text", ["", "abc", "0", "-3", "1,,2", "1.5", "٣", str(MOST_STREAMS + 1)])
def test_other_streams_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--streams .*by commas, as 1,4,8$"):
        parse_streams(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("requests", 0),
        ("prompt_words", 0),
        ("shared_words", -1),
        ("max_tokens", -5),
        ("arriving_words", -1),
    ],
)
def test_numbers_without_a_load_are_refused(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=rf"^--{name.replace('_', '-')} {value}: write [01] or"):
        bench(replace(OPTIONS, **{name: value}))


def test_a_prompt_is_not_shorter_than_its_prefix() -> None:
    with pytest.raises(UsageError, match="at most the 8 words of --prompt-words"):
        bench(replace(OPTIONS, shared_words=9))


def test_a_plot_that_cannot_be_written_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--svg .*No such file or directory"):
        bench(replace(OPTIONS, svg=tmp_path / "none" / "plot.svg"))


def test_gaps_have_no_plot(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no plot of --arriving-words"):
        bench(replace(OPTIONS, svg=tmp_path / "plot.svg", arriving_words=100))


def test_looking_whether_a_report_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("kept")
    writable(old, "html")
    writable(new, "html")
    assert old.read_text() == "kept"
    assert not new.exists()


@pytest.mark.parametrize("versus", ["llama-server=/no/such/program -np 4", "llama-server="])
def test_a_rival_that_is_not_there_is_told_first(tmp_path: Path, versus: str) -> None:
    model = str(write_model(tmp_path / "tiny.gguf"))
    with pytest.raises(UsageError, match=r"^--versus .*: there is no program"):
        bench(replace(OPTIONS, url=None, model=model, versus=(versus,)))
