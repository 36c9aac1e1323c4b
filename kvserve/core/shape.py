"""What a model's file says about its memory: the shape, without the weights.

`gguf/` builds these values from a header; `core/memory` turns them into bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionCache:
    """The KV rows that one layer keeps for each token.

    `k_elements` and `v_elements` are per token (heads x head size); V is 0 where the cache holds
    K only (MLA). `window` is the sliding window in tokens, None for full attention.
    """

    k_elements: int
    v_elements: int
    k_head_size: int
    v_head_size: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class RecurrentState:
    """The f32 state that one layer keeps for each sequence (llama_hparams::n_embd_r, n_embd_s).

    `r_elements` is the convolution (or token shift) part, `s_elements` the state matrix.
    """

    r_elements: int
    s_elements: int


@dataclass(frozen=True, slots=True)
class Widths:
    """Row widths of what one block computes, in elements; 0 for what the block has not.

    `q` is the query projection (a query gate included), `qkv` one for query, key and value,
    `attention` what the output projection takes. `kv_lora_rope`, `kv_lora`, `mla_v` and `q_lora`
    belong to MLA. `ff_up`, `ff_gate` and `ff` are the dense feed-forward network's parts before
    and after its activation, `shared_ff` the shared experts'; `expert_ff` is one routed expert
    after the activation, `expert_gate_up` its joint projection. The rest belongs to recurrent
    layers.
    """

    q: int = 0
    qkv: int = 0
    q_lora: int = 0
    kv_lora_rope: int = 0
    kv_lora: int = 0
    mla_v: int = 0
    attention: int = 0
    gate: int = 0
    ff_up: int = 0
    ff_gate: int = 0
    ff: int = 0
    shared_ff: int = 0
    shared_gate: int = 0
    expert_ff: int = 0
    expert_gate: int = 0
    expert_gate_up: int = 0
    ssm_in: int = 0
    ssm_inner: int = 0
    ssm_norm: int = 0
    ssm_alpha: int = 0
    conv: int = 0
    conv_kernel: int = 0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One transformer block: its weights and what it keeps in memory.

    A layer that reuses another layer's cache (Gemma 3n) has neither attention nor recurrent.
    `expert_bytes` is the part of `weights_bytes` in routed MoE expert tensors. `widths` None
    means that only the model's own figures are known. `matrices` are names and bytes.
    """

    index: int
    weights_bytes: int
    expert_bytes: int = 0
    attention: AttentionCache | None = None
    recurrent: RecurrentState | None = None
    widths: Widths | None = None
    matrices: tuple[tuple[str, int], ...] = ()

    def matrix_bytes(self, name: str) -> int:
        """Bytes of one matrix by its name in the file (`ffn_up`); 0 where there is none."""
        return next((n_bytes for other, n_bytes in self.matrices if other == name), 0)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as its GGUF header describes it. Element counts are per token, sizes in bytes.

    `input_bytes` are the token embeddings (and the like) that llama.cpp keeps on the host.
    `output_bytes` are the output matrix and final norms; `tied_bytes` of them are a second copy
    of the token embeddings, which is none where both lie in the same memory. `n_ff` is the widest
    feed-forward layer, experts in use included.
    """

    architecture: str
    name: str | None
    quantization: str | None
    file_bytes: int
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_expert: int
    n_expert_used: int
    layers: tuple[LayerShape, ...]
    input_bytes: int
    output_bytes: int
    tied_bytes: int
    has_chat_template: bool
    has_attention_sinks: bool = False

    def __hash__(self) -> int:
        # Estimates are remembered by shape; hashing every layer would take longer than they do.
        return hash((self.architecture, self.file_bytes, self.n_embd, self.n_vocab))

    @property
    def n_layer(self) -> int:
        """Number of transformer blocks."""
        return len(self.layers)

    @property
    def weights_bytes(self) -> int:
        """All weights, tied embeddings counted once."""
        blocks = sum(layer.weights_bytes for layer in self.layers)
        return blocks + self.input_bytes + self.output_bytes - self.tied_bytes

    @property
    def expert_bytes(self) -> int:
        """All routed expert weights."""
        return sum(layer.expert_bytes for layer in self.layers)

    @property
    def attention_layers(self) -> tuple[LayerShape, ...]:
        """The layers that keep KV rows."""
        return tuple(layer for layer in self.layers if layer.attention is not None)

    @property
    def takes_back(self) -> bool:
        """Whether the last tokens of a sequence can be removed from its memory again: neither from
        a recurrent state nor from DeepSeek V4's compressed caches."""
        recurrent = any(layer.recurrent is not None for layer in self.layers)
        return not recurrent and self.architecture != "deepseek4"

    @property
    def mla(self) -> bool:
        """Whether the cache holds K only, which needs equal types (multi-head latent attention)."""
        caches = [layer.attention for layer in self.layers if layer.attention is not None]
        return bool(caches) and all(cache.v_elements == 0 for cache in caches)
