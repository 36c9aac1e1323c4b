"""The tensors of recurrent layers: Mamba's scan and the gated delta rule."""

from kvserve.core.graph.arena import Tensor
from kvserve.core.graph.frame import F32, Frame, state_of
from kvserve.core.shape import LayerShape, RecurrentState, Widths


def scans(frame: Frame, layer: LayerShape | None) -> bool:
    """Whether a layer is Mamba's: its state is fetched ahead of it."""
    return layer is not None and layer.recurrent is not None and frame.widths(layer).ssm_in > 0


def add_delta_rule(frame: Frame, x: Tensor, layer: LayerShape) -> Tensor:
    """The layer's mixer; returns what goes to the residual."""
    return _add_delta_rule(frame, x, frame.widths(layer), state_of(layer))


def add_scan(
    frame: Frame, x: Tensor, layer: LayerShape, remembered: Tensor, following: LayerShape | None
) -> tuple[Tensor, Tensor | None]:
    """The same for Mamba (llm_build_mamba_base::build_mamba2_layer), with the state that
    was fetched for it. The second result is that of the `following` layer: llama.cpp adds it to the
    graph before this layer's end."""
    widths, state = frame.widths(layer), state_of(layer)
    inner = widths.ssm_inner
    projected = frame.row(widths.ssm_in, x)
    mixed = frame.row(widths.conv, _add_joined(frame, remembered, projected, widths))
    steps = frame.row(widths.ssm_in - inner - widths.conv, projected)
    scanned = frame.graph.add(_row_and_state_bytes(frame, inner, state), mixed, steps)
    ahead = frame.state(state_of(following).r_elements) if following is not None else None
    z = frame.row(inner, projected)
    skipped = frame.row(inner, mixed)
    y = frame.graph.add(skipped.n_bytes, skipped, scanned, in_place=True)
    y = frame.row(inner, z, y)
    return frame.residual(frame.row(inner, y) if widths.ssm_norm else y), ahead


def _add_delta_rule(frame: Frame, x: Tensor, widths: Widths, state: RecurrentState) -> Tensor:
    """llm_build_delta_net_base with fused operations (src/models/qwen35.cpp)."""
    inner = widths.ssm_inner
    keys = (widths.conv - inner) // 2
    remembered = frame.state(state.r_elements)
    projected = frame.row(widths.conv, x)
    joined = _add_joined(frame, remembered, projected, widths)
    before = frame.state(state.s_elements)
    mixed = frame.row(widths.conv, joined)
    q = frame.row(keys, mixed)
    k = frame.row(keys, mixed)
    decay = frame.row(widths.ssm_alpha, frame.row(widths.ssm_alpha, x))
    beta = frame.row(widths.ssm_alpha, frame.row(widths.ssm_alpha, x))
    n_bytes = _row_and_state_bytes(frame, inner, state)
    result = frame.graph.add(n_bytes, q, k, mixed, decay, beta, before)
    out = frame.row(inner, result)
    z = frame.row(inner, frame.row(inner, x))
    return frame.residual(frame.graph.add(out.n_bytes, out, z, in_place=True))


def _add_joined(frame: Frame, remembered: Tensor, projected: Tensor, widths: Widths) -> Tensor:
    """The rows behind those remembered of each sequence, for the short convolution."""
    n_rows = frame.n_tokens + frame.launch.n_parallel * (widths.conv_kernel - 1)
    return frame.graph.add(n_rows * widths.conv * F32, remembered, projected)


def _row_and_state_bytes(frame: Frame, width: int, state: RecurrentState) -> int:
    """ggml returns the output and the new states in one tensor."""
    return frame.n_tokens * width * F32 + frame.state_bytes(state.s_elements)
