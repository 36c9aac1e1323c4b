"""Room for measurements: two contexts are counted, layers leave as at `start`, refusals help."""

import re
from dataclasses import replace

import pytest

from kvserve.core.dtypes import parse_pair
from kvserve.core.eval_room import Need, longest_context, place, whole_launch
from kvserve.core.machine import Backend, Machine
from kvserve.core.plan import Request, Task
from kvserve.errors import DoesNotFit
from kvserve.units import GIB
from tests.core.shapes import llama3_8b, machine, plain

ASKED = Request(n_ctx=4096, n_ubatch=512)
TWO = Need(8192, n_contexts=2)


def test_with_room_all_layers_are_on_the_gpu_at_f16_whatever_the_floor() -> None:
    asked = replace(ASKED, task=Task.CLASSIFY, floor=parse_pair("q8_0"), n_parallel=8)
    launch = place(llama3_8b(), machine(24.0, total_gib=24), asked, TWO)
    assert (launch.backend, launch.n_gpu_layers, launch.n_ctx) == (Backend.CUDA, 33, 8192)
    assert str(launch.pair) == "f16:f16"
    assert launch.n_parallel == 1


def test_the_second_context_costs_layers() -> None:
    one = place(llama3_8b(), machine(7.0), ASKED, Need(8192))
    two = place(llama3_8b(), machine(7.0), ASKED, TWO)
    assert one.n_gpu_layers == 33
    assert 0 < two.n_gpu_layers < 33


def test_experts_leave_first_and_gpus_share() -> None:
    mixture = plain(
        n_layer=16, expert_bytes=300 * 2**20, layer_bytes=330 * 2**20, n_expert=64, n_expert_used=4
    )
    launch = place(mixture, machine(4.0), ASKED, TWO)
    assert launch.n_cpu_moe > 0
    shared = place(llama3_8b(), machine(8.0, n_gpus=2), ASKED, TWO)
    assert len(shared.tensor_split) == 2


def test_a_refusal_names_the_context_that_fits() -> None:
    host = machine(None, host_gib=7.0)
    with pytest.raises(DoesNotFit) as caught:
        place(llama3_8b(), host, ASKED, replace(TWO, n_ctx=32768))
    found = re.search(r"--ctx (\d+) fits", caught.value.message)
    assert found is not None
    longest = int(found[1])
    assert "an f16 reference and a candidate" in caught.value.message
    assert place(llama3_8b(), host, ASKED, replace(TWO, n_ctx=longest)).n_ctx == longest
    with pytest.raises(DoesNotFit):
        place(llama3_8b(), host, ASKED, replace(TWO, n_ctx=longest + 256))


def test_where_not_even_the_weights_fit_no_context_does() -> None:
    host = machine(None, host_gib=2.0)
    assert longest_context(llama3_8b(), host, ASKED, TWO) == 0
    with pytest.raises(DoesNotFit, match="no context fits"):
        place(llama3_8b(), host, ASKED, TWO)


def test_what_comes_on_top_of_the_flag_is_taken_off_again() -> None:
    need = Need(32768, flag="--depths", n_beside=578)
    host = machine(None, host_gib=7.0)
    longest = longest_context(llama3_8b(), host, ASKED, need)
    with pytest.raises(DoesNotFit, match=f"--depths {longest - 578} fits") as caught:
        place(llama3_8b(), host, ASKED, need)
    assert caught.value.options == (f"--depths {longest - 578}",)
    assert caught.value.param == "depths"


def test_rows_and_copies_on_the_host_count() -> None:
    host = machine(None, host_gib=9.0)
    free = longest_context(llama3_8b(), host, ASKED, replace(TWO, n_ctx=32768))
    laden = replace(TWO, n_ctx=32768, n_rows=1000, host_bytes=GIB)
    assert 0 < longest_context(llama3_8b(), host, ASKED, laden) < free


def test_pairs_that_fit_whole_are_told_from_those_that_do_not() -> None:
    box = machine(7.6)
    whole = {
        p: whole_launch(llama3_8b(), box, ASKED, parse_pair(p), 32768) for p in ("f16", "q4_0")
    }
    assert whole["f16"] is None
    assert whole["q4_0"] is not None
    assert whole["q4_0"].n_gpu_layers == 33
    assert whole_launch(llama3_8b(), box, ASKED, parse_pair("f16"), 8192) is not None
    few = replace(ASKED, n_gpu_layers=20)
    asked = whole_launch(llama3_8b(), box, few, parse_pair("f16"), 32768)
    assert asked is not None
    assert asked.n_gpu_layers == 20


@pytest.mark.parametrize("box", [machine(None, host_gib=24.0), machine(7.6)])
def test_on_the_cpu_no_layers_are_asked_for(box: Machine) -> None:
    asked = replace(ASKED, backend=Backend.CPU)
    launch = whole_launch(llama3_8b(), box, asked, parse_pair("q8_0"), 8192)
    assert launch is not None
    assert (launch.backend, launch.n_gpu_layers) == (Backend.CPU, 0)
    assert place(llama3_8b(), box, asked, TWO).backend is Backend.CPU
