"""How wide the rows are that each block computes, from the shapes of its matrices.

The names are those of llama.cpp's src/llama-arch.cpp; ggml writes dimensions with the width that
a matrix takes first and the width that it gives second.
"""

import re
from collections.abc import Iterable
from typing import Final

from kvserve.core.shape import Widths
from kvserve.gguf.tensor_index import TensorInfo

_WEIGHT: Final = re.compile(r"blk\.([0-9]{1,4})\.(.+)\.weight")
_FIELDS: Final[dict[str, tuple[tuple[str, int], ...]]] = {
    "attn_q": (("q", 1),),
    "attn_q_b": (("q_lora", 0), ("q", 1)),
    "attn_qkv": (("qkv", 1),),
    "attn_kv_a_mqa": (("kv_lora_rope", 1),),
    "attn_v_b": (("kv_lora", 0), ("mla_v", 1)),
    "attn_gate": (("gate", 1),),
    "attn_output": (("attention", 0),),
    "ffn_up": (("ff_up", 1),),
    "ffn_gate": (("ff_gate", 1),),
    "ffn_down": (("ff", 0),),
    "ffn_up_shexp": (("shared_ff", 1),),
    "ffn_gate_inp_shexp": (("shared_gate", 0),),
    "ffn_down_exps": (("expert_ff", 0),),
    "ffn_gate_up_exps": (("expert_gate_up", 1),),
    "ffn_gate_exps": (("expert_gate", 1),),
    "ssm_in": (("ssm_in", 1),),
    "ssm_conv1d": (("conv_kernel", 0), ("conv", 1)),
    "ssm_out": (("ssm_inner", 0),),
    "ssm_norm": (("ssm_norm", 0),),
    "ssm_alpha": (("ssm_alpha", 1),),
}


def matrix_bytes(
    tensors: Iterable[TensorInfo], n_layer: int
) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Name and bytes of each block's matrices, without `blk.N.` and `.weight`, by name."""
    found: list[list[tuple[str, int]]] = [[] for _ in range(n_layer)]
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor.name)
        if match is not None and int(match[1]) < n_layer and len(tensor.dims) > 1:
            found[int(match[1])].append((match[2], tensor.size_bytes))
    return tuple(tuple(sorted(matrices)) for matrices in found)


def layer_widths(tensors: Iterable[TensorInfo], n_layer: int) -> tuple[Widths, ...]:
    """The widths of each of the first `n_layer` blocks, 0 for what a block has not."""
    found: list[dict[str, int]] = [{} for _ in range(n_layer)]
    for tensor in tensors:
        match = _WEIGHT.fullmatch(tensor.name)
        if match is None or int(match[1]) >= n_layer:
            continue
        for field, dimension in _FIELDS.get(match[2], ()):
            if dimension < len(tensor.dims):
                found[int(match[1])][field] = tensor.dims[dimension]
    return tuple(Widths(**fields) for fields in found)
