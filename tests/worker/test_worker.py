"""The real worker with a real small model, as its own process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kvserve.ipc.messages import (
    Cancel,
    ChatMessage,
    ChatPrompt,
    Failed,
    Generate,
    Hello,
    Loaded,
    LoadFailed,
    NeedsContext,
    Pause,
    Paused,
    Progress,
    Sampling,
    Shutdown,
    Started,
    Step,
    TextPrompt,
    Tokenized,
    TokenPrompt,
)

# Patterns that leave the model no doubt: batches of different sizes use different kernels, and
# where two tokens are nearly equal, rounding would decide.
PROMPTS = (
    "1, 2, 3, 4, 5, 6, 7,",
    "1 2 3 4 5 6 7 8 9 10 11",
    "5, 10, 15, 20, 25,",
    "abc abc abc abc abc abc abc abc",
    "x = 1\nx = 1\nx = 1\nx = 1\nx = 1\nx =",
)
# Three tokens that are far ahead of all others and near each other: a real draw at every step.
COIN = Sampling(
    temperature=50.0, top_k=40, seed=11, logit_bias={500: 3000.0, 600: 3000.0, 700: 3000.0}
)


@pytest.fixture(scope="module")
def worker(worker_factory, load_message) -> Iterator[object]:
    """One loaded worker for all tests that leave it as they found it: 512 cells, 4 slots."""
    peer = worker_factory.start(arguments=("--parent", str(os.getpid())))
    peer.loaded = peer.load(load_message())
    yield peer
    peer.send(Shutdown())
    while peer.receive() is not None:
        pass
    assert peer.process.wait(10) == 0


def test_loaded_tells_what_was_allocated(worker) -> None:
    loaded = worker.loaded
    assert isinstance(loaded, Loaded)
    assert (loaded.n_ctx, loaded.n_ctx_train, loaded.n_vocab) == (512, 32768, 262144)
    assert loaded.template == "default:gemma"
    assert 200 * 2**20 < loaded.memory.weights_bytes < 400 * 2**20
    # 3 layers with all 512 cells and 15 sliding ones, each 256 K and 256 V elements of 2 bytes.
    assert loaded.memory.kv_bytes >= 3 * 512 * 512 * 2
    assert loaded.memory.compute_bytes > 0
    assert loaded.memory.output_bytes > 0


def test_concurrent_greedy_answers_equal_those_of_each_alone(worker) -> None:
    alone = [worker.complete(prompt, max_tokens=12) for prompt in PROMPTS]
    n_started = len(worker.started)
    requests = [worker.ask(prompt, max_tokens=12) for prompt in PROMPTS]
    together = worker.finish(*requests)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert worker.started[n_started:] == requests
    assert all(answer.n_prompt == answer.end.n_prompt_tokens for answer in together)
    assert worker.steps[-1].n_cells_used == 0


def test_a_seed_gives_the_same_answer_again(worker) -> None:
    first = worker.complete(PROMPTS[0], sampling=COIN, max_tokens=24)
    assert set(first.tokens) == {500, 600, 700}
    assert worker.complete(PROMPTS[0], sampling=COIN, max_tokens=24).tokens == first.tokens
    other = Sampling(temperature=50.0, top_k=40, seed=12, logit_bias=COIN.logit_bias)
    assert worker.complete(PROMPTS[0], sampling=other, max_tokens=24).tokens != first.tokens


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), COIN], ids=["greedy", "seeded"])
def test_resumed_answers_go_on_as_if_nothing_had_happened(worker, sampling: Sampling) -> None:
    usual = {"sampling": sampling, "max_tokens": 12, "stop": ("nowhere",)}
    whole = worker.complete(PROMPTS[1], **usual)
    for n in (1, 7, 11):
        rest = worker.complete(PROMPTS[1], resume=tuple(whole.tokens[:n]), **usual)
        assert rest.tokens == whole.tokens[n:]
        assert whole.text.endswith(rest.text)
        expected = replace(whole.end, id=rest.end.id, n_cached_tokens=rest.end.n_cached_tokens)
        assert rest.end == expected


def test_cancel_frees_the_cells_and_sends_nothing_more(worker) -> None:
    request = worker.ask(PROMPTS[1], ignore_eos=True)
    waiting = [worker.ask(PROMPTS[0], ignore_eos=True) for _ in range(5)]
    while worker.answers[request].text == "":
        worker.receive()
    for one in (request, *waiting):
        worker.cancel(one)
    n_steps = len(worker.steps)
    after = worker.complete(PROMPTS[0], max_tokens=2)
    assert after.end.reason == "length"
    assert worker.steps[-1].n_cells_used == 0
    alone = [step for step in worker.steps[n_steps:] if len(step.deltas) == 1]
    assert alone[-1].deltas[0].id == after.end.id


def test_stop_strings_cut_the_text(worker) -> None:
    answer = worker.complete(PROMPTS[2], max_tokens=12, stop=(", 35", "nowhere"))
    assert answer.text == " 30"
    assert (answer.end.reason, answer.end.stop_text) == ("stop", ", 35")


def test_min_tokens_and_ignore_eos_go_past_the_end_token(worker) -> None:
    chat = ChatPrompt((ChatMessage("user", "Say hello"),))
    bias = Sampling(temperature=0.0, logit_bias={1: 100.0})
    assert worker.complete(chat, sampling=bias, max_tokens=8).tokens == [1]
    answer = worker.complete(chat, sampling=bias, max_tokens=8, min_tokens=3)
    assert len(answer.tokens) == 4
    assert (answer.tokens[-1], answer.end.reason) == (1, "stop")
    answer = worker.complete(chat, sampling=bias, max_tokens=8, ignore_eos=True)
    assert (len(answer.tokens), answer.end.reason) == (8, "length")


def test_chat_prompts_get_one_bos(worker) -> None:
    chat = worker.complete(ChatPrompt((ChatMessage("user", "Hi"),)), max_tokens=1)
    # <bos> <start_of_turn> user \n Hi <end_of_turn> \n <start_of_turn> model \n
    assert chat.n_prompt == 10


def test_special_tokens_in_a_text_prompt_are_text(worker) -> None:
    plain = worker.complete(TextPrompt("<end_of_turn>"), max_tokens=1)
    assert plain.n_prompt > 2
    assert worker.complete(TokenPrompt((2, 106)), max_tokens=1).n_prompt == 2


def test_an_empty_prompt_is_the_bos_token(worker) -> None:
    assert worker.complete("", max_tokens=1).n_prompt == 1
    assert worker.complete(TokenPrompt(()), max_tokens=1).n_prompt == 1


@pytest.mark.parametrize(
    ("prompt", "fields", "param"),
    [
        (TokenPrompt((2, 262144)), {}, "prompt"),
        (TokenPrompt((-1,)), {}, "prompt"),
        (TextPrompt("a"), {"resume": (262144,)}, "resume"),
        (TextPrompt("a"), {"sampling": Sampling(logit_bias={-5: 1.0})}, "logit_bias"),
    ],
)
def test_bad_token_ids_fail_that_request_alone(worker, prompt, fields, param: str) -> None:
    good = worker.ask(PROMPTS[0], max_tokens=4)
    bad = worker.ask(prompt, **fields)
    answer, refused = worker.finish(good, bad)
    assert answer.end.n_generated_tokens == 4
    assert isinstance(refused.refusal, Failed)
    assert (refused.refusal.code, refused.refusal.param) == ("invalid_request", param)


def test_a_prompt_that_does_not_fit_names_its_length(worker) -> None:
    assert isinstance(worker.complete(TokenPrompt((5,) * 512)).refusal, NeedsContext)
    resumed = worker.complete(TokenPrompt((5,) * 500), resume=(5,) * 60, may_grow=True)
    assert resumed.refusal.n_tokens == 560
    last = worker.complete(TokenPrompt((5,) * 510), ignore_eos=True)
    assert (last.end.reason, last.end.n_generated_tokens) == ("length", 2)


def test_a_long_prompt_shows_signs_of_life_and_lets_others_run(worker) -> None:
    running = worker.ask(PROMPTS[0], ignore_eos=True)
    while not worker.answers[running].text:
        worker.receive()
    n_steps = len(worker.steps)
    long = worker.ask(TokenPrompt((5,) * 300), max_tokens=1)
    worker.finish(long)
    prefill = [step for step in worker.steps[n_steps:] if step.n_prefilled]
    assert len(prefill) >= 3
    assert sum(step.n_prefilled for step in prefill) == 300
    assert all(step.deltas for step in prefill)
    worker.cancel(running)


def test_preemption_changes_no_answer(workers, load_message) -> None:
    """3 sequences of some 110 tokens ask for more than 256 cells, also where a slow machine lets
    the first one run ahead."""
    peer = workers.start()
    assert isinstance(peer.load(load_message(n_ctx=256)), Loaded)
    prompts = [
        ", ".join(map(str, range(1, 21))) + ",",
        "go stop " * 36 + "go stop",
        ", ".join(map(str, range(10, 180, 10))) + ",",
    ]
    usual = {"max_tokens": 28, "ignore_eos": True}
    together = peer.finish(*[peer.ask(prompt, **usual) for prompt in prompts])
    assert max(step.n_cells_used for step in peer.steps) <= 256
    assert sum(step.n_prefilled for step in peer.steps) > sum(a.n_prompt for a in together)
    for prompt, answer in zip(prompts, together, strict=True):
        assert answer.end.n_generated_tokens == 28
        assert peer.complete(prompt, **usual).text == answer.text


def test_pause_kill_and_resume_in_a_new_worker(workers, load_message, worker) -> None:
    first = workers.start()
    first.load(load_message())
    request = first.ask(PROMPTS[1], max_tokens=20)
    while len(first.answers[request].tokens) < 7:
        first.receive()
    first.send(Pause())
    first.until(Paused)
    first.ask(PROMPTS[0])
    first.sock.settimeout(0.2)
    with pytest.raises(TimeoutError):
        first.receive()
    first.process.kill()

    second = workers.start()
    second.load(load_message())
    before = first.answers[request]
    after = second.complete(PROMPTS[1], max_tokens=20, resume=tuple(before.tokens))
    whole = worker.complete(PROMPTS[1], max_tokens=20)
    assert before.text + after.text == whole.text
    assert before.tokens + after.tokens == whole.tokens
    assert after.end.n_generated_tokens == 20
    assert after.end.n_prompt_tokens == whole.end.n_prompt_tokens


def test_loads_quantized_caches_with_experts_on_the_host(workers, load_message, worker) -> None:
    peer = workers.start()
    peer.send(load_message(type_k="q8_0", type_v="q4_0", n_cpu_moe=2, tensor_split=(1.0,)))
    assert peer.until(Hello).engine_version.startswith("0.3.36")
    fractions = []
    while isinstance(loaded := peer.receive(), Progress):
        fractions.append(loaded.fraction)
    assert isinstance(loaded, Loaded)
    assert fractions == sorted(fractions)
    assert 0 < len(fractions) <= 20
    assert fractions[-1] == 1.0
    expected = worker.loaded.memory.kv_bytes * (34 + 18) / 128
    assert loaded.memory.kv_bytes == pytest.approx(expected, rel=0.01)
    assert peer.complete(PROMPTS[0], max_tokens=2).end.reason == "length"


def test_a_request_that_waits_is_told_to_have_been_read(worker) -> None:
    running = [worker.ask(PROMPTS[0], max_tokens=24, ignore_eos=True) for _ in range(4)]
    for _ in running:
        worker.until(Started)
    waiting = worker.ask(PROMPTS[1], max_tokens=1)
    while worker.until(Tokenized).id != waiting:
        pass
    assert waiting not in worker.started
    worker.finish(*running, waiting)


def test_ends_with_its_socket_while_it_works(workers, load_message) -> None:
    peer = workers.start()
    peer.load(load_message())
    peer.ask(TokenPrompt((5,) * 400), ignore_eos=True)
    peer.until(Started)
    peer.close()
    assert peer.process.wait(10) == 0


def test_ends_with_its_parent(workers, load_message) -> None:
    """A daemon that is killed outright takes its worker along, although the socket stays open."""
    code = (
        "import os, subprocess, sys\n"
        "fd = int(sys.argv[1])\n"
        "child = subprocess.Popen([sys.executable, '-m', 'kvserve.worker', '--fd', str(fd),\n"
        "    '--parent', str(os.getpid())], pass_fds=(fd,))\n"
        "child.wait()\n"
    )
    peer = workers.start_code(code)
    peer.send(load_message())
    pid = peer.until(Hello).pid
    assert pid != peer.process.pid
    os.kill(peer.process.pid, signal.SIGKILL)
    while peer.receive() is not None:
        pass


def test_a_parent_that_is_gone_already_is_noticed(workers) -> None:
    peer = workers.start(arguments=("--parent", "1"))
    assert peer.receive() is None
    assert peer.process.wait(10) == 0


@pytest.mark.parametrize("content", [b"GARBAGE " * 100, b"GGUF\x03\x00\x00\x00", None])
def test_a_bad_file_is_refused_in_one_line(workers, load_message, tmp_path, content) -> None:
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    peer = workers.start()
    failed = peer.load(load_message(model_path=str(path)))
    assert isinstance(failed, LoadFailed)
    assert failed.message
    assert "\n" not in failed.message
    assert not failed.out_of_memory
    assert peer.receive() is None
    assert peer.process.wait(10) == 1


def test_a_cache_type_that_needs_flash_attention_is_refused(workers, load_message) -> None:
    peer = workers.start()
    failed = peer.load(load_message(type_v="q8_0", flash_attn=False))
    assert isinstance(failed, LoadFailed)
    assert "V cache" in failed.message


def test_wrong_arguments_end_it(source_environment) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvserve.worker"],
        capture_output=True,
        check=False,
        env=source_environment,
        timeout=30,
    )
    assert done.returncode == 2


def test_duplicate_and_unknown_ids_do_no_harm(worker) -> None:
    worker.send(Cancel(10**9))
    request = worker.ask(PROMPTS[0], max_tokens=8)
    worker.until(Step)
    worker.send(Generate(request, TextPrompt(PROMPTS[0]), Sampling(temperature=0.0), max_tokens=8))
    assert len(worker.finish(request)[0].tokens) == 8


def test_an_answer_that_may_grow_stops_at_the_contexts_end_and_goes_on(workers, load_message):
    first = workers.start()
    first.load(load_message(n_ctx=256))
    usual = {"max_tokens": 60, "ignore_eos": True}
    prompt = TokenPrompt((2, *range(1000, 1219)))
    request = first.ask(prompt, may_grow=True, **usual)
    needs = first.until(NeedsContext)
    answer = first.answers[request]
    assert needs == NeedsContext(request, 256)
    assert len(answer.tokens) == 36
    again = first.complete(prompt, resume=tuple(answer.tokens), **usual)
    assert (again.end.reason, again.tokens) == ("length", [])

    second = workers.start()
    second.load(load_message(n_ctx=512))
    rest = second.complete(prompt, resume=tuple(answer.tokens), may_grow=True, **usual)
    assert (rest.end.reason, rest.end.n_generated_tokens) == ("length", 60)
    assert len(rest.tokens) == 24
