"""Small GGUF models made in code, which llama.cpp really loads, and full-size ones without data.

`write_model` writes random weights and a tiny vocabulary; `write_sparse` writes the header of a
well-known model in front of a hole, so that it has the true size and takes no disk space.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

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

Metadata = dict[str, object]
Tensors = list[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Spec:
    """The dimensions of a model to write. Tensor shapes follow from them, by architecture."""

    arch: str = "llama"
    n_layer: int = 2
    n_embd: int = 128
    n_head: int = 2
    n_head_kv: int = 1
    head_dim: int | None = None
    n_ff: int = 256
    n_ctx_train: int = 2048
    n_vocab: int = 0
    tied: bool = False
    n_expert: int = 4
    n_expert_used: int = 2
    n_ff_exp: int = 64
    window: int = 64
    full_every: int = 2
    kv_lora_rank: int = 64
    q_lora_rank: int = 64
    rope_dim: int = 32
    ssm_state: int = 64
    ssm_inner: int = 256
    ssm_heads: int = 4
    ssm_groups: int = 2
    ssm_conv: int = 4

    @property
    def head(self) -> int:
        return self.head_dim or self.n_embd // self.n_head


def write_model(
    path: Path,
    arch: str = "llama",
    *,
    vocab: str | None = "llama-bpe",
    chat_template: str | None = CHAT_TEMPLATE,
    weight_type: str = "F16",
    seed: int = 0,
    extra: Metadata | None = None,
    **dims: int | bool | None,
) -> Path:
    """Write a loadable model of `FAMILIES` with random weights; `dims` are fields of `Spec`.

    `vocab=None` leaves the vocabulary out (llama.cpp's `no_vocab`); `extra` adds or replaces
    metadata, with None taking a key away. Matrices are of `weight_type`, the rest is f32.
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
        data = random.standard_normal(shape[::-1], dtype=np.float32) * 0.05
        if name.endswith(("norm.weight", "ssm_d")):
            data = np.ones_like(data)
        if name.endswith("ssm_a"):
            data = -np.abs(data) - 0.1
        kept = len(shape) < 2 or not name.endswith("weight") or "conv1d" in name or "inp" in name
        kind = gguf.GGMLQuantizationType.F32 if kept else matrix
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def describe(spec: Spec) -> tuple[Metadata, Tensors]:
    """Give the metadata and the tensors (ggml order, fastest dimension first) of a spec."""
    metadata: Metadata = {
        "general.name": f"Tiny {spec.arch}",
        ".context_length": spec.n_ctx_train,
        ".embedding_length": spec.n_embd,
        ".block_count": spec.n_layer,
        ".feed_forward_length": spec.n_ff,
        ".vocab_size": spec.n_vocab,
        ".attention.layer_norm_rms_epsilon": 1e-5,
    }
    tensors: Tensors = [("token_embd.weight", (spec.n_embd, spec.n_vocab))]
    tensors.append(("output_norm.weight", (spec.n_embd,)))
    if not spec.tied:
        tensors.append(("output.weight", (spec.n_embd, spec.n_vocab)))
    family = FAMILIES[spec.arch]
    metadata |= family.metadata(spec)
    for layer in range(spec.n_layer):
        tensors += [(f"blk.{layer}.{name}", shape) for name, shape in family.block(spec, layer)]
    return metadata, tensors


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


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture turns a spec into metadata and the tensors of a block."""

    metadata: Callable[[Spec], Metadata]
    block: Callable[[Spec, int], Iterator[tuple[str, tuple[int, ...]]]]


def _heads(spec: Spec) -> Metadata:
    return {
        ".attention.head_count": spec.n_head,
        ".attention.head_count_kv": spec.n_head_kv,
        ".attention.key_length": spec.head,
        ".attention.value_length": spec.head,
        ".rope.dimension_count": spec.head,
        ".rope.freq_base": 10000.0,
    }


def _experts(spec: Spec) -> Metadata:
    return {
        ".expert_count": spec.n_expert,
        ".expert_used_count": spec.n_expert_used,
        ".expert_feed_forward_length": spec.n_ff_exp,
    }


def _sliding(spec: Spec) -> Metadata:
    return {".attention.sliding_window": spec.window}


def _latent(spec: Spec) -> Metadata:
    return {
        ".attention.head_count": spec.n_head,
        ".attention.head_count_kv": 1,
        ".attention.key_length": spec.kv_lora_rank + spec.rope_dim,
        ".attention.value_length": spec.kv_lora_rank,
        ".attention.key_length_mla": spec.head + spec.rope_dim,
        ".attention.value_length_mla": spec.head,
        ".attention.q_lora_rank": spec.q_lora_rank,
        ".attention.kv_lora_rank": spec.kv_lora_rank,
        ".rope.dimension_count": spec.rope_dim,
        ".leading_dense_block_count": 1,
        ".expert_shared_count": 1,
        ".expert_weights_scale": 1.0,
        ".expert_gating_func": 1,
    }


def _states(spec: Spec) -> Metadata:
    return {
        ".ssm.conv_kernel": spec.ssm_conv,
        ".ssm.inner_size": spec.ssm_inner,
        ".ssm.state_size": spec.ssm_state,
        ".ssm.time_step_rank": spec.ssm_heads,
        ".ssm.group_count": spec.ssm_groups,
    }


def _hybrid(spec: Spec) -> Metadata:
    quarter = spec.head // 8
    return {
        ".full_attention_interval": spec.full_every,
        ".rope.dimension_count": spec.head // 4,
        ".rope.dimension_sections": [quarter, quarter, quarter, 0],
    }


_Block = Iterator[tuple[str, tuple[int, ...]]]


def _attention(spec: Spec, *, q_scale: int = 1) -> _Block:
    q, kv = spec.n_head * spec.head, spec.n_head_kv * spec.head
    yield "attn_norm.weight", (spec.n_embd,)
    yield "attn_q.weight", (spec.n_embd, q * q_scale)
    yield "attn_k.weight", (spec.n_embd, kv)
    yield "attn_v.weight", (spec.n_embd, kv)
    yield "attn_output.weight", (q, spec.n_embd)


def _qkv_bias(spec: Spec) -> _Block:
    yield "attn_q.bias", (spec.n_head * spec.head,)
    yield "attn_k.bias", (spec.n_head_kv * spec.head,)
    yield "attn_v.bias", (spec.n_head_kv * spec.head,)


def _qk_norms(spec: Spec) -> _Block:
    yield "attn_q_norm.weight", (spec.head,)
    yield "attn_k_norm.weight", (spec.head,)


def _dense_ff(spec: Spec, norm: str | None = "ffn_norm") -> _Block:
    if norm:
        yield f"{norm}.weight", (spec.n_embd,)
    yield "ffn_gate.weight", (spec.n_embd, spec.n_ff)
    yield "ffn_up.weight", (spec.n_embd, spec.n_ff)
    yield "ffn_down.weight", (spec.n_ff, spec.n_embd)


def _expert_ff(spec: Spec, norm: str | None = "ffn_norm") -> _Block:
    if norm:
        yield f"{norm}.weight", (spec.n_embd,)
    yield "ffn_gate_inp.weight", (spec.n_embd, spec.n_expert)
    yield "ffn_gate_exps.weight", (spec.n_embd, spec.n_ff_exp, spec.n_expert)
    yield "ffn_up_exps.weight", (spec.n_embd, spec.n_ff_exp, spec.n_expert)
    yield "ffn_down_exps.weight", (spec.n_ff_exp, spec.n_embd, spec.n_expert)


def _llama_block(spec: Spec, _: int) -> _Block:
    yield from _attention(spec)
    yield from _dense_ff(spec)


def _qwen2_block(spec: Spec, layer: int) -> _Block:
    yield from _llama_block(spec, layer)
    yield from _qkv_bias(spec)


def _qwen3_block(spec: Spec, layer: int) -> _Block:
    yield from _llama_block(spec, layer)
    yield from _qk_norms(spec)


def _qwen3moe_block(spec: Spec, _: int) -> _Block:
    yield from _attention(spec)
    yield from _qk_norms(spec)
    yield from _expert_ff(spec)


def _gemma3_block(spec: Spec, layer: int) -> _Block:
    yield from _qwen3_block(spec, layer)
    yield "post_attention_norm.weight", (spec.n_embd,)
    yield "post_ffw_norm.weight", (spec.n_embd,)


def _gpt_oss_block(spec: Spec, _: int) -> _Block:
    yield from _attention(spec)
    yield from _qkv_bias(spec)
    yield "attn_output.bias", (spec.n_embd,)
    yield "post_attention_norm.weight", (spec.n_embd,)
    yield "attn_sinks.weight", (spec.n_head,)
    yield from _expert_ff(spec, norm=None)
    yield "ffn_gate_inp.bias", (spec.n_expert,)
    yield "ffn_gate_exps.bias", (spec.n_ff_exp, spec.n_expert)
    yield "ffn_up_exps.bias", (spec.n_ff_exp, spec.n_expert)
    yield "ffn_down_exps.bias", (spec.n_embd, spec.n_expert)


def _deepseek2_block(spec: Spec, layer: int) -> _Block:
    yield "attn_norm.weight", (spec.n_embd,)
    yield "attn_q_a_norm.weight", (spec.q_lora_rank,)
    yield "attn_kv_a_norm.weight", (spec.kv_lora_rank,)
    yield "attn_q_a.weight", (spec.n_embd, spec.q_lora_rank)
    yield "attn_q_b.weight", (spec.q_lora_rank, spec.n_head * (spec.head + spec.rope_dim))
    yield "attn_kv_a_mqa.weight", (spec.n_embd, spec.kv_lora_rank + spec.rope_dim)
    yield "attn_k_b.weight", (spec.head, spec.kv_lora_rank, spec.n_head)
    yield "attn_v_b.weight", (spec.kv_lora_rank, spec.head, spec.n_head)
    yield "attn_output.weight", (spec.n_head * spec.head, spec.n_embd)
    if layer == 0:
        yield from _dense_ff(spec)
        return
    yield from _expert_ff(spec)
    yield "ffn_gate_shexp.weight", (spec.n_embd, spec.n_ff_exp)
    yield "ffn_up_shexp.weight", (spec.n_embd, spec.n_ff_exp)
    yield "ffn_down_shexp.weight", (spec.n_ff_exp, spec.n_embd)


def _mamba2_block(spec: Spec, _: int) -> _Block:
    conv = spec.ssm_inner + 2 * spec.ssm_groups * spec.ssm_state
    yield "attn_norm.weight", (spec.n_embd,)
    yield "ssm_in.weight", (spec.n_embd, spec.ssm_inner + conv + spec.ssm_heads)
    yield "ssm_conv1d.weight", (spec.ssm_conv, conv)
    yield "ssm_conv1d.bias", (conv,)
    yield "ssm_dt.bias", (spec.ssm_heads,)
    yield "ssm_a", (1, spec.ssm_heads)
    yield "ssm_d", (1, spec.ssm_heads)
    yield "ssm_norm.weight", (spec.ssm_inner // spec.ssm_groups, spec.ssm_groups)
    yield "ssm_out.weight", (spec.ssm_inner, spec.n_embd)


def _qwen35_block(spec: Spec, layer: int) -> _Block:
    if (layer + 1) % spec.full_every == 0:
        yield from _attention(spec, q_scale=2)
        yield from _qk_norms(spec)
    else:
        conv = spec.ssm_inner + 2 * spec.ssm_groups * spec.ssm_state
        yield "attn_norm.weight", (spec.n_embd,)
        yield "attn_qkv.weight", (spec.n_embd, conv)
        yield "attn_gate.weight", (spec.n_embd, spec.ssm_inner)
        yield "ssm_conv1d.weight", (spec.ssm_conv, conv)
        yield "ssm_dt.bias", (spec.ssm_heads,)
        yield "ssm_a", (spec.ssm_heads,)
        yield "ssm_beta.weight", (spec.n_embd, spec.ssm_heads)
        yield "ssm_alpha.weight", (spec.n_embd, spec.ssm_heads)
        yield "ssm_norm.weight", (spec.ssm_state,)
        yield "ssm_out.weight", (spec.ssm_inner, spec.n_embd)
    yield from _dense_ff(spec, norm="post_attention_norm")


FAMILIES: dict[str, Family] = {
    "llama": Family(_heads, _llama_block),
    "qwen2": Family(_heads, _qwen2_block),
    "qwen3": Family(_heads, _qwen3_block),
    "qwen3moe": Family(lambda spec: _heads(spec) | _experts(spec), _qwen3moe_block),
    "gemma3": Family(lambda spec: _heads(spec) | _sliding(spec), _gemma3_block),
    "gpt-oss": Family(lambda spec: _heads(spec) | _experts(spec) | _sliding(spec), _gpt_oss_block),
    "deepseek2": Family(lambda spec: _latent(spec) | _experts(spec), _deepseek2_block),
    "mamba2": Family(_states, _mamba2_block),
    "qwen35": Family(lambda spec: _heads(spec) | _states(spec) | _hybrid(spec), _qwen35_block),
}


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
    metadata, tensors = describe(spec)
    metadata |= {
        "general.name": preset,
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
    if len(shape) < 2 or "conv1d" in name or name.endswith("ffn_gate_inp.weight"):
        return kinds.F32
    if name == "output.weight":
        return kinds.Q6_K
    layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
    eighth = n_layer // 8
    finer = layer < eighth or layer >= 7 * n_layer // 8 or (layer - eighth) % 3 == 2
    finer = finer and ("attn_v" in name or "ffn_down" in name)
    return kinds.Q6_K if finer else kinds.Q4_K
