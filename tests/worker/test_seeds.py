"""A seed gives the same tokens whatever else is in the batch: the real worker, generated models.

Weights and cache are f32 and there is no flash attention: another batch rounds by less than a draw
can see. Otherwise, and with GELU, which llama.cpp looks up in a table of f16, the place of its
cells alone moves a logit by up to 0.002, which changes a draw now and then.
"""

import random
from collections.abc import Iterator

import pytest

from kvserve.ipc.messages import Loaded, Sampling, TokenPrompt
from tests.worker.conftest import Peer

pytest.importorskip("gguf")

SETTINGS = {
    "top-k": Sampling(seed=1),
    "warm": Sampling(seed=2, temperature=2.0, top_k=0),
    "top-p": Sampling(seed=3, top_k=0, top_p=0.9),
    "min-p": Sampling(seed=4, top_k=0, min_p=0.05),
    "typical": Sampling(seed=5, top_k=0, typical_p=0.8),
    "XTC": Sampling(seed=6, xtc_probability=0.5, xtc_threshold=0.02),
    "DRY": Sampling(seed=7, dry_multiplier=0.8),
    "penalties": Sampling(seed=8, repeat_penalty=1.2, frequency_penalty=0.5, presence_penalty=0.5),
    "mirostat": Sampling(seed=9, mirostat=1),
    "mirostat 2": Sampling(seed=10, mirostat=2),
}
N_ANSWER = 25
PROMPT = TokenPrompt(tuple(random.Random(1).choices(range(5, 280), k=30)))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models import write_model

    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "qwen35"):
        write_model(folder / arch, arch, weight_type="F32", n_layer=4, window=64, seed=3)
    return {arch: str(folder / arch) for arch in ("llama", "qwen35")}


@pytest.fixture(scope="module", params=["llama", "qwen35"])
def worker(request, worker_factory, load_message, models) -> Iterator[Peer]:
    peer = worker_factory.start()
    exact = {"type_k": "f32", "type_v": "f32", "flash_attn": False}
    load = load_message(model_path=models[request.param], n_seq_max=6, **exact)
    assert isinstance(peer.load(load), Loaded)
    yield peer
    peer.process.kill()


def ask(worker: Peer, sampling: Sampling, **fields: object) -> int:
    usual = {"max_tokens": N_ANSWER, "ignore_eos": True}
    return worker.ask(PROMPT, sampling, **(usual | fields))


def test_alone_and_among_others(worker: Peer) -> None:
    alone = [worker.finish(ask(worker, one))[0].tokens for one in SETTINGS.values()]
    noise = random.Random(3)
    others = [
        worker.ask(
            TokenPrompt(tuple(noise.choices(range(5, 280), k=noise.randint(5, 60)))),
            Sampling(seed=100 + n),
            max_tokens=40,
        )
        for n in range(8)
    ]
    asked = [ask(worker, one) for one in reversed(SETTINGS.values())]
    together = [answer.tokens for answer in worker.finish(*asked)][::-1]
    assert dict(zip(SETTINGS, together, strict=True)) == dict(zip(SETTINGS, alone, strict=True))
    worker.finish(*others)


def test_another_seed_is_another_answer(worker: Peer) -> None:
    answers = {tuple(worker.finish(ask(worker, Sampling(seed=n)))[0].tokens) for n in range(4)}
    assert len(answers) == 4


@pytest.mark.parametrize("name", [name for name in SETTINGS if "mirostat" not in name])
def test_a_paused_request_goes_on_with_its_seed(worker: Peer, name: str) -> None:
    whole = worker.finish(ask(worker, SETTINGS[name]))[0].tokens
    for n in (1, N_ANSWER // 2, N_ANSWER - 1):
        rest = worker.finish(ask(worker, SETTINGS[name], resume=tuple(whole[:n])))[0]
        assert whole[:n] + rest.tokens == whole
