"""What llama.cpp itself says of launches: exact figures, and refusals.

A measuring process lays a launch out without allocating it (worker/measure); its figures take the
place of the formulas'. Weights and the runtime are not among them and stay as computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

from kvserve.core.cells import uses_gpu
from kvserve.core.plan import Candidate, Estimate, Launch, Memory, Plan

_ROUNDED_BYTES = 16 * 1024
"""The log's figures are rounded to 0.01 MiB for each buffer."""
_WHOLE_DOUBT = 0.02
_SPLIT_DOUBT = 0.5
"""How far off the computed compute buffer may be: of a whole model, and of a split one, whose
copies of weights and cache are only known within bounds (docs/memory.md)."""
_SHORTEST_CTX = 2048
_NEIGHBOURS = (1, 2, -1, -2)


@dataclass(frozen=True, slots=True)
class Findings:
    """Estimates with the KV, recurrent, compute and output bytes of launches, and one line of
    reason for each launch that llama.cpp would refuse."""

    exact: Mapping[Launch, Estimate] = field(default_factory=dict)
    refused: Mapping[Launch, str] = field(default_factory=dict)

    def knows(self, launch: Launch) -> bool:
        """Whether llama.cpp was asked about the launch."""
        return launch in self.exact or launch in self.refused

    def joined(self, other: "Findings") -> "Findings":
        """Both together."""
        return Findings({**self.exact, **other.exact}, {**self.refused, **other.refused})

    def corrected(self, bill: Estimate, launch: Launch) -> Estimate:
        """The computed bill of a launch, with llama.cpp's figures where they are known."""
        exact = self.exact.get(launch)
        if exact is None:
            return bill
        host = _corrected(bill.host, exact.host)
        if len(bill.each) > 1 and len(bill.each) == len(exact.each):
            pairs = zip(bill.each, exact.each, strict=True)
            each = tuple(_corrected(computed, real) for computed, real in pairs)
            return Estimate(reduce(Memory.plus, each), host, each)
        return Estimate(_corrected(bill.gpu, exact.gpu), host, bill.each)


NOTHING_FOUND = Findings()


def doubtful(plan: Plan, findings: Findings) -> tuple[Launch, ...]:
    """The launches that llama.cpp should be asked about before the plan is carried out: the chosen
    one, and those that lost or won by less than the formulas may be wrong."""
    chosen = plan.chosen.launch
    wanted = [chosen]
    wanted += [c.launch for c in plan.candidates if not c.fits and _is_close(c, plan)]
    if _is_split(chosen, plan):
        wanted += _neighbours(chosen, plan)
    return tuple(dict.fromkeys(launch for launch in wanted if not findings.knows(launch)))


def likely(plan: Plan) -> tuple[Launch, ...]:
    """The launches that a reload may ask for next: the chosen pair at each power of two up to the
    model's context, and every pair that may be chosen at twice the present one.

    None for models with a recurrent state, which is really allocated when it is measured, and for
    split ones, whose layers on the GPU change with the context.
    """
    shape, chosen = plan.shape, plan.chosen.launch
    if any(layer.recurrent for layer in shape.layers) or _is_split(chosen, plan):
        return ()
    lengths = []
    length = _SHORTEST_CTX
    while length <= shape.n_ctx_train:
        lengths.append(length)
        length *= 2
    launches = [replace(chosen, n_ctx=n_ctx) for n_ctx in lengths]
    if 2 * chosen.n_ctx <= shape.n_ctx_train:
        pairs = [c.launch.pair for c in plan.candidates if c.may_be_chosen]
        launches += [replace(chosen, pair=pair, n_ctx=2 * chosen.n_ctx) for pair in pairs]
    return tuple(dict.fromkeys(launches))


def _corrected(computed: Memory, exact: Memory) -> Memory:
    return replace(
        computed,
        kv_bytes=_settled(computed.kv_bytes, exact.kv_bytes),
        recurrent_bytes=_settled(computed.recurrent_bytes, exact.recurrent_bytes),
        compute_bytes=_settled(computed.compute_bytes, exact.compute_bytes),
        output_bytes=_settled(computed.output_bytes, exact.output_bytes),
    )


def _settled(computed: int, rounded: int) -> int:
    """The computed figure where it says the same as the rounded one."""
    return computed if abs(computed - rounded) <= _ROUNDED_BYTES else rounded


def _is_split(launch: Launch, plan: Plan) -> bool:
    whole = launch.n_gpu_layers > plan.shape.n_layer and not launch.n_cpu_moe
    return uses_gpu(launch) and not whole


def _is_close(candidate: Candidate, plan: Plan) -> bool:
    doubt = _SPLIT_DOUBT if _is_split(candidate.launch, plan) else _WHOLE_DOUBT
    return -candidate.headroom_bytes <= doubt * candidate.memory.compute_bytes


def _neighbours(launch: Launch, plan: Plan) -> list[Launch]:
    if launch.n_cpu_moe:
        counts = (launch.n_cpu_moe + step for step in _NEIGHBOURS)
        return [replace(launch, n_cpu_moe=n) for n in counts if 1 <= n <= plan.shape.n_layer]
    counts = (launch.n_gpu_layers + step for step in _NEIGHBOURS)
    return [replace(launch, n_gpu_layers=n) for n in counts if 1 <= n <= plan.shape.n_layer]
