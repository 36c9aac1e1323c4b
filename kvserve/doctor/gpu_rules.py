"""Driver, cards, their free memory, and whether the installed llama.cpp can use them."""

from collections.abc import Iterator

from kvserve.core.dtypes import LADDER
from kvserve.core.machine import Backend, Gpu
from kvserve.core.support import DEFAULT_CUDA_PAIRS, parse_fa_quants, why_slow
from kvserve.doctor.facts import Driver, Facts
from kvserve.doctor.findings import Finding, note, ok, problem
from kvserve.doctor.mending import rebuild_with_cuda
from kvserve.units import format_bytes

_CROWDED = 0.75
"""A card with less than this share free is worth a look at who holds the rest."""


def driver(facts: Facts) -> Iterator[Finding]:
    """Whether the driver answers, and why cards are missing from its answer."""
    found = facts.driver
    if found.version is None:
        if facts.n_cards:
            yield problem(
                "driver",
                f"{facts.n_cards} NVIDIA card(s) on the PCI bus, but {found.reason}",
                "without the driver nothing can run on the card; in a container the driver comes "
                "from outside",
                "install the NVIDIA driver, or start the container with --gpus all; "
                "`nvidia-smi` must work first",
            )
        else:
            yield ok("driver", "no NVIDIA card here: layers run on the CPU")
        return
    if found.hidden and not found.gpus:
        names = ", ".join(gpu.name for gpu in found.hidden)
        yield problem(
            "driver",
            f"{names}: hidden from CUDA programs: {found.reason}",
            "everything would run on the CPU",
            "unset CUDA_VISIBLE_DEVICES",
        )
        return
    if found.gpus:
        names = ", ".join(gpu.name for gpu in found.gpus)
        yield ok("driver", f"NVIDIA driver {found.version}: {names}")
        if found.hidden:
            names = ", ".join(gpu.name for gpu in found.hidden)
            yield note(
                "driver",
                f"CUDA_VISIBLE_DEVICES hides {names}",
                "kvserve spreads layers over the cards that it sees, and over no other",
                "unset CUDA_VISIBLE_DEVICES to use them all",
            )
    elif found.reason:
        yield problem(
            "driver",
            f"driver {found.version}, but {found.reason}",
            "everything would run on the CPU",
            "look at `nvidia-smi`",
        )
    for text in found.notes:
        yield note("driver", text, "a plan could be made for another card than the one used", text)


def free_memory(facts: Facts) -> Iterator[Finding]:
    """Free memory of each card, and who holds the rest."""
    for gpu in facts.driver.gpus:
        what = f"{gpu.name}: {format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        users = _users(facts.driver, gpu)
        if users:
            what += f"; held by {users}"
        if gpu.free_bytes >= _CROWDED * gpu.total_bytes:
            yield ok("gpu memory", what)
        else:
            yield note(
                "gpu memory",
                what,
                "kvserve plans with what is free: the less there is, the shorter the context or "
                "the coarser the KV types",
                "end what holds it" if users else "look at `nvidia-smi` for what holds it",
            )


def _users(found: Driver, gpu: Gpu) -> str:
    texts = []
    for user in sorted(found.users, key=lambda user: -(user.n_bytes or 0)):
        if user.gpu_uuid == gpu.uuid:
            size = "an unknown amount" if user.n_bytes is None else format_bytes(user.n_bytes)
            texts.append(f"{user.name or 'outside this container'} (pid {user.pid}) {size}")
    return ", ".join(texts)


def cuda_build(facts: Facts) -> Iterator[Finding]:
    """Whether llama-cpp-python was built for the cards that are here."""
    library = facts.library
    if library.error is not None:
        return
    gpus = facts.driver.gpus or facts.driver.hidden
    if library.cuda:
        if gpus:
            yield ok("cuda", "llama-cpp-python is built with CUDA")
        else:
            yield note(
                "cuda",
                "llama-cpp-python is built with CUDA, and no GPU is seen",
                "layers run on the CPU",
                "nothing, if this machine has none; else see the driver above",
            )
    elif gpus or facts.n_cards:
        yield problem(
            "cuda",
            "llama-cpp-python is built without CUDA, and there is a GPU",
            "the GPU stays idle and everything runs on the CPU, many times slower; the package's "
            "own wheel is always such a build",
            rebuild_with_cuda(facts),
        )
    else:
        yield ok("cuda", "llama-cpp-python is built for the CPU, as this machine wants it")


def kv_pairs(facts: Facts) -> Iterator[Finding]:
    """Whether the planned pair and those that may be chosen have compiled kernels."""
    if not facts.library.cuda:
        return
    compiled = parse_fa_quants(facts.library.system_info)
    compiled = DEFAULT_CUDA_PAIRS if compiled is None else compiled
    plan = facts.plan
    if plan is not None and facts.backend is Backend.CUDA:
        pair = plan.chosen.launch.pair
        slow = why_slow(pair, Backend.CUDA, plan.machine.build)
        if slow is not None:
            yield problem(
                "kv pairs",
                f"--cache-type {pair}: {slow}",
                "it answers rightly, and the slower the longer the context; kvserve takes it only "
                "because the setting fixes it",
                "leave --cache-type out, or take one of "
                + ", ".join(str(p) for p in LADDER if p in compiled),
            )
    missing = [str(pair) for pair in LADDER if pair not in compiled]
    if not missing:
        yield ok("kv pairs", "every KV pair that may be chosen has a compiled kernel")
        return
    yield problem(
        "kv pairs",
        f"no compiled kernel for {', '.join(missing)}",
        "llama.cpp would convert such a cache to f16 at every step, so kvserve leaves these pairs "
        "out, and with them the contexts that only they make fit",
        rebuild_with_cuda(facts),
    )
