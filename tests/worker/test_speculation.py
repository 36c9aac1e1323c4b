"""Speculation changes no answer: the real worker, generated models and the small real one.

In the generated models weights and cache are f32 and there is no flash attention, since a wider
batch rounds otherwise elsewhere (`test_seeds`). Every proposal is checked there, and half of them
are spoilt, so that much is accepted and much is taken back.
"""

import random
from collections.abc import Callable, Iterator

import pytest

from kvserve.ipc.messages import (
    Grammar,
    Load,
    Loaded,
    LoadFailed,
    Pause,
    Paused,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from tests.worker.conftest import GREEDY, Answer, Peer, Workers
from tests.worker.test_seeds import SETTINGS

pytest.importorskip("gguf")

EAGER = """
import queue, socket, sys
from kvserve.ipc.channel import WorkerChannel
from kvserve.worker.reader import start_reader
from kvserve.worker.session import serve
from kvserve.worker.speculation.speculator import Speculator

class Eager(Speculator):
    '''Has every proposal checked, spoilt at its second or third token every other time.'''

    def __init__(self, proposer, *bounds, **others):
        super().__init__(proposer, *bounds, **others)
        if proposer.batched:  # random weights are sure of nothing
            proposer.second.least_likely = 0.0

    def _choose(self, asks):
        drafts, left = {}, self._n_all
        for request, proposal in self._proposals.items():
            draft = list(proposal.tokens)
            if (self._turn + request) % 2 and len(draft) > 2:
                draft[1 + self._turn % 2] ^= 1
            drafts[request] = tuple(draft[:left])
            left -= len(drafts[request])
        return drafts

    def propose(self, asks):
        self._ledger.balance_seconds = 1e9
        return super().propose(asks)

channel = WorkerChannel(socket.socket(fileno=int(sys.argv[1])))
inbox = queue.SimpleQueue()
start_reader(channel, inbox.put)
serve(channel, inbox, Eager)
"""
SPECULATE = {"speculate": "ngram", "n_draft": 12, "n_draft_each": 5}
EXACT = {"type_k": "f32", "type_v": "f32", "flash_attn": False}
N_ANSWER = 60


def repetitive(seed: int, n: int = 90) -> TokenPrompt:
    """Tokens in which every few have been there before."""
    noise = random.Random(seed)
    parts = [noise.choices(range(5, 280), k=noise.randint(4, 12)) for _ in range(3)]
    tokens: list[int] = []
    while len(tokens) < n:
        tokens += noise.choice(parts)
    return TokenPrompt(tuple(tokens[:n]))


ASKS: dict[str, tuple[Sampling, dict[str, object]]] = {
    "greedy": (GREEDY, {}),
    "greedy, penalties": (Sampling(temperature=0.0, frequency_penalty=0.4), {}),
    "biased": (Sampling(temperature=0.0, logit_bias={7: 2.0, 9: -4.0}), {}),
    "ends": (GREEDY, {"ignore_eos": False, "min_tokens": 20}),
    "logprobs": (Sampling(seed=3, temperature=0.3), {"n_logprobs": 3}),
    "stop": (GREEDY, {"stop": ("\n", "ing", "to")}),
    "JSON": (GREEDY, {"grammar": Grammar("json_object")}),
    "regex": (Sampling(seed=5), {"grammar": Grammar("regex", "(the|and|ing){40,50}")}),
    "list": (GREEDY, {"grammar": Grammar("regex", "(abc, ){30}")}),
    **{name: (one, {}) for name, one in SETTINGS.items()},
    "cold": (Sampling(seed=4, temperature=0.05), {}),
    # A real draw among three at every step, which rounding does not decide.
    "coin": (
        Sampling(temperature=8.0, seed=11, logit_bias=dict.fromkeys((70, 71, 72), 100.0)),
        {},
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models import write_model

    folder = tmp_path_factory.mktemp("models")
    for arch in ("llama", "gemma3", "qwen35"):
        write_model(folder / arch, arch, weight_type="F32", n_layer=4, window=64, seed=3)
    return {arch: str(folder / arch) for arch in ("llama", "gemma3", "qwen35")}


Start = Callable[..., Peer]


@pytest.fixture
def start(workers: Workers, load_message: Callable[..., Load], models: dict[str, str]) -> Start:
    def begin(arch: str, *, eager: bool, **fields: object) -> Peer:
        usual = {"model_path": models[arch], "n_seq_max": 6, **EXACT, **SPECULATE}
        if not eager:
            usual["speculate"] = "off"
        peer = workers.start_code(EAGER)
        assert isinstance(peer.load(load_message(**(usual | fields))), Loaded)
        return peer

    return begin


def ask(peer: Peer, name: str, seed: int = 1, n_ask: int = 90, **more: object) -> int:
    sampling, fields = ASKS[name]
    usual = {"max_tokens": N_ANSWER, "ignore_eos": True}
    return peer.ask(repetitive(seed, n_ask), sampling, **(usual | fields | more))


def gist(answer: Answer) -> object:
    end = answer.end
    likelihoods = [
        (one.drawn.token, round(one.drawn.logprob, 3), [top.token for top in one.top])
        for one in answer.logprobs
    ]
    return answer.text, answer.tokens, likelihoods, end and (end.reason, end.stop_text)


def counts(peer: Peer) -> tuple[int, int]:
    return sum(s.n_drafted for s in peer.steps), sum(s.n_accepted for s in peer.steps)


def test_every_kind_of_request_gets_the_same_answer(start: Start) -> None:
    plain, eager = start("llama", eager=False), start("llama", eager=True)
    alone = [gist(plain.finish(ask(plain, name))[0]) for name in ASKS]
    quick = [gist(eager.finish(ask(eager, name))[0]) for name in ASKS]
    assert dict(zip(ASKS, quick, strict=True)) == dict(zip(ASKS, alone, strict=True))
    together = eager.finish(*[ask(eager, name) for name in reversed(ASKS)])
    assert [gist(answer) for answer in reversed(together)] == alone
    n_drafted, n_accepted = counts(eager)
    assert n_accepted > 300
    assert n_drafted - n_accepted > 300
    assert counts(plain) == (0, 0)
    for step in eager.steps:
        assert step.n_accepted <= step.n_drafted <= SPECULATE["n_draft"]


def test_a_window_keeps_what_it_needs(start: Start) -> None:
    """Every answer is longer than the window of 64 tokens, and prompts arrive meanwhile."""
    plain, eager = (start("gemma3", eager=eager, n_ctx=1024) for eager in (False, True))
    answers = []
    for peer in (plain, eager):
        asked = [ask(peer, "coin", seed=n, max_tokens=150) for n in range(10)]
        answers.append([gist(answer) for answer in peer.finish(*asked)])
    assert answers[0] == answers[1]
    n_drafted, n_accepted = counts(eager)
    assert n_accepted > 100
    assert n_drafted - n_accepted > 100


def test_small_micro_batches_of_a_window(start: Start) -> None:
    fields = {"n_ctx": 1024, "n_batch": 128, "n_ubatch": 32}
    plain, eager = (start("gemma3", eager=eager, **fields) for eager in (False, True))
    answers = []
    for peer in (plain, eager):
        asked = [ask(peer, "coin", seed=n, max_tokens=120) for n in range(10)]
        answers.append([gist(answer) for answer in peer.finish(*asked)])
    assert answers[0] == answers[1]
    assert counts(eager)[1] > 50


def test_preempted_requests_and_shared_beginnings(start: Start) -> None:
    fields = {"n_ctx": 512, "cache_ram_bytes": 2**26}
    plain, eager = (start("llama", eager=eager, **fields) for eager in (False, True))
    answers = []
    for peer in (plain, eager):
        asked = [
            ask(peer, ("greedy", "top-k", "cold")[n % 3], seed=n % 3, max_tokens=150)
            for n in range(12)
        ]
        answers.append([gist(answer) for answer in peer.finish(*asked)])
        assert max(step.n_cells_used for step in peer.steps) <= 512
        assert peer.steps[-1].n_cells_used == 0
    assert answers[0] == answers[1]
    assert counts(eager)[1] > 100


def test_an_answer_ends_where_the_context_does(start: Start) -> None:
    peer = start("llama", eager=True, n_ctx=256)
    answer = peer.complete(repetitive(1), max_tokens=None, ignore_eos=True)
    assert answer.end is not None
    assert (answer.end.reason, len(answer.tokens)) == ("length", 256 - 90)
    grown = peer.complete(repetitive(1), max_tokens=None, ignore_eos=True, may_grow=True)
    assert grown.refusal is not None
    assert grown.refusal.n_tokens == 256
    assert grown.tokens[: 256 - 90] == answer.tokens


def test_carried_over_a_reload(start: Start, load_message, models, workers) -> None:
    readable = {"flash_attn": True}  # otherwise states cannot be exported
    whole = start("llama", eager=False, **readable)
    answers = whole.finish(*[ask(whole, "coin", seed=n) for n in range(3)])
    expected = [answer.tokens for answer in answers]
    first = start("llama", eager=True, **readable)
    asked = [ask(first, "coin", seed=n) for n in range(3)]
    while min(len(first.answers[request].tokens) for request in asked) < 15:
        first.receive()
    first.send(Pause(export_bytes=2**26))
    paused = first.until(Paused)
    assert len(paused.states) == 3
    files = tuple((f"/proc/{first.process.pid}/fd/{state.fd}",) for state in paused.states)
    second = start("llama", eager=True, carried=files, **readable)
    begun = [tuple(first.answers[request].tokens) for request in asked]
    rest = [ask(second, "coin", seed=n, resume=begun[n]) for n in range(3)]
    answers = second.finish(*rest)
    assert [[*begun[n], *answer.tokens] for n, answer in enumerate(answers)] == expected
    assert all(answer.end.n_cached_tokens == 90 for answer in answers)
    assert counts(second)[1] > 0


def test_a_recurrent_model_says_why_not(workers, load_message, models) -> None:
    peer = workers.start()
    loaded = peer.load(load_message(model_path=models["qwen35"], **SPECULATE))
    assert loaded.speculation == "off: its recurrent state cannot take tokens back"
    peer.complete(repetitive(1), max_tokens=30, ignore_eos=True)
    assert counts(peer) == (0, 0)


@pytest.fixture(scope="module")
def drafts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from tests.models import write_model

    folder = tmp_path_factory.mktemp("drafts")
    small = {"weight_type": "F32", "n_layer": 2, "window": 64}
    write_model(folder / "other", "llama", seed=8, **small)
    renamed = (folder / "other").read_bytes().replace(b"<|eot_id|>", b"<|eot_ie|>")
    (folder / "renamed").write_bytes(renamed)
    write_model(folder / "none", "llama", vocab=None, n_vocab=288, **small)
    write_model(folder / "recurrent", "qwen35", **small)
    return {name: str(folder / name) for name in ("other", "renamed", "none", "recurrent")}


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_draft_model_changes_no_answer(start: Start, models, drafts, arch: str) -> None:
    def draft(path: str) -> dict[str, object]:
        return {"speculate": "draft", "draft_path": path, "n_ctx": 1024}

    plain = start(arch, eager=False, n_ctx=1024)
    twin = start(arch, eager=True, **draft(models[arch]))
    other = start(arch, eager=True, **draft(drafts["other"]))
    # GELU, looked up in a table of f16, would decide between near tokens.
    names = ("coin",) if arch == "gemma3" else ("greedy", "top-k", "cold", "logprobs", "JSON")
    answers = []
    for peer in (plain, twin, other):
        asked = [
            ask(peer, names[n % len(names)], seed=n, n_ask=200 if n % 2 else 90, max_tokens=50)
            for n in range(8)
        ]
        answers.append([gist(answer) for answer in peer.finish(*asked)])
    assert answers[0] == answers[1] == answers[2]
    (n_twin, right_twin), (n_other, right_other) = counts(twin), counts(other)
    assert min(n_other, n_twin) > 200
    if arch == "llama":
        assert right_twin > 100 > right_other


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("renamed", "its token 297 is '<|eot_ie|>', not '<|eot_id|>'"),
        ("none", "does not suit the model: its vocabulary is of another type"),
        ("recurrent", "does not suit the model: its recurrent state cannot take tokens back"),
        ("missing", "draft model: no model file at"),
    ],
)
def test_a_draft_model_that_does_not_suit(
    workers, load_message, models, drafts, name: str, words: str
) -> None:
    path = drafts.get(name, "/nowhere")
    fields = {**SPECULATE, "speculate": "draft", "draft_path": path}
    failed = workers.start().load(load_message(model_path=models["llama"], **fields))
    assert isinstance(failed, LoadFailed)
    assert words in failed.message


@pytest.fixture(scope="module")
def real(worker_factory, load_message) -> Iterator[Peer]:
    peer = worker_factory.start()
    loaded = peer.load(load_message(**SPECULATE))
    assert loaded.speculation == "ngram"
    yield peer
    peer.process.kill()


def test_the_real_model_copies_in_few_steps(real: Peer) -> None:
    prompt = TextPrompt("abc abc abc abc abc abc abc abc")
    answer = real.complete(prompt, max_tokens=150, ignore_eos=True)
    assert set(answer.text.split()) == {"abc"}
    n_drafted, n_accepted = counts(real)
    assert n_accepted > 0
    assert n_accepted >= 0.9 * n_drafted
