"""How a file's tensors divide into layers, host input and output.

Follows LLM_TENSOR_INFOS in llama.cpp's src/llama-arch.cpp: token embeddings and the like stay on
the host, tensors of a block go where its layer goes, the rest goes with the output.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kvserve.gguf.architectures import NORM_AFTER_EMBEDDING_IS_OUTPUT
from kvserve.gguf.refusal import CONVERT_AGAIN, bad_file, shown
from kvserve.gguf.tensor_index import TensorInfo

_EMBEDDINGS: Final = "token_embd.weight"
_OUTPUT: Final = "output.weight"
_INPUTS: Final = frozenset({"token_embd", "position_embd", "token_types", "per_layer_token_embd"})
_WITH_FIRST_BLOCK: Final = frozenset(
    {
        "token_embd_norm",
        "per_layer_model_proj",
        "per_layer_proj_norm",
        "rope_freqs",
        "rope_factors_long",
        "rope_factors_short",
        "hrm_z_l_init",
    }
)
_BLOCK: Final = re.compile(r"blk\.([0-9]{1,4})\.(.+)")
_EXPERTS: Final = re.compile(r"ffn_(?:up|down|gate|gate_up)_(?:ch)?exps\.")
"""The tensors that llama.cpp's --n-cpu-moe keeps on the host (LLM_FFN_EXPS_REGEX)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of a model's tensors by where they go. The tuples have an entry for each block.

    `expert_bytes` is the part of `block_bytes` in routed experts; `expert_n_ff` the width of one
    expert, 0 without experts. Of `output_bytes`, `tied_bytes` are a second
    copy of the embeddings.
    """

    input_bytes: int
    output_bytes: int
    block_bytes: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    expert_n_ff: int
    n_vocab: int
    tied_bytes: int
    has_attention_sinks: bool


def divide(
    path: Path, architecture: str, tensors: Iterable[TensorInfo], n_layer: int, n_layer_all: int
) -> Weights:
    """Sum the tensors of all parts. Blocks from `n_layer` on are draft (MTP) layers: 0 bytes.

    llama.cpp leaves those in the file unless `load_mtp` is set. Raises BadModelFile for a tensor
    of a block that the model does not have, and for a model without token embeddings or output.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    embeddings, output = by_name.get(_EMBEDDINGS), by_name.get(_OUTPUT)
    table = embeddings or output
    if table is None or len(table.dims) < 2 or not table.size_bytes:
        raise bad_file(path, f"has no token embeddings: it is no complete model, {CONVERT_AGAIN}")
    block_bytes, expert_bytes = [0] * n_layer_all, [0] * n_layer_all
    input_bytes = 0 if embeddings else table.size_bytes
    output_bytes = 0 if output else table.size_bytes
    expert_n_ff = 0
    for tensor in by_name.values():
        block = _block_of(path, architecture, tensor.name, n_layer_all)
        if block is None and tensor.name.partition(".")[0] in _INPUTS:
            input_bytes += tensor.size_bytes
        elif block is None:
            output_bytes += tensor.size_bytes
        elif block < n_layer:
            block_bytes[block] += tensor.size_bytes
            if _EXPERTS.search(tensor.name):
                expert_bytes[block] += tensor.size_bytes
                if tensor.name.endswith("_down_exps.weight"):
                    expert_n_ff = max(expert_n_ff, tensor.dims[0])
    return Weights(
        input_bytes=input_bytes,
        output_bytes=output_bytes,
        block_bytes=tuple(block_bytes),
        expert_bytes=tuple(expert_bytes),
        expert_n_ff=expert_n_ff,
        n_vocab=table.dims[1],
        tied_bytes=table.size_bytes if embeddings is None or output is None else 0,
        has_attention_sinks=any("attn_sinks" in name for name in by_name),
    )


def _block_of(path: Path, architecture: str, name: str, n_layer_all: int) -> int | None:
    match = _BLOCK.fullmatch(name)
    if match is None:
        stem = name.partition(".")[0]
        is_output = stem == "token_embd_norm" and architecture in NORM_AFTER_EMBEDDING_IS_OUTPUT
        return 0 if stem in _WITH_FIRST_BLOCK and not is_output else None
    block = int(match[1])
    if block >= n_layer_all:
        raise bad_file(
            path,
            f"has tensor {shown(name)}, and its metadata knows {n_layer_all:,} layers: "
            f"{CONVERT_AGAIN}",
        )
    return block
