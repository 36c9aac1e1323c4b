"""A GGUF file on disk, turned into the shape that the planner works with."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvserve.core.shape import LayerShape, ModelShape
from kvserve.gguf.architectures import REFUSED, REFUSED_FILE_TYPES
from kvserve.gguf.caches import Dimensions, layer_caches, read_dimensions
from kvserve.gguf.header import Header
from kvserve.gguf.metadata import Metadata
from kvserve.gguf.refusal import CONVERT_AGAIN, DOWNLOAD_AGAIN, bad_file, shown
from kvserve.gguf.splits import read_parts
from kvserve.gguf.tensor_index import TensorInfo
from kvserve.gguf.tensor_types import FILE_TYPES
from kvserve.gguf.weights import Weights, divide
from kvserve.gguf.widths import layer_widths, matrix_bytes

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LONGEST_NAME = 128
_NO_CHAT = (
    "cannot generate text from left to right (its attention is not causal): take a chat model"
)


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One model on disk: `path` is what llama.cpp is given, the first of `parts`.

    `identity` names the model in caches of measurements: the hex SHA-256 of each part's size and
    header bytes. It changes with any metadata, tensor name, shape, type or order, and does not
    read the weights: files that differ in those alone share it.
    """

    path: Path
    parts: tuple[Path, ...]
    shape: ModelShape
    chat_template: str | None
    identity: str


def read_model(path: Path) -> ModelFile:
    """Read a model's shape from its header; any part of a split model will do.

    Architectures that llama.cpp does not know are read as plain attention. Raises BadModelFile
    for a file that is missing, unreadable, truncated, hostile, no GGUF, or no model for chat.
    """
    headers = read_parts(path)
    metadata = _model_metadata(headers[0])
    if not any(header.tensors for header in headers):
        raise bad_file(
            metadata.path, "holds a vocabulary and no weights: take the file with the whole model"
        )
    chat_template = metadata.text("tokenizer.chat_template") or None
    return ModelFile(
        path=headers[0].path,
        parts=tuple(header.path for header in headers),
        shape=_shape(metadata, headers, has_chat_template=chat_template is not None),
        chat_template=chat_template,
        identity=_identity(headers),
    )


def _model_metadata(header: Header) -> Metadata:
    general = Metadata(header.path, "", header.values)
    file_type = general.text("general.type") or ""
    if file_type in REFUSED_FILE_TYPES:
        raise bad_file(header.path, REFUSED_FILE_TYPES[file_type])
    architecture = general.text("general.architecture")
    if not architecture:
        raise bad_file(
            header.path, f"does not name its architecture: it is no model, or {CONVERT_AGAIN}"
        )
    if not _ARCHITECTURE.fullmatch(architecture):
        raise bad_file(
            header.path,
            f"calls its architecture {shown(architecture)}, which is no name; {DOWNLOAD_AGAIN}",
        )
    if architecture in REFUSED:
        raise bad_file(header.path, REFUSED[architecture])
    metadata = Metadata(header.path, architecture, header.values)
    if metadata.flag(".attention.causal") is False:
        raise bad_file(header.path, _NO_CHAT)
    return metadata


def _shape(
    metadata: Metadata, headers: tuple[Header, ...], *, has_chat_template: bool
) -> ModelShape:
    dims = read_dimensions(metadata)
    tensors = [tensor for header in headers for tensor in header.tensors]
    weights = divide(metadata.path, metadata.architecture, tensors, dims.n_layer, dims.n_layer_all)
    n_expert_used = max(
        metadata.per_layer(".expert_used_count", dims.n_layer_all) or (0,), default=0
    )
    return ModelShape(
        architecture=metadata.architecture,
        name=_name(metadata),
        quantization=_quantization(metadata),
        file_bytes=sum(header.file_bytes for header in headers),
        n_ctx_train=metadata.required(".context_length"),
        n_vocab=_n_vocab(metadata, weights),
        n_embd=dims.n_embd,
        n_ff=_n_ff(metadata, dims, weights, n_expert_used),
        n_head=max(dims.n_head),
        n_head_kv=max(dims.n_head_kv),
        n_expert=metadata.natural(".expert_count") or 0,
        n_expert_used=n_expert_used,
        layers=_layers(metadata, dims, weights, tensors),
        input_bytes=weights.input_bytes,
        output_bytes=weights.output_bytes,
        tied_bytes=weights.tied_bytes,
        has_chat_template=has_chat_template,
        has_attention_sinks=weights.has_attention_sinks,
    )


def _name(metadata: Metadata) -> str | None:
    """Give the model's own name, fit for a terminal: it comes from an untrusted file."""
    name = (metadata.text("general.name") or "")[:_LONGEST_NAME]
    return "".join(char for char in name if char.isprintable()).strip() or None


def _quantization(metadata: Metadata) -> str | None:
    file_type = metadata.natural("general.file_type")
    return None if file_type is None else FILE_TYPES.get(file_type)


def _layers(
    metadata: Metadata, dims: Dimensions, weights: Weights, tensors: list[TensorInfo]
) -> tuple[LayerShape, ...]:
    caches = layer_caches(metadata, dims)
    widths = layer_widths(tensors, dims.n_layer)
    matrices = matrix_bytes(tensors, dims.n_layer)
    # Draft layers, loop passes and routers have caches, and no weights of their own in a graph.
    added = (0,) * (len(caches) - dims.n_layer_all)
    return tuple(
        LayerShape(
            index,
            weights_bytes,
            expert_bytes,
            cache.attention,
            cache.recurrent,
            widths[index] if index < len(widths) else None,
            matrices[index] if index < len(matrices) else (),
        )
        for index, (weights_bytes, expert_bytes, cache) in enumerate(
            zip(weights.block_bytes + added, weights.expert_bytes + added, caches, strict=True)
        )
    )


def _n_vocab(metadata: Metadata, weights: Weights) -> int:
    return (
        metadata.length("tokenizer.ggml.tokens")
        or metadata.natural(".vocab_size")
        or weights.n_vocab
    )


def _n_ff(metadata: Metadata, dims: Dimensions, weights: Weights, n_expert_used: int) -> int:
    """The widest feed-forward layer, experts in use and shared ones included."""
    expert = max(
        metadata.per_layer(".expert_feed_forward_length", dims.n_layer_all) or (0,), default=0
    )
    expert = expert or weights.expert_n_ff
    shared = metadata.natural(".expert_shared_feed_forward_length") or expert * (
        metadata.natural(".expert_shared_count") or 0
    )
    return max(*dims.n_ff, n_expert_used * expert + shared)


def _identity(headers: Iterable[Header]) -> str:
    digest = hashlib.sha256()
    for header in headers:
        digest.update(header.file_bytes.to_bytes(8, "little"))
        digest.update(header.sha256)
    return digest.hexdigest()
