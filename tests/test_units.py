import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.units import GIB, KIB, MIB, format_bytes, format_gib, parse_bytes


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("512MiB", 512 * MIB),
        ("512M", 512 * MIB),
        ("512m", 512 * MIB),
        ("8gb", 8 * 10**9),
        ("8GiB", 8 * GIB),
        ("1.5G", 3 * GIB // 2),
        ("7.6GiB", 8160437862),
        ("2 KiB", 2 * KIB),
        (" 1T ", 2**40),
        ("10b", 10),
    ],
)
def test_sizes_are_read(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1.G", ".5G", "1e9", "7,6GiB", "5 parsecs", "1 2"]
)
def test_what_is_no_size_is_refused_with_the_spellings(text):
    with pytest.raises(ValueError, match="write it as"):
        parse_bytes(text)


def test_an_absurd_size_is_refused():
    with pytest.raises(ValueError, match="more than any machine holds"):
        parse_bytes("9" * 40 + "GiB")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (12 * KIB, "12 KiB"),
        (939 * MIB, "939 MiB"),
        (8160437862, "7.60 GiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_sizes_are_printed_in_binary_units(size_bytes, text):
    assert format_bytes(size_bytes) == text


def test_columns_have_gib_without_a_unit():
    assert format_gib(GIB // 2) == "0.50"


@given(st.integers(min_value=0, max_value=2**62))
def test_a_plain_number_is_itself(size_bytes):
    assert parse_bytes(str(size_bytes)) == size_bytes


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert parse_bytes(text) >= 0
