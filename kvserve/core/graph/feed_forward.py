"""The tensors of feed-forward networks (llm_graph_context::build_ffn and build_moe_ffn)."""

from kvserve.core.graph.arena import Tensor
from kvserve.core.graph.frame import F32, Frame
from kvserve.core.shape import LayerShape, Widths

_MOST_FUSED_EXPERTS = 15
"""MOE_WEIGHTED_REDUCTION_MAX_EXPERTS in ggml-cuda/ggml-cuda.cu."""


def add_feed_forward(frame: Frame, x: Tensor, layer: LayerShape) -> Tensor:
    """The dense network, or the experts and the shared expert beside them."""
    widths = frame.widths(layer)
    if not widths.expert_ff:
        return _add_dense(frame, x, layer, "", (widths.ff_gate, widths.ff_up, widths.ff))
    out = _add_experts(frame, x, layer, widths)
    if widths.shared_ff:
        width = widths.shared_ff
        shared = _add_dense(frame, x, layer, "_shexp", (width, width, width))
        if widths.shared_gate:
            gate = frame.row(1, x)
            shared = frame.graph.add(shared.n_bytes, shared, gate, in_place=True)
        out = frame.graph.add(out.n_bytes, out, shared, in_place=True)
    return out


def _add_dense(
    frame: Frame, x: Tensor, layer: LayerShape, kind: str, widths: tuple[int, int, int]
) -> Tensor:
    """`widths` are those of gate (0 without one), up, and after the activation."""
    gate, up, ff = widths
    named = (("ffn_gate", gate), ("ffn_up", up))
    parts = [
        frame.row(width, x, *frame.matrix(layer, name + kind)) for name, width in named if width
    ]
    in_place = not gate and up == ff
    hidden = frame.graph.add(frame.n_tokens * ff * F32, *parts, in_place=in_place)
    return frame.residual(hidden, *frame.matrix(layer, f"ffn_down{kind}"))


def _add_experts(frame: Frame, x: Tensor, layer: LayerShape, widths: Widths) -> Tensor:
    """Every expert in use gets rows of its own; they are summed one by one."""
    graph, n_used = frame.graph, frame.shape.n_expert_used
    probabilities = frame.row(frame.shape.n_expert, x)
    chosen = frame.row(frame.shape.n_expert, probabilities)
    weights = frame.row(n_used, probabilities, chosen)
    total = frame.row(1, weights)
    weights = frame.row(n_used, weights, total)
    if widths.expert_gate_up:
        parts = {"ffn_gate_up_exps": widths.expert_gate_up}
    elif widths.expert_gate:
        parts = {"ffn_gate_exps": widths.expert_ff, "ffn_up_exps": widths.expert_ff}
    else:
        parts = {"ffn_up_exps": widths.expert_ff}
    rows = [
        frame.row(n_used * width, x, chosen, *frame.matrix(layer, name))
        for name, width in parts.items()
    ]
    in_place = not widths.expert_gate_up and not widths.expert_gate
    n_bytes = frame.n_tokens * n_used * widths.expert_ff * F32
    hidden = graph.add(n_bytes, *rows, in_place=in_place)
    down = frame.matrix(layer, "ffn_down_exps")
    each = frame.row(n_used * frame.shape.n_embd, hidden, chosen, *down)
    # CUDA weighs and sums in one kernel, and keeps what that reads until the end
    # (ggml_cuda_match_moe_weighted_reduction).
    fused = frame.on_gpu and 2 <= n_used <= _MOST_FUSED_EXPERTS
    weighted = graph.add(each.n_bytes, each, weights, in_place=not fused)
    out = frame.residual(weighted, weighted)
    for _ in range(2, n_used):
        out = graph.add(out.n_bytes, out, weighted, in_place=True)
    if fused:
        graph.use(each, weights)
    return out
