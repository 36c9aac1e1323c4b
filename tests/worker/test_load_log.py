"""Buffer sizes and reasons, out of llama.cpp's log; and the version check."""

import pytest

from kvserve.worker import build
from kvserve.worker.load_log import LoadLog

MIB = 2**20
INFO, WARN, ERROR, CONTINUED = 2, 3, 4, 5
LOADED = """\
load_tensors:   CPU_Mapped model buffer size =   100.00 MiB
load_tensors:        CUDA0 model buffer size =  4403.50 MiB
llama_context:  CUDA_Host  output buffer size =     8.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =     6.00 MiB
llama_kv_cache:      CUDA0 KV buffer size =    30.00 MiB
llama_memory_recurrent:      CUDA0 RS buffer size =     2.50 MiB
sched_reserve:      CUDA0 compute buffer size =   300.00 MiB
sched_reserve:  CUDA_Host compute buffer size =    10.00 MiB
sched_reserve:      CUDA0 compute buffer size =   258.50 MiB
"""


def test_adds_up_devices_and_keeps_the_last_reservation() -> None:
    log = LoadLog()
    log.feed(INFO, LOADED)
    memory = log.memory()
    assert memory.weights_bytes == 4503.5 * MIB
    assert memory.kv_bytes == 36 * MIB
    assert memory.recurrent_bytes == 2.5 * MIB
    assert memory.compute_bytes == 268.5 * MIB
    assert memory.output_bytes == 8 * MIB


def test_lines_may_come_in_parts_and_dots_between() -> None:
    log = LoadLog()
    log.feed(INFO, "load_tensors: CPU model buffer ")
    log.feed(CONTINUED, "size = 1.00 MiB\n.")
    log.feed(CONTINUED, ".\n")
    assert log.memory().weights_bytes == MIB


def test_says_why_and_whether_memory_ran_out(capsys: pytest.CaptureFixture[str]) -> None:
    log = LoadLog()
    log.feed(ERROR, "alloc_buffer: allocating 9000.00 MiB: cudaMalloc failed: out of memory\n")
    log.feed(ERROR, "init: failed to allocate buffer for kv cache\n")
    message, out_of_memory = log.failure("unknown")
    assert out_of_memory
    assert "\n" not in message
    assert "cudaMalloc failed" in message
    assert "kv cache" in capsys.readouterr().err


def test_a_bad_file_is_no_lack_of_memory() -> None:
    log = LoadLog()
    log.feed(WARN, "something harmless\n")
    log.feed(ERROR, "gguf_init_from_file: invalid magic characters: 'GARB'\n")
    assert log.failure("unknown") == (
        "gguf_init_from_file: invalid magic characters: 'GARB'",
        False,
    )


def test_silence_leaves_the_fallback() -> None:
    assert LoadLog().failure("could not load") == ("could not load", False)


@pytest.mark.parametrize("version", ["0.3.36", "0.3.36+cu124", "0.3.36.1"])
def test_tested_versions_pass(version: str) -> None:
    assert build.judge(version) is None


@pytest.mark.parametrize("version", ["0.3.35", "0.3.37", "0.4.0", "1.0", "0.3.36rc1", "dev"])
def test_other_versions_get_one_line(version: str) -> None:
    refusal = build.judge(version)
    assert refusal is not None
    assert version in refusal
    assert "\n" not in refusal
