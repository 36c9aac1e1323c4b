"""The report and the tables: well-formed, self-contained, with every figure in them."""

import re
import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import LADDER, CachePair, parse_pair
from kvserve.core.loss import Quality, Speed, TaskResult, TextLoss
from kvserve.eval.plots import pareto, pareto_front
from kvserve.eval.progress import left
from kvserve.eval.report import report
from kvserve.eval.tables import quality_text

Q4 = parse_pair("q4_0")


def loss(pair: CachePair, mode: str, kld: float) -> TextLoss:
    return TextLoss(
        pair, mode, 1024, 384, kld, kld / 10, kld, 5 * kld, 9 * kld, 1 - kld, -0.01, 0.05,
        20.0, 1 + kld, 1 + kld / 2, 1 + 2 * kld,
    )  # fmt: skip


QUALITY = Quality(
    losses=tuple(
        loss(pair, mode, 0.005 * 2**rank)
        for rank, pair in enumerate(LADDER)
        for mode in ("prefill", "decode", "carried")
    ),
    tasks=(
        TaskResult("arithmetic", Q4, 20, 15, 5, 10, 0, 0.00195, 0.02, True),
        TaskResult("citation", Q4, 20, 0, 0, 0, 0, 1.0, 0.02, False),
    ),
    speeds=tuple(Speed(pair, d, 200.0, 40.0 - d / 1024) for pair in LADDER for d in (0, 2048)),
)
KV = {pair: 1000 * (10 - rank) for rank, pair in enumerate(LADDER)}


def test_the_page_is_well_formed_and_needs_nothing_else() -> None:
    page = report(QUALITY, {"model": "a <b> & c", "seed": "1"}, KV, 1024)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page
    assert "a &lt;b&gt; &amp; c" in page
    body = re.sub(r"<meta[^>]*>", "", page.removeprefix("<!doctype html>"))
    root = ET.fromstring(body)
    text = "".join(root.itertext())
    assert "not measurable on this model" in text
    assert "0.16000 ± 0.01600" in text
    assert len(root.findall(".//{http://www.w3.org/2000/svg}svg")) == 2
    [bad] = root.findall(".//tr[@class='bad']")
    assert "arithmetic" in "".join(bad.itertext())


def test_parts_without_rows_are_left_out() -> None:
    page = report(Quality(speeds=QUALITY.speeds), {}, {}, 256)
    assert "<svg" not in page
    assert "Speed" in page
    assert "Tasks" not in page
    assert quality_text(Quality()) == ""


def test_the_terminal_shows_the_same_figures() -> None:
    text = quality_text(QUALITY)
    assert "f16:f16 (control)  prefill" in text
    assert "worse" in text
    assert "10" in next(line for line in text.splitlines() if line.startswith("arithmetic"))


points = st.dictionaries(
    st.sampled_from(LADDER),
    st.tuples(st.integers(1, 50), st.floats(0.0, 2.0)),
    min_size=1,
)


@given(points)
def test_nothing_beats_the_front_and_the_front_beats_the_rest(
    found: dict[CachePair, tuple[int, float]],
) -> None:
    front = pareto_front(found)
    for pair, (n_bytes, kld) in found.items():
        beaten = [
            other
            for other in front
            if other != pair and found[other][0] <= n_bytes and found[other][1] <= kld
        ]
        assert bool(beaten) != (pair in front)
    ET.fromstring(pareto(found))


def test_the_time_left_is_told_as_people_read_it() -> None:
    assert left(10.0, 0.0) == "?"
    assert left(60.0, 0.25) == "3:00"
    assert left(1000.0, 0.1) == "2:30:00"
