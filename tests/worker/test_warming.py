"""What the first decodes of a context tell, with a GPU of known speed in llama.cpp's place."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from kvserve.worker.llama import Batch, warming
from kvserve.worker.llama.warming import warm_up


@dataclass
class Gpu:
    """Decodes of `n` rows take `seconds[n]`, from the third of a size on, as in CUDA's llama.cpp:
    the first one loads kernels, which takes fewer rows longer, and the second one is captured."""

    seconds: dict[int, float]
    n_seq_max: int = 8
    n_outputs: int = 16
    n_ctx: int = 4096
    n_batch: int = 512
    cannot_take_back: str | None = None
    n_window: int | None = None
    on_gpu: bool = True
    wholly_on_gpu: bool = True
    now: float = 0.0
    sizes: list[int] = field(default_factory=list)
    n_cells: int = 0
    cleared: bool = False

    @property
    def model(self) -> "Gpu":
        return self

    @property
    def vocab(self) -> SimpleNamespace:
        return SimpleNamespace(n_tokens=100)

    def decode(self, batch: Batch) -> None:
        n = batch.n_tokens
        self.sizes.append(n)
        self.n_cells += n
        assert n <= self.n_batch
        assert self.n_cells <= self.n_ctx
        assert len(batch.outputs) <= self.n_outputs
        n_same = 0
        for size in reversed(self.sizes):
            if size != n:
                break
            n_same += 1
        self.now += self.seconds.get(n, 0.02) + {1: 0.05 / n, 2: 0.06 / n}.get(n_same, 0.0)

    def cut_slot(self, slot: int, n_tokens: int) -> None:
        assert self.cannot_take_back is None
        assert slot == 0
        self.n_cells = n_tokens

    def logits(self, n_outputs: int) -> None:
        assert n_outputs == 1

    def clear(self) -> None:
        self.cleared = True


H200 = {1: 3.7, 2: 5.0, 3: 5.2, 4: 5.5, 5: 6.1, 6: 6.8, 7: 7.65, 8: 8.2, 9: 7.55}
MILLI = 1e-3


def warmed(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> dict[int, int]:
    monkeypatch.setattr(warming.time, "perf_counter", lambda: gpu.now)
    slower = warm_up(gpu)  # type: ignore[arg-type]
    assert gpu.cleared
    return slower


def table(**changed: float) -> dict[int, float]:
    changes = {int(name[1:]): value for name, value in changed.items()}
    return {n: seconds * MILLI for n, seconds in (H200 | changes).items()}


def test_numbers_of_rows_that_take_longer_than_nine_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert warmed(monkeypatch, Gpu(table())) == {8: 9}
    assert warmed(monkeypatch, Gpu(table(n9=7.0))) == {7: 9, 8: 9}
    assert warmed(monkeypatch, Gpu(table(n9=2.0))) == dict.fromkeys(range(2, 9), 9)
    assert warmed(monkeypatch, Gpu(table(n9=8.1))) == {}, "what is hardly less is noise"
    assert warmed(monkeypatch, Gpu(table(n9=9.0))) == {}


def test_each_number_of_rows_that_requests_may_have_is_decoded_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu(table(), n_seq_max=4, n_outputs=4)
    assert warmed(monkeypatch, gpu) == {}
    assert gpu.sizes == [512, 1, 2, 3, 4]
    drafting = Gpu(table(), n_seq_max=1, n_outputs=9)
    assert warmed(monkeypatch, drafting) == {}
    assert drafting.sizes == [512, *range(1, 9)]


def test_no_more_logits_are_asked_for_than_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert warmed(monkeypatch, Gpu(table(), n_outputs=8)) == {8: 9}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("n_batch", [1, 4, 8, 9])
def test_batches_are_no_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, n_batch: int, on_gpu: bool
) -> None:
    gpu = Gpu(table(), n_batch=n_batch, on_gpu=on_gpu, wholly_on_gpu=on_gpu)
    assert warmed(monkeypatch, gpu) == ({8: 9} if on_gpu and n_batch == 9 else {})


def test_a_context_hardly_larger_than_the_rows_is_not_overfilled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for n_ctx in (2, 3, 9, 10, 11, 100):
        warmed(monkeypatch, Gpu(table(), n_ctx=n_ctx))


@pytest.mark.parametrize(
    "gpu",
    [
        Gpu(table(), on_gpu=False, wholly_on_gpu=False),
        Gpu(table(), cannot_take_back="its recurrent state cannot take tokens back"),
    ],
    ids=["cpu", "recurrent"],
)
def test_where_rows_cannot_be_taken_back_or_take_long_one_is_enough(
    monkeypatch: pytest.MonkeyPatch, gpu: Gpu
) -> None:
    assert warmed(monkeypatch, gpu) == {}
    assert gpu.sizes == [512 if gpu.on_gpu else 8, 1]


@pytest.mark.parametrize("changed", [{"n_window": 512}, {"wholly_on_gpu": False}])
def test_rows_are_not_timed_where_none_may_be_added(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    gpu = Gpu(table(), **changed)  # type: ignore[arg-type]
    assert warmed(monkeypatch, gpu) == {}
    assert gpu.sizes == [512, *range(1, 9)]
