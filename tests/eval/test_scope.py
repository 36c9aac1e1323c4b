"""What the flags of an evaluation make of its presets."""

import pytest

from kvserve.core.dtypes import LADDER
from kvserve.core.loss import REFERENCE_PAIR
from kvserve.errors import UsageError
from kvserve.eval.scope import FULL, NORMAL, QUICK, narrowed, preset, shortened


def test_presets() -> None:
    assert preset(quick=True, full=False) == QUICK
    assert preset(quick=False, full=False) == NORMAL
    with pytest.raises(UsageError, match="--quick and --full"):
        preset(quick=True, full=True)


def test_the_reference_is_always_among_the_pairs() -> None:
    scope = narrowed(QUICK, n_ctx_train=8192, pairs="q4_0,q8_0-q4_0")
    assert list(map(str, scope.pairs)) == ["f16:f16", "q4_0:q4_0", "q8_0:q4_0"]
    assert narrowed(QUICK, n_ctx_train=8192, pairs="all").pairs == LADDER
    assert QUICK.pairs[0] == NORMAL.pairs[0] == REFERENCE_PAIR


def test_depths_keep_to_the_model() -> None:
    assert narrowed(FULL, n_ctx_train=16384).depths == (8192,)
    assert narrowed(FULL, n_ctx_train=2048).depths == (2048,)
    assert narrowed(QUICK, n_ctx_train=65536, ctx="32K,2048").depths == (2048, 32768)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ctx": "16K"}, "--ctx 16384: the model was trained for 8192"),
        ({"ctx": "64"}, "--ctx 64: at least"),
        ({"ctx": "many"}, "--ctx many"),
        ({"pairs": "q9"}, "--pairs: 'q9'"),
        ({"chunks": 0}, "--chunks 0"),
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        narrowed(QUICK, n_ctx_train=8192, **flags)  # type: ignore[arg-type]


def test_depths_without_room_are_left_out_or_shortened() -> None:
    assert shortened(FULL, 40000) == FULL
    assert shortened(FULL, 9000).depths == (8192,)
    assert shortened(FULL, 4096).depths == (4096,)
    # Too little for what is scored: the refusal is about the depths that were wanted.
    assert shortened(FULL, 256) == FULL
