"""The metadata and tensors of the architectures that `tests.models` writes.

Shapes follow `load_arch_tensors` in llama.cpp's src/models/, which refuses any other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

Metadata = dict[str, object]
Tensors = list[tuple[str, tuple[int, ...]]]
_Block = Iterator[tuple[str, tuple[int, ...]]]


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


def describe(spec: Spec) -> tuple[Metadata, Tensors]:
    """Give the metadata and the tensors (ggml order, fastest dimension first) of a spec."""
    metadata: Metadata = {
        # llama.cpp looks for special tokens in vocabularies of models named phi3.
        "general.name": f"Tiny {spec.arch.replace('phi3', 'phi')}",
        ".context_length": spec.n_ctx_train,
        ".embedding_length": spec.n_embd,
        ".block_count": spec.n_layer,
        ".feed_forward_length": spec.n_ff,
        ".vocab_size": spec.n_vocab,
        ".attention.layer_norm_rms_epsilon": 1e-5,
    }
    tensors: Tensors = [("token_embd.weight", (spec.n_embd, spec.n_vocab))]
    tensors.append(("output_norm.weight", (spec.n_embd,)))
    family = FAMILIES[spec.arch]
    if not spec.tied and not family.always_tied:
        tensors.append(("output.weight", (spec.n_embd, spec.n_vocab)))
    metadata |= family.metadata(spec)
    for layer in range(spec.n_layer):
        tensors += [(f"blk.{layer}.{name}", shape) for name, shape in family.block(spec, layer)]
    return metadata, tensors


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture turns a spec into metadata and the tensors of a block."""

    metadata: Callable[[Spec], Metadata]
    block: Callable[[Spec, int], _Block]
    always_tied: bool = False


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


def _softcaps() -> Metadata:
    return {".attn_logit_softcapping": 50.0, ".final_logit_softcapping": 30.0}


def _latent(spec: Spec) -> Metadata:
    return {
        ".attention.head_count": spec.n_head,
        ".attention.head_count_kv": 1,
        ".attention.key_length": spec.kv_lora_rank + spec.rope_dim,
        ".attention.value_length": spec.kv_lora_rank,
        ".attention.key_length_mla": spec.head + spec.rope_dim,
        ".attention.value_length_mla": spec.head,
        **({".attention.q_lora_rank": spec.q_lora_rank} if spec.q_lora_rank else {}),
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


def _sections(spec: Spec) -> Metadata:
    """M-RoPE: positions in time, height and width."""
    quarter = spec.head // 8
    return _heads(spec) | {".rope.dimension_sections": [quarter, quarter, quarter, quarter]}


def _hybrid(spec: Spec) -> Metadata:
    quarter = spec.head // 8
    return {
        ".full_attention_interval": spec.full_every,
        ".rope.dimension_count": spec.head // 4,
        ".rope.dimension_sections": [quarter, quarter, quarter, 0],
    }


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
    q = spec.n_head * (spec.head + spec.rope_dim)
    yield "attn_norm.weight", (spec.n_embd,)
    yield "attn_kv_a_norm.weight", (spec.kv_lora_rank,)
    if spec.q_lora_rank:
        yield "attn_q_a_norm.weight", (spec.q_lora_rank,)
        yield "attn_q_a.weight", (spec.n_embd, spec.q_lora_rank)
        yield "attn_q_b.weight", (spec.q_lora_rank, q)
    else:
        yield "attn_q.weight", (spec.n_embd, q)
    yield "attn_kv_a_mqa.weight", (spec.n_embd, spec.kv_lora_rank + spec.rope_dim)
    yield "attn_k_b.weight", (spec.head, spec.kv_lora_rank, spec.n_head)
    yield "attn_v_b.weight", (spec.kv_lora_rank, spec.head, spec.n_head)
    yield "attn_output.weight", (spec.n_head * spec.head, spec.n_embd)
    if layer == 0:
        yield from _dense_ff(spec)
        return
    yield from _expert_ff(spec)
    yield from _shared_expert(spec)


def _shared_expert(spec: Spec) -> _Block:
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


def _phi3_block(spec: Spec, _: int) -> _Block:
    yield "attn_norm.weight", (spec.n_embd,)
    yield "attn_qkv.weight", (spec.n_embd, (spec.n_head + 2 * spec.n_head_kv) * spec.head)
    yield "attn_output.weight", (spec.n_embd, spec.n_embd)
    yield "ffn_norm.weight", (spec.n_embd,)
    yield "ffn_up.weight", (spec.n_embd, 2 * spec.n_ff)
    yield "ffn_down.weight", (spec.n_ff, spec.n_embd)


def _gemma2_block(spec: Spec, layer: int) -> _Block:
    yield from _llama_block(spec, layer)
    yield "post_attention_norm.weight", (spec.n_embd,)
    yield "post_ffw_norm.weight", (spec.n_embd,)


def _granitehybrid_block(spec: Spec, layer: int) -> _Block:
    if (layer + 1) % spec.full_every == 0:
        yield from _attention(spec)
    else:
        yield from _mamba2_block(spec, layer)
    yield from _dense_ff(spec)


def _granitehybrid(spec: Spec) -> Metadata:
    kv_heads = [
        spec.n_head_kv if (layer + 1) % spec.full_every == 0 else 0 for layer in range(spec.n_layer)
    ]
    return _heads(spec) | _states(spec) | {".attention.head_count_kv": kv_heads}


def _qwen35moe_block(spec: Spec, layer: int) -> _Block:
    yield from _qwen35_mixer(spec, layer)
    yield "post_attention_norm.weight", (spec.n_embd,)
    yield from _expert_ff(spec, norm=None)
    yield "ffn_gate_inp_shexp.weight", (spec.n_embd,)
    yield from _shared_expert(spec)


def _qwen35_block(spec: Spec, layer: int) -> _Block:
    yield from _qwen35_mixer(spec, layer)
    yield from _dense_ff(spec, norm="post_attention_norm")


def _qwen35_mixer(spec: Spec, layer: int) -> _Block:
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


FAMILIES: dict[str, Family] = {
    "llama": Family(_heads, _llama_block),
    "qwen2": Family(_heads, _qwen2_block),
    "qwen2vl": Family(_sections, _qwen2_block),
    "qwen3": Family(_heads, _qwen3_block),
    "qwen3moe": Family(lambda spec: _heads(spec) | _experts(spec), _qwen3moe_block),
    "phi3": Family(_heads, _phi3_block),
    "gemma2": Family(
        lambda spec: _heads(spec) | _sliding(spec) | _softcaps(), _gemma2_block, always_tied=True
    ),
    "gemma3": Family(lambda spec: _heads(spec) | _sliding(spec), _gemma3_block),
    "gpt-oss": Family(lambda spec: _heads(spec) | _experts(spec) | _sliding(spec), _gpt_oss_block),
    "deepseek2": Family(lambda spec: _latent(spec) | _experts(spec), _deepseek2_block),
    "mamba2": Family(_states, _mamba2_block),
    "granitehybrid": Family(_granitehybrid, _granitehybrid_block),
    "qwen35": Family(lambda spec: _heads(spec) | _states(spec) | _hybrid(spec), _qwen35_block),
    "qwen35moe": Family(
        lambda spec: (
            _heads(spec)
            | _states(spec)
            | _hybrid(spec)
            | _experts(spec)
            | {".expert_shared_feed_forward_length": spec.n_ff_exp}
        ),
        _qwen35moe_block,
    ),
}
