"""The measuring process on small real files: figures, refusals, and files that are none."""

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from kvserve.ipc.measuring import MeasureAnswer, Measured, MeasureRequest, Refused
from kvserve.ipc.messages import Load
from kvserve.worker.buffer_log import BufferLog
from tests.models import write_model

MIB = 2**20
_decoder = msgspec.json.Decoder(MeasureAnswer)


def load(path: Path, pair: str = "f16", n_ctx: int = 512, *, flash_attn: bool = True) -> Load:
    return Load(str(path), pair, pair, n_ctx, 2, 512, 512, 0, 0, flash_attn, 1, 1)


def ask(*launches: Load) -> list[MeasureAnswer]:
    done = run(msgspec.json.encode(MeasureRequest(launches)))
    assert done.returncode == 0, done.stderr
    return [_decoder.decode(line) for line in done.stdout.splitlines()]


def run(request: bytes) -> "subprocess.CompletedProcess[bytes]":
    argv = [sys.executable, "-m", "kvserve.worker.measure"]
    return subprocess.run(argv, input=request, capture_output=True, timeout=60, check=False)


def test_each_launch_gets_its_figures(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", n_layer=4, n_embd=256, n_head=4, n_head_kv=2)
    short, long = ask(load(path), load(path, n_ctx=1024))
    assert isinstance(short, Measured)
    assert isinstance(long, Measured)
    [cpu] = short.buffers
    assert cpu.device == "CPU"
    assert cpu.kv_bytes == 4 * 2 * 128 * 512 * 2
    assert cpu.compute_bytes > 0
    assert long.buffers[0].kv_bytes == 2 * cpu.kv_bytes


def test_recurrent_state_is_told(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "mamba2")
    [answer] = ask(load(path))
    assert isinstance(answer, Measured)
    assert answer.buffers[0].recurrent_bytes > 0


def test_a_refused_launch_has_its_own_reason_and_the_others_go_on(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    answers = ask(load(path, "q8_0", flash_attn=False), load(path), load(path, "q8_0"))
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert isinstance(answers[0], Refused)
    assert "flash_attn" in answers[0].reason
    assert "\n" not in answers[0].reason
    assert isinstance(answers[1], Measured)
    assert isinstance(answers[2], Measured)


def test_a_garbage_file_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + bytes(range(256)) * 20)
    good = write_model(tmp_path / "m.gguf")
    first, second, third = ask(load(garbage), load(tmp_path / "none.gguf"), load(good))
    assert isinstance(first, Refused)
    assert isinstance(second, Refused)
    assert "no model file" in second.reason
    assert isinstance(third, Measured)


@pytest.mark.parametrize("request_", [b"", b"nonsense", b'{"launches": 3}'])
def test_what_is_no_request_ends_with_one_line(request_: bytes) -> None:
    done = run(request_)
    assert done.returncode == 1
    assert done.stdout == b""
    assert len(done.stderr.splitlines()) == 1


def test_a_type_that_is_none_ends_with_one_line(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    done = run(msgspec.json.encode(MeasureRequest((load(path, "q3_x"),))))
    assert done.returncode == 1
    assert b"q3_x" in done.stderr.splitlines()[-1]


def test_the_log_of_a_split_context_is_shared_out_by_layers() -> None:
    log = BufferLog()
    for text in (
        "llama_kv_cache: layer   0: dev = CPU\nllama_kv_cache: layer   1: dev = CU",
        "DA0\nllama_kv_cache: layer   2: dev = CUDA0\n",
        "llama_kv_cache:      CUDA0 KV buffer size =     0.00 MiB\n",
        "llama_kv_cache: size =   30.00 MiB (   512 cells,   3 layers,  1/1 seqs)\n",
        "llama_context:  CUDA_Host  output buffer size =     0.50 MiB\n",
        "llama_memory_recurrent:      CUDA0 RS buffer size =     2.00 MiB\n",
        "sched_reserve:      CUDA0 compute buffer size =   300.00 MiB\n",
        "sched_reserve:      CUDA0 compute buffer size =   258.50 MiB\n",
    ):
        log.feed(text)
    cpu, cuda, pinned = log.buffers()
    assert (cpu.device, cpu.kv_bytes) == ("CPU", 10 * MIB)
    assert (cuda.device, cuda.kv_bytes, cuda.recurrent_bytes) == ("CUDA0", 20 * MIB, 2 * MIB)
    assert cuda.compute_bytes == 258.5 * MIB
    assert (pinned.device, pinned.output_bytes) == ("CUDA_Host", MIB // 2)
