import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.worker import llama
from kvserve.worker.carry.canary import divergence
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import ExportedState, write_state
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import export_sequence, import_sequence, prove_sequence
from kvserve.worker.carry.transcode import transcode
from tests.worker.carry.conftest import Backend, decode, random_tokens, score
from tests.worker.carry.states import MEMORIES

N_TOKENS = 120
TOKENS = random_tokens(N_TOKENS + 40)


def changed(state: ExportedState, change: Callable[[np.ndarray], None]) -> ExportedState:
    """The same file with other bytes for llama.cpp."""

    def fill(out: np.ndarray) -> np.ndarray | None:
        out[:] = state.view()
        change(out)
        return state.expected

    return write_state(state.contents, state.tokens, fill)


def refusal_of(call: Callable[[], object]) -> Reason:
    with pytest.raises(CannotCarry) as refusal:
        call()
    return refusal.value.reason


@pytest.fixture(params=MEMORIES)
def path(request, small_model) -> Path:
    arch, dims = MEMORIES[request.param]
    return small_model(arch, **dims)


@pytest.mark.parametrize("pair", ["f16", "q8_0"])
def test_a_carried_sequence_goes_on_as_if_nothing_was(backend, path, pair) -> None:
    """Into another slot of another context, between the cells of a sequence that lives there."""
    old = backend.context(path, pair)
    decode(old, 0, TOKENS[:N_TOKENS])
    with export_sequence(old, 0, TOKENS[:N_TOKENS]) as state:
        new = backend.context(path, pair)
        others = random_tokens(90, seed=1)
        for begin in range(0, 90, 30):
            decode(new, 1, others[begin : begin + 30], begin)
            decode(new, 2, others[begin : begin + 30], begin)
        new.clear_slot(1)
        import_sequence(new, 3, state)
    assert new.n_cached(3) == N_TOKENS
    wanted = score(old, 0, TOKENS[N_TOKENS:], N_TOKENS)
    found = score(new, 3, TOKENS[N_TOKENS:], N_TOKENS)
    assert [int(row.argmax()) for row in wanted] == [int(row.argmax()) for row in found]
    assert max(map(divergence, wanted, found)) < 1e-5
    assert max(map(divergence, score(new, 2, others[:10], 90), score(new, 0, others[:10], 0))) > 0


@pytest.mark.parametrize("arch", ["llama", "deepseek2"])
def test_sequences_beyond_n_seq_max(backend, small_model, arch) -> None:
    """As the prefix cache keeps them: cells shared with a running sequence, and another id."""
    path = small_model(arch)
    old, new = backend.context(path), backend.context(path)
    decode(old, 0, TOKENS[:N_TOKENS])
    old.copy_slot(0, 20, 90)
    old.clear_slot(0)
    with export_sequence(old, 20, TOKENS[:91], canary=True) as state:
        assert state.expected is None
        import_sequence(new, 30, state)
        import_sequence(new, 1, state)
    new.copy_slot(30, 2, 90)
    old.copy_slot(20, 0, 90)
    wanted = score(old, 0, TOKENS[90:100], 90)
    for slot in (1, 2):
        assert max(map(divergence, wanted, score(new, slot, TOKENS[90:100], 90))) < 1e-5


@pytest.mark.parametrize("pair", ["q8_0", "q4_0"])
def test_transcoded_it_passes_the_canary(backend, path, pair) -> None:
    old = backend.context(path, "f16")
    decode(old, 0, TOKENS[:N_TOKENS])
    new = backend.context(path, pair)
    with (
        export_sequence(old, 0, TOKENS[: N_TOKENS + 1], canary=True) as state,
        transcode(state, forecast(state.layout, parse_pair(pair)), 2) as retyped,
    ):
        import_sequence(new, 0, retyped)
        assert prove_sequence(new, 0, retyped) < 0.05
        assert retyped.tokens.tolist() == TOKENS[: N_TOKENS + 1].tolist()
    assert new.n_cached(0) == old.n_cached(0) == N_TOKENS + 1


def test_without_a_canary_nothing_is_decoded(backend, small_model) -> None:
    context = backend.context(small_model("llama"))
    decode(context, 0, TOKENS[:N_TOKENS])
    for tokens in (TOKENS[:N_TOKENS], TOKENS[: N_TOKENS + 1]):
        with export_sequence(context, 0, tokens, canary=len(tokens) == N_TOKENS) as state:
            assert state.expected is None
            import_sequence(context, 1, state)
            assert prove_sequence(context, 1, state) is None
            assert context.n_cached(1) == N_TOKENS


def test_the_canary_finds_wrong_rows(backend, small_model) -> None:
    """Generated weights attend to nothing in particular: this takes wrong values of a size."""
    path = small_model("llama")
    old, new = backend.context(path), backend.context(path)
    decode(old, 0, TOKENS[:N_TOKENS])
    with export_sequence(old, 0, TOKENS[: N_TOKENS + 1], canary=True) as state:

        def poison(out: np.ndarray) -> None:
            out[-64 * 2 :].view(np.float16)[:] = np.inf

        with changed(state, poison) as other:
            import_sequence(new, 0, other)
            assert refusal_of(lambda: prove_sequence(new, 0, other)) is Reason.CANARY
    assert new.n_cached(0) == 0


def test_what_cannot_be_exported(backend, small_model) -> None:
    context = backend.context(small_model("llama"))
    assert refusal_of(lambda: export_sequence(context, 0, TOKENS[:0])) is Reason.EMPTY
    decode(context, 0, TOKENS[:N_TOKENS])
    for n in (0, N_TOKENS - 1, N_TOKENS + 2):
        assert refusal_of(lambda n=n: export_sequence(context, 0, TOKENS[:n])) is Reason.EXPORT
    context.state_layout = None
    assert refusal_of(lambda: export_sequence(context, 0, TOKENS[:N_TOKENS])) is Reason.MEMORY_CLASS


class TestImport:
    """What must not be imported leaves the slot empty, and the context sound."""

    @pytest.fixture
    def path(self, small_model) -> Path:
        return small_model("llama")

    @pytest.fixture
    def context(self, backend: Backend, path: Path) -> llama.Context:
        context = backend.context(path)
        decode(context, 0, TOKENS[:N_TOKENS])
        return context

    @pytest.fixture
    def state(self, context: llama.Context):
        with export_sequence(context, 0, TOKENS[:N_TOKENS]) as state:
            yield state

    def refused(self, context: llama.Context, state: ExportedState, reason: Reason) -> None:
        assert refusal_of(lambda: import_sequence(context, 1, state)) is reason
        assert context.n_cached(1) == 0
        decode(context, 1, TOKENS[:10])
        context.clear_slot(1)

    def test_of_another_model(self, backend, small_model, state) -> None:
        other = backend.context(small_model("llama", seed=1))
        self.refused(other, state, Reason.IDENTITY)

    def test_of_another_build(self, context, state) -> None:
        origin = replace(state.contents.origin, build="0.0.0")
        other = replace(state, contents=replace(state.contents, origin=origin))
        self.refused(context, other, Reason.IDENTITY)

    def test_of_other_types(self, backend, path, state) -> None:
        self.refused(backend.context(path, "q8_0"), state, Reason.LAYOUT)

    def test_of_another_rotation(self, backend, path, state) -> None:
        q8_0 = backend.context(path, "q8_0")
        plain = tuple(replace(part, rot_k=None) for part in q8_0.state_layout.caches)
        with transcode(state, replace(q8_0.state_layout, caches=plain), 1) as other:
            self.refused(q8_0, other, Reason.LAYOUT)

    def test_for_a_context_that_is_too_small(self, backend, path) -> None:
        large = backend.context(path, n_ctx=512)
        tokens = random_tokens(300)
        decode(large, 0, tokens)
        with export_sequence(large, 0, tokens) as state:
            self.refused(backend.context(path, n_ctx=256), state, Reason.IMPORT)

    def test_where_no_cells_are_free(self, context, backend, path, state) -> None:
        full = backend.context(path, n_ctx=256)
        decode(full, 0, random_tokens(200))
        self.refused(full, state, Reason.IMPORT)

    def test_of_other_bytes(self, context, state) -> None:
        def cut_a_layer(out: np.ndarray) -> None:
            out[8] = 2

        with changed(state, cut_a_layer) as other:
            self.refused(context, other, Reason.MALFORMED)
        other = replace(state, contents=replace(state.contents, n_cached=N_TOKENS - 1))
        self.refused(context, other, Reason.MALFORMED)

    def test_many_times_over_leaves_nothing_open(self, context, state) -> None:
        gc.collect()  # what earlier refusals still hold
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            import_sequence(context, 1, state)
            export_sequence(context, 1, TOKENS[:N_TOKENS]).close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_identity_tells_longrope_factors_apart(backend, tmp_path) -> None:
    from tests.models import write_model

    key = "llama.rope.scaling.original_context_length"
    plain = write_model(tmp_path / "plain.gguf")
    long = write_model(tmp_path / "long.gguf", extra={key: 512})

    def identity(path: Path, n_ctx: int) -> str:
        return backend.context(path, n_ctx=n_ctx).model_identity

    assert identity(plain, 512) == identity(plain, 1024)
    assert identity(long, 256) == identity(long, 512) != identity(long, 1024)
    os.utime(plain, ns=(0, 0))
    before = identity(plain, 512)
    os.utime(plain, ns=(0, 1))
    assert identity(plain, 512) != before
