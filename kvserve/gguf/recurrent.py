"""The state that recurrent layers keep for each sequence (llama_hparams::n_embd_r, n_embd_s)."""

from collections.abc import Callable
from typing import Final

from kvserve.core.shape import RecurrentState
from kvserve.gguf.architectures import RECURRENT, RecurrentLayers, RecurrentRule, StateKind
from kvserve.gguf.metadata import Metadata

_FIRST_CONV: Final = 3


def recurrent_states(
    metadata: Metadata,
    n_layer: int,
    n_head: tuple[int, ...],
    n_head_kv: tuple[int, ...],
    n_ff: tuple[int, ...],
) -> tuple[RecurrentState | None, ...]:
    """Give the f32 state of each layer, None for a layer that keeps none.

    `n_layer` is without draft layers, which keep none; the tuples have an entry for those too.
    Raises BadModelFile where the sizes are missing.
    """
    n_layer_all = len(n_head)
    rule = RECURRENT.get(metadata.architecture)
    if rule is None:
        return (None,) * n_layer_all
    state = _STATES[rule.state](metadata, n_head[0])
    recurrent = _recurrent_layers(metadata, rule, n_layer_all)
    lookups = _lookup_rows(metadata)
    return tuple(
        RecurrentState(state.r_elements + lookups.get(layer, 0), state.s_elements)
        if layer < n_layer and recurrent(layer, n_head_kv[layer], n_ff[layer])
        else None
        for layer in range(n_layer_all)
    )


def _recurrent_layers(
    metadata: Metadata, rule: RecurrentRule, n_layer_all: int
) -> Callable[[int, int, int], bool]:
    if rule.layers is RecurrentLayers.WITHOUT_KV_HEADS:
        return lambda _, n_head_kv, __: n_head_kv == 0
    if rule.layers is RecurrentLayers.WITHOUT_KV_HEADS_OR_FF:
        return lambda _, n_head_kv, n_ff: n_head_kv == 0 and n_ff == 0
    if rule.layers is RecurrentLayers.BY_INTERVAL:
        listed = metadata.per_layer(".attention.recurrent_layers", n_layer_all)
        if listed is not None:
            return lambda layer, _, __: bool(listed[layer])
        interval = metadata.natural(".full_attention_interval") or rule.interval
        return lambda layer, _, __: (layer + 1) % interval != 0
    return lambda _, __, ___: True


def _ssm(metadata: Metadata, n_groups: int) -> RecurrentState:
    d_conv = metadata.required(".ssm.conv_kernel")
    d_inner = metadata.required(".ssm.inner_size")
    d_state = metadata.required(".ssm.state_size")
    return RecurrentState((d_conv - 1) * (d_inner + 2 * n_groups * d_state), d_state * d_inner)


def _grouped_ssm(metadata: Metadata, _: int) -> RecurrentState:
    return _ssm(metadata, metadata.natural(".ssm.group_count") or 0)


def _ungrouped_ssm(metadata: Metadata, _: int) -> RecurrentState:
    return _ssm(metadata, 0)


def _token_shift(metadata: Metadata, _: int) -> RecurrentState:
    n_embd = metadata.required(".embedding_length")
    shifts = metadata.natural(".token_shift_count")
    return RecurrentState(
        (2 if shifts is None else shifts) * n_embd, n_embd * metadata.required(".wkv.head_size")
    )


def _short_conv(metadata: Metadata, _: int) -> RecurrentState:
    width = metadata.required(".shortconv.l_cache") - 1
    return RecurrentState(metadata.required(".embedding_length") * width, 0)


def _kda(metadata: Metadata, n_head: int) -> RecurrentState:
    head_size = metadata.required(".kda.head_dim")
    d_conv = metadata.natural(".ssm.conv_kernel") or 0
    width = d_conv - 1 if d_conv else _FIRST_CONV
    return RecurrentState(3 * width * n_head * head_size, head_size * head_size * n_head)


def _linear(metadata: Metadata, n_head: int) -> RecurrentState:
    default = metadata.required(".embedding_length") // max(n_head, 1)
    head_size = metadata.natural(".attention.key_length") or default
    return RecurrentState(0, head_size * head_size * n_head)


def _lookup_rows(metadata: Metadata) -> dict[int, int]:
    """The n-gram lookup history of qwen4exp, by layer (llama_hparams::ple_conv_state)."""
    layers = metadata.array(".ple.layers") if metadata.is_array(".ple.layers") else None
    if not layers:
        return {}
    width = (metadata.required(".ple.conv_kernel") - 1) * metadata.required(".ple.ngram_size")
    streams = metadata.required(".hyper_connection.count")
    return dict.fromkeys(layers, width * streams * metadata.required(".embedding_length"))


_STATES: Final[dict[StateKind, Callable[[Metadata, int], RecurrentState]]] = {
    StateKind.SSM: _grouped_ssm,
    StateKind.SSM_UNGROUPED: _ungrouped_ssm,
    StateKind.TOKEN_SHIFT: _token_shift,
    StateKind.SHORT_CONV: _short_conv,
    StateKind.KDA: _kda,
    StateKind.LINEAR: _linear,
}
