"""Metadata for nearly every architecture, from which llama.cpp imagines a model without tensors.

The values are chosen to be told apart (head sizes, kinds of layers), not to be likely.
"""

from pathlib import Path

import gguf

Value = int | float | bool | str | list[int]

N_LAYER = 12

_BASE: dict[str, Value] = {
    ".vocab_size": 128,
    ".context_length": 4096,
    ".embedding_length": 256,
    ".block_count": N_LAYER,
    ".feed_forward_length": 384,
    ".leading_dense_block_count": 1,
    ".use_parallel_residual": False,
    ".logit_scale": 1.0,
    ".residual_scale": 1.0,
    ".embedding_scale": 1.0,
    ".embedding_length_per_layer_input": 64,
    ".time_mix_extra_dim": 32,
    ".time_decay_extra_dim": 128,
    ".rescale_every_n_layers": 6,
    ".full_attention_interval": 3,
    ".interleave_moe_layer_step": 2,
    ".num_loops": 2,
    ".swiglu_clamp_exp": 7.0,
    ".activation.situ_beta": 1.0,
    ".activation.situ_linear_beta": 1.0,
    ".attn_res.block_size": 2,
    ".attention.head_count": 4,
    ".attention.head_count_kv": 2,
    ".attention.max_alibi_bias": 8.0,
    ".attention.clamp_kqv": 1.0,
    ".attention.scale": 1.0,
    ".attention.layer_norm_epsilon": 1e-5,
    ".attention.layer_norm_rms_epsilon": 1e-5,
    ".attention.q_lora_rank": 96,
    ".attention.kv_lora_rank": 64,
    ".attention.decay_lora_rank": 32,
    ".attention.iclr_lora_rank": 32,
    ".attention.value_residual_mix_lora_rank": 32,
    ".attention.gate_lora_rank": 32,
    ".attention.sliding_window": 96,
    ".attention.indexer.head_count": 8,
    ".attention.indexer.key_length": 64,
    ".attention.indexer.top_k": 512,
    ".attention.indexer.block_size": 4,
    ".attention.indexer.kpool": 4,
    ".attention.indexer.local_blocks": 1,
    ".rope.dimension_sections": [8, 8, 8, 8],
    ".rope.freq_base_swa": 10000.0,
    ".expert_count": 4,
    ".expert_used_count": 2,
    ".expert_feed_forward_length": 96,
    ".expert_shared_feed_forward_length": 64,
    ".expert_shared_count": 1,
    ".expert_latent_length": 96,
    ".expert_gating_func": 2,
    ".expert_group_scale": 1.0,
    ".expert_weights_scale": 1.0,
    ".expert_weights_norm": True,
    ".experts_per_group": 1,
    ".ssm.conv_kernel": 4,
    ".ssm.inner_size": 512,
    ".ssm.state_size": 32,
    ".ssm.time_step_rank": 8,
    ".ssm.group_count": 2,
    ".wkv.head_size": 64,
    ".token_shift_count": 2,
    ".shortconv.l_cache": 3,
    ".kda.head_dim": 64,
    ".kda.gate_lower_bound": -5.0,
    ".hyper_connection.count": 4,
    ".hyper_connection.sinkhorn_iterations": 2,
    ".hyper_connection.epsilon": 1e-6,
    ".hyper_connection.low_rank": 8,
    ".hyper_connection.magnitude": 2.0,
}


def _layers(period: int, hit: int, then: int, otherwise: int = 0) -> list[int]:
    return [then if layer % period == hit else otherwise for layer in range(N_LAYER)]


_MLA: dict[str, Value] = {
    ".attention.head_count_kv": 1,
    ".attention.key_length": 96,
    ".attention.value_length": 64,
    ".rope.dimension_count": 32,
    ".attention.key_length_mla": 80,
    ".attention.value_length_mla": 48,
}
_NEXTN: dict[str, Value] = {".nextn_predict_layers": 1}
_SLIDES_2_OF_3: dict[str, Value] = {".attention.sliding_window_pattern": _layers(3, 2, 0, 1)}
_KV_IN_1_OF_3: dict[str, Value] = {".attention.head_count_kv": _layers(3, 0, 2)}
_MLA_IN_1_OF_3 = _MLA | {".attention.head_count_kv": _layers(3, 0, 1)}
_ALL_HEADS: dict[str, Value] = {".attention.head_count_kv": 4}
_WIDE_KEYS = _ALL_HEADS | {
    ".attention.key_length": 96,
    ".attention.value_length": 64,
    ".rope.dimension_count": 32,
}
_DELTA_NET: dict[str, Value] = {".ssm.state_size": 64}
_NEMOTRON = _KV_IN_1_OF_3 | {".feed_forward_length": _layers(4, 1, 384)}

_SPECIAL: dict[str, dict[str, Value]] = {
    "arwkv7": _ALL_HEADS | {".token_shift_count": 1},
    "bailingmoe3": _MLA_IN_1_OF_3 | _NEXTN | {".rope.dimension_sections": [4, 6, 6, 0]},
    "chameleon": {".vocab_size": 10240},
    "cohere2moe": _NEXTN,
    "deepseek2": _MLA | _NEXTN,
    "deepseek2-ocr": _ALL_HEADS,
    "deepseek32": _MLA,
    "dots1": _ALL_HEADS,
    "dots3note": _MLA
    | _SLIDES_2_OF_3
    | {
        ".attention.indexer.types": _layers(3, 2, 1),
        ".attention.kv_lora_rank_swa": 64,
        ".attention.key_length_swa": 96,
        ".attention.value_length_swa": 64,
        ".attention.key_length_mla_swa": 80,
        ".attention.value_length_mla_swa": 48,
    },
    "exaone4": {".block_count": 64},
    "gemma3n": {".block_count": 24},
    "gemma4": _SLIDES_2_OF_3
    | {
        ".attention.head_count_kv": _layers(3, 2, 2, 4),
        ".attention.key_length_swa": 32,
        ".attention.value_length_swa": 32,
        ".attention.shared_kv_layers": 3,
    },
    "glm-dsa": _MLA | _NEXTN,
    "glm4moe": _NEXTN,
    "glm5-next": _MLA_IN_1_OF_3 | {".attention.key_length": 64, ".rope.dimension_count": 0},
    "granite_swa": _SLIDES_2_OF_3,
    "granitehybrid": _KV_IN_1_OF_3,
    "hrm_text": {".hrm.layers_per_stack": 2, ".hrm.h_cycles": 2, ".hrm.l_cycles": 2},
    "hy_v3": _NEXTN,
    "hy_v4": _MLA | {".attention.indexer.types": _layers(4, 0, 1)},
    "jamba": _KV_IN_1_OF_3,
    "kimi-k3": _MLA_IN_1_OF_3,
    "kimi-linear": _MLA_IN_1_OF_3,
    "lfm2": _KV_IN_1_OF_3,
    "lfm2moe": _KV_IN_1_OF_3,
    "maple": _SLIDES_2_OF_3,
    "mimo2": _SLIDES_2_OF_3
    | {
        ".attention.head_count_kv": _layers(3, 2, 2, 4),
        ".attention.key_length": 64,
        ".attention.value_length": 32,
    },
    "minicpm3": _WIDE_KEYS,
    "mistral4": _MLA,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "olmoe": _ALL_HEADS,
    "plamo2": _KV_IN_1_OF_3 | {".attention.head_count": _layers(3, 0, 4), ".ssm.group_count": 0},
    "qwen35": _DELTA_NET | _NEXTN,
    "qwen35moe": _DELTA_NET | _NEXTN,
    "qwen3next": _DELTA_NET | _NEXTN,
    "rwkv6": _ALL_HEADS,
    "spark2_5": _SLIDES_2_OF_3,
    "step35": _SLIDES_2_OF_3 | {".attention.key_length": 64, ".attention.value_length": 64},
}

_PLAIN = [
    "afmoe", "arcee", "arctic", "baichuan", "bailingmoe", "bailingmoe2", "bitnet", "bloom",
    "chatglm", "codeshell", "cogvlm", "cohere2", "command-r", "dbrx", "deci", "deepseek",
    "ernie4_5", "ernie4_5-moe", "exaone", "exaone-moe", "falcon", "falcon-h1", "gemma",
    "gemma2", "gemma3", "glm4", "gpt-oss", "gpt2", "gptneox", "granite", "granitemoe", "grok",
    "grovemoe", "hunyuan-dense", "hunyuan-moe", "hunyuan_vl", "internlm2", "jais", "jais2",
    "laguna", "llama", "llama4", "maincoder", "mamba", "mamba2", "mellum", "minicpm",
    "minimax-01", "minimax-m2", "minimax-m3", "mistral3", "mpt", "muse-glimmer", "nanbeige",
    "nemotron", "olmo", "olmo2", "openelm", "orion", "paddleocr", "pangu-embedded", "phi2",
    "phi3", "phimoe", "plamo", "plamo3", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3",
    "qwen3moe", "qwen3vl", "qwen3vlmoe", "refact", "rwkv7", "seed_oss", "smallthinker",
    "smollm3", "stablelm", "starcoder", "starcoder2", "talkie", "xverse",
]  # fmt: skip

_VARIANTS: dict[str, tuple[str, dict[str, Value]]] = {
    "exaone4, small": ("exaone4", {}),
    "gemma3 without a window": ("gemma3", {".attention.sliding_window": 0}),
    "gemma3, its own period": ("gemma3", {".attention.sliding_window_pattern": 3}),
    "gemma3, its own layers": ("gemma3", _SLIDES_2_OF_3),
    "llama4 without chunks": ("llama4", {".attention.sliding_window": 0}),
    "deepseek2 without MLA": ("deepseek2", _WIDE_KEYS),
    "hy_v4 without an indexer": ("hy_v4", _MLA | {".attention.indexer.top_k": 0}),
    "glm-dsa, long": ("glm-dsa", _MLA | {".context_length": 2**20}),
    "qwen35, its own layers": (
        "qwen35",
        _DELTA_NET | {".attention.recurrent_layers": _layers(4, 1, 0, 1)},
    ),
    "lfm2 without a window": ("lfm2", _KV_IN_1_OF_3 | {".attention.sliding_window": 0}),
}

CASES: dict[str, tuple[str, dict[str, Value]]] = (
    {name: (name, {}) for name in _PLAIN}
    | {name: (name, special) for name, special in _SPECIAL.items()}
    | _VARIANTS
)
"""A name for each case, with the architecture and what differs from the base."""


def write_imagined(path: Path, case: str) -> Path:
    """Write the metadata of a case, without tensors and vocabulary."""
    architecture, special = CASES[case]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_BASE | special).items():
        name = architecture + key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            kinds = gguf.GGUFValueType
            writer.add_key_value(name, value, kinds.ARRAY, sub_type=kinds.UINT32)
    writer.add_tokenizer_model("no_vocab")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
