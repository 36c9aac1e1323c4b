"""Small GGUF models made in code, which llama.cpp really loads, and full-size ones without data.

`write_model` writes random weights and a tiny vocabulary; `write_sparse` writes the header of a
well-known model in front of a hole, so that it has the true size and takes no disk space.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np

from tests.gguf.families import FAMILIES, Metadata, Spec, describe

ARCHITECTURES = tuple(FAMILIES)
"""What `write_model` can write."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
WORDS = ("the", "and", "ing", "token", "cache", "hello", "world", "model", "answer", "question")


def write_model(
    path: Path,
    arch: str = "llama",
    *,
    vocab: str | None = "llama-bpe",
    chat_template: str | None = CHAT_TEMPLATE,
    weight_type: str = "F16",
    seed: int = 0,
    scale: float = 0.05,
    extra: Metadata | None = None,
    **dims: int | bool | None,
) -> Path:
    """Write a loadable model of `ARCHITECTURES` with random weights; `dims` are fields of `Spec`.

    `vocab=None` leaves the vocabulary out (llama.cpp's `no_vocab`); `extra` adds or replaces
    metadata, with None taking a key away. Matrices are of `weight_type`, the rest is f32; weights
    have the standard deviation `scale`.
    """
    spec = replace(Spec(arch), **dims)  # type: ignore[arg-type]
    tokens = tiny_vocab() if vocab else None
    spec = replace(spec, n_vocab=len(tokens[0]) if tokens else spec.n_vocab or 288)
    metadata, tensors = describe(spec)
    metadata["tokenizer.chat_template"] = chat_template
    writer = _writer(path, metadata | (extra or {}), spec, tokens)
    random = np.random.default_rng(seed)
    matrix = gguf.GGMLQuantizationType[weight_type]
    for name, shape in tensors:
        data = random.standard_normal(shape[::-1], dtype=np.float32) * np.float32(scale)
        if name.endswith(("norm.weight", "ssm_d")):
            data = np.ones_like(data)
        if name.endswith("ssm_a"):
            data = -np.abs(data) - 0.1
        kept = len(shape) < 2 or not name.endswith("weight")
        kept = kept or any(part in name for part in ("norm", "conv1d", "gate_inp"))
        kind = gguf.GGMLQuantizationType.F32 if kept else matrix
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_vocab() -> tuple[list[str], list[int], list[str]]:
    """Byte tokens in GPT-2's alphabet, a few words with their merges, and special tokens.

    Returns the tokens, their types, and the merges.
    """
    tokens = [_byte_token(byte) for byte in range(256)]
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                tokens.append(word[:end])
                merges.append(f"{word[: end - 1]} {word[end - 1]}")
    kinds = [1] * len(tokens) + [3] * len(SPECIAL_TOKENS)
    return tokens + list(SPECIAL_TOKENS), kinds, merges


def full_vocab(n_vocab: int, n_merges: int) -> tuple[list[str], list[int], list[str]]:
    """A vocabulary of real size and string lengths; the words mean nothing."""
    tokens, _, _ = tiny_vocab()
    words = [f"w{index:x}" for index in range(n_vocab - len(tokens))]
    merges = [f"w{index % 4096:x} {index:x}" for index in range(n_merges)]
    every = words + tokens
    return every, [1] * (len(every) - len(SPECIAL_TOKENS)) + [3] * len(SPECIAL_TOKENS), merges


def _byte_token(byte: int) -> str:
    printable = (*range(33, 127), *range(161, 173), *range(174, 256))
    if byte in printable:
        return chr(byte)
    return chr(256 + [other for other in range(256) if other not in printable].index(byte))


def _writer(
    path: Path,
    metadata: Metadata,
    spec: Spec,
    tokens: tuple[list[str], list[int], list[str]] | None,
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, spec.arch)
    for key, value in metadata.items():
        name = spec.arch + key if key.startswith(".") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
    if tokens is None:
        writer.add_tokenizer_model("no_vocab")
        return writer
    n_vocab = len(tokens[0])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens[0])
    writer.add_token_types(tokens[1])
    writer.add_token_merges(tokens[2])
    writer.add_bos_token_id(n_vocab - 5)
    writer.add_eos_token_id(n_vocab - 4)
    writer.add_eot_token_id(n_vocab - 1)
    writer.add_add_bos_token(True)
    return writer


PRESETS: dict[str, tuple[Spec, int]] = {
    "llama3-8b-q4_k_m": (
        Spec("llama", 32, 4096, 32, 8, 128, 14336, 8192, 128256),
        280147,
    ),
    "qwen2.5-32b-q4_k_m": (
        Spec("qwen2", 64, 5120, 40, 8, 128, 27648, 32768, 152064),
        151387,
    ),
    "qwen3-30b-a3b-q4_k_m": (
        Spec(
            "qwen3moe", 48, 2048, 32, 4, 128, 6144, 40960, 151936,
            n_expert=128, n_expert_used=8, n_ff_exp=768,
        ),
        151387,
    ),
    "qwen3.5-4b-q4_k_m": (
        Spec(
            "qwen35", 32, 2560, 16, 4, 256, 9216, 262144, 248320, tied=True, full_every=4,
            ssm_state=128, ssm_inner=4096, ssm_heads=32, ssm_groups=16,
        ),
        247587,
    ),
}  # fmt: skip
"""Well-known models, with the number of merges in their vocabularies."""


def write_sparse(path: Path, preset: str) -> Path:
    """Write the header of a full-size Q4_K_M model in front of a hole of the data's size."""
    spec, n_merges = PRESETS[preset]
    return write_sparse_spec(path, preset, spec, n_merges)


def write_sparse_spec(path: Path, name: str, spec: Spec, n_merges: int = 1000) -> Path:
    """The same for any dimensions."""
    metadata, tensors = describe(spec)
    metadata |= {
        "general.name": name,
        "general.file_type": 15,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    writer = _writer(path, metadata, spec, full_vocab(spec.n_vocab, n_merges))
    size_bytes = 0
    for name, shape in tensors:
        kind = _q4_k_m(name, shape, spec.n_layer)
        rows = gguf.quant_shape_to_byte_shape(shape[::-1], kind)
        n_bytes = int(np.prod(rows))
        writer.add_tensor_info(name, rows, np.dtype(np.uint8), n_bytes, raw_dtype=kind)
        size_bytes += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    data_offset = -(-path.stat().st_size // 32) * 32
    with path.open("r+b") as file:
        file.truncate(data_offset + size_bytes)
    return path


def _q4_k_m(name: str, shape: tuple[int, ...], n_layer: int) -> gguf.GGMLQuantizationType:
    """The type that llama-quantize gives a tensor for Q4_K_M (src/llama-quant.cpp)."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) < 2 or 1 in shape or "conv1d" in name or "ssm_norm" in name:
        return kinds.F32
    if name.endswith("ffn_gate_inp.weight"):
        return kinds.F32
    if shape[0] % 256:
        return kinds.Q8_0 if name == "output.weight" else kinds.Q5_0
    if name == "output.weight":
        return kinds.Q6_K
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    eighth = n_layer // 8
    finer = layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
    finer = finer and ("attn_v" in name or "ffn_down" in name)
    return kinds.Q6_K if finer else kinds.Q4_K
