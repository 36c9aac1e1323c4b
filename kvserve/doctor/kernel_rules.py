"""What the timed pairs say: on a GPU, one that depth slows down too much has no kernel."""

from collections.abc import Iterator

from kvserve.core.machine import Backend
from kvserve.doctor.facts import Facts
from kvserve.doctor.findings import Finding, ok, problem
from kvserve.doctor.mending import rebuild_with_cuda

SLOW = 2.2
"""What depth may add to a step, beside the pair to which it adds least. 8B shape on an H100 at
8,192 tokens: up to 1.6 with kernels, 2.9 for a pair that is converted to f16 at each step."""


def kernels(facts: Facts) -> Iterator[Finding]:
    """Each pair's step, and on a GPU how much depth adds to it beside the other pairs. On a CPU
    llama.cpp's fast attention is for f16 alone, so that nothing follows from it."""
    for speed in facts.kernels:
        if speed.error is not None:
            yield problem(
                "kernels",
                f"{speed.pair}: {speed.error}",
                "kvserve may choose this pair, and could not serve with it",
                "fix --cache-type to a pair that works, and report this",
            )
    if all(speed.time is None for speed in facts.kernels):
        return
    times = {str(speed.pair): speed.time for speed in facts.kernels if speed.time is not None}
    text = ", ".join(
        f"{pair} {1e3 * time.shallow_seconds:.1f} and {1e3 * time.deep_seconds:.1f} ms"
        for pair, time in times.items()
    )
    depth = min(time.depth for time in times.values())
    text = f"a token in an empty context, and after {depth} tokens: {text}"
    least = min(time.growth_seconds for time in times.values())
    slow = [pair for pair, time in times.items() if time.growth_seconds > SLOW * least > 0]
    if slow and facts.backend is Backend.CUDA:
        yield problem(
            "kernels",
            text,
            f"{', '.join(slow)} cost so much more with depth that they have no kernel of their own",
            rebuild_with_cuda(facts),
        )
    else:
        yield ok("kernels", text)
