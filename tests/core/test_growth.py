"""When the context moves by itself."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvserve.core.dtypes import parse_pair
from kvserve.core.growth import (
    Adapt,
    GrowthPolicy,
    Reloads,
    costs_no_more,
    grown,
    may_grow_now,
    roomier,
    shrunk,
)
from kvserve.core.machine import Backend
from kvserve.core.plan import Launch

POLICY = GrowthPolicy(Adapt.FULL, max_ctx=100_000)
STATE = Reloads(asked_ctx=8192, n_ctx=32768, changed_at=1000.0, went_down=False, needed_at=1000.0)


@pytest.mark.parametrize(
    ("needed", "target"),
    [(1, 256), (8192, 8192), (8193, 16384), (70_000, 100_000), (100_000, 100_000), (100_001, None)],
)
def test_growth_is_by_powers_of_two_up_to_the_limit(needed: int, target: int | None) -> None:
    assert grown(needed, POLICY) == target
    assert grown(needed, replace(POLICY, adapt=Adapt.GROW)) == target
    assert grown(needed, replace(POLICY, adapt=Adapt.OFF)) is None


@given(st.integers(1, 100_000))
def test_what_is_grown_to_is_enough_and_not_twice_too_much(needed: int) -> None:
    target = grown(needed, POLICY)
    assert target is not None
    assert needed <= target < max(2 * needed, 257)


@pytest.mark.parametrize(
    ("now", "state", "target"),
    [
        (1599.0, STATE, None),
        (1600.0, STATE, 8192),
        (1700.0, replace(STATE, needed_at=1200.0), None),
        (1800.0, replace(STATE, needed_at=1200.0), 8192),
        (9999.0, replace(STATE, n_ctx=8192), None),
        (9999.0, replace(STATE, n_ctx=4096), None),
    ],
)
def test_it_goes_back_after_a_time_without_need(
    now: float, state: Reloads, target: int | None
) -> None:
    assert shrunk(now, state, POLICY) == target
    assert shrunk(now, state, replace(POLICY, adapt=Adapt.GROW)) is None


def test_room_for_several_is_within_the_limit() -> None:
    assert roomier(16384, 16000, POLICY) is None
    assert roomier(16384, 40_000, POLICY) == 65536
    assert roomier(16384, 400_000, POLICY) == 100_000
    assert roomier(100_000, 400_000, POLICY) is None


def test_more_context_is_free_where_nothing_else_changes() -> None:
    launch = Launch(Backend.CUDA, parse_pair("q8_0"), 8192, 4, 512, 512, 33)
    assert costs_no_more(launch, replace(launch, n_ctx=16384))
    for change in ({"pair": parse_pair("q4_0")}, {"n_gpu_layers": 20}, {"n_ubatch": 128}):
        assert not costs_no_more(launch, replace(launch, n_ctx=16384, **change))


def test_up_and_down_keep_their_distance() -> None:
    down = replace(STATE, went_down=True)
    assert may_grow_now(1000.0, STATE, POLICY)
    assert not may_grow_now(1029.0, down, POLICY)
    assert may_grow_now(1030.0, down, POLICY)
    hasty = replace(POLICY, shrink_after=0.0)
    assert shrunk(1029.0, STATE, hasty) is None
    assert shrunk(1030.0, STATE, hasty) == 8192
