"""What carrying costs a real model, beside a prefill in the same type."""

import pydoc_data.topics
from dataclasses import replace

import numpy as np
import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.worker.carry.canary import divergence
from kvserve.worker.carry.layout import forecast
from kvserve.worker.carry.memory_file import ExportedState, LogProbs, Tokens
from kvserve.worker.carry.refusal import CannotCarry, Reason
from kvserve.worker.carry.sequence import export_sequence, import_sequence, prove_sequence
from kvserve.worker.carry.transcode import transcode
from kvserve.worker.llama import Context
from tests.worker.carry.conftest import decode, score

N_PREFIX, N_SCORED = 600, 24
PAIRS = ("q8_0", "q4_0", "q8_0:q4_0")


class Gemma:
    """Gemma 3 270M, a prefix from Python's documentation, and what f16 says after it."""

    def __init__(self, backend, path: str) -> None:
        self._backend = backend
        self._path = path
        self.f16 = self.context("f16")
        text = "\n".join(pydoc_data.topics.topics[key] for key in ("assert", "calls", "class"))
        tokens = self.f16.vocab.tokenize(text, add_special=True, parse_special=False)
        self.prefix: Tokens = tokens[:N_PREFIX]
        self.next: Tokens = tokens[N_PREFIX : N_PREFIX + N_SCORED]
        assert len(self.next) == N_SCORED
        decode(self.f16, 0, self.prefix)
        self.state = export_sequence(self.f16, 0, self.prefix)
        self.reference: list[LogProbs] = score(self.f16, 0, self.next, N_PREFIX)
        self.f16.clear_slot(0)
        self.noise = self.carried(self.context("f16"), self.state)
        """Another order of cells is another order of sums, in f16 on the CPU."""

    def context(self, pair: str) -> Context:
        return self._backend.context(self._path, pair, n_ctx=1024)

    def loss(self, context: Context, slot: int) -> float:
        """Mean KLD against the f16 prefill, in nats."""
        found = score(context, slot, self.next, N_PREFIX)
        return float(
            np.mean([divergence(*rows) for rows in zip(self.reference, found, strict=True)])
        )

    def native(self, context: Context) -> float:
        decode(context, 0, self.prefix)
        loss = self.loss(context, 0)
        context.clear_slot(0)
        return loss

    def carried(self, context: Context, state: ExportedState) -> float:
        import_sequence(context, 2, state)
        loss = self.loss(context, 2)
        context.clear_slot(2)
        return loss


@pytest.fixture(scope="module")
def gemma(backend, model_path):
    gemma = Gemma(backend, model_path)
    with gemma.state:
        yield gemma


@pytest.mark.parametrize("pair", PAIRS)
def test_carried_is_no_worse_than_prefilled(gemma: Gemma, pair: str) -> None:
    context = gemma.context(pair)
    native = gemma.native(context)
    target = forecast(gemma.state.layout, parse_pair(pair))
    with transcode(gemma.state, target, 2) as state:
        carried = gemma.carried(context, state)
        assert carried <= native + gemma.noise
        with transcode(state, gemma.state.layout, 2) as back:
            assert gemma.carried(gemma.f16, back) <= 2 * (native + gemma.noise)


def test_the_canary_sings_for_sound_caches_and_not_for_others(gemma: Gemma) -> None:
    import_sequence(gemma.f16, 1, gemma.state)
    tokens = np.append(gemma.prefix, gemma.next[0])
    context = gemma.context("q8_0")
    layout = context.state_layout
    assert layout is not None
    with export_sequence(gemma.f16, 1, tokens, canary=True) as state:
        gemma.f16.clear_slot(1)
        with transcode(state, layout, 2) as sound:
            import_sequence(context, 0, sound)
            kld = prove_sequence(context, 0, sound)
            assert kld is not None
            assert kld < 0.1
        plain = tuple(replace(part, rot_k=None, rot_v=None) for part in layout.caches)
        with transcode(state, replace(layout, caches=plain), 2) as other:
            lying = replace(other, contents=replace(other.contents, layout=layout))
            import_sequence(context, 0, lying)
            with pytest.raises(CannotCarry) as refusal:
                prove_sequence(context, 0, lying)
    assert refusal.value.reason is Reason.CANARY
    assert context.n_cached(0) == 0


def test_the_noise_is_small(gemma: Gemma) -> None:
    assert gemma.noise < 0.02
