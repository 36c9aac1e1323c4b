"""Model shapes for the core's tests, written out from the models' published dimensions."""

from kvserve.core.dtypes import LADDER
from kvserve.core.machine import Build, Gpu, Host, Machine
from kvserve.core.shape import AttentionCache, LayerShape, ModelShape, RecurrentState
from kvserve.units import GIB, MIB

Q4_K = 144 / 256
Q6_K = 210 / 256


def attention(n_head_kv: int, head_size: int, window: int | None = None) -> AttentionCache:
    width = n_head_kv * head_size
    return AttentionCache(width, width, head_size, head_size, window)


def llama3_8b() -> ModelShape:
    """Llama-3-8B Q4_K_M: its mix of Q4_K and Q6_K by llama.cpp's rule for half of the layers."""
    n_embd, n_ff, kv, vocab = 4096, 14336, 1024, 128256
    layers = []
    for index in range(32):
        v_and_down = Q6_K if index < 4 or index >= 28 or (index - 4) % 3 == 2 else Q4_K
        weights = (2 * n_embd * n_embd + n_embd * kv + 2 * n_embd * n_ff) * Q4_K
        weights += (n_embd * kv + n_embd * n_ff) * v_and_down + 2 * n_embd * 4
        layers.append(LayerShape(index, int(weights), attention=attention(8, 128)))
    return ModelShape(
        architecture="llama",
        name="Llama 3 8B",
        quantization="Q4_K_M",
        file_bytes=4_920_733_440,
        n_ctx_train=131072,
        n_vocab=vocab,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=32,
        n_head_kv=8,
        n_expert=0,
        n_expert_used=0,
        layers=tuple(layers),
        input_bytes=int(vocab * n_embd * Q4_K),
        output_bytes=int(vocab * n_embd * Q6_K) + n_embd * 4,
        tied_bytes=0,
        has_chat_template=True,
    )


def plain(
    *,
    n_layer: int = 32,
    n_embd: int = 4096,
    n_ff: int = 14336,
    n_head_kv: int = 8,
    head_size: int = 128,
    layer_bytes: int = 130 * MIB,
    expert_bytes: int = 0,
    n_expert: int = 0,
    n_expert_used: int = 0,
    vocab: int = 128256,
    window_every: int | None = None,
    window: int = 1024,
    attention_every: int = 1,
    n_ctx_train: int = 131072,
    mla: bool = False,
) -> ModelShape:
    """A family of shapes: sliding windows, hybrids, experts and MLA by argument."""
    layers = []
    for index in range(n_layer):
        full = window_every is None or index % window_every == window_every - 1
        cache = attention(n_head_kv, head_size, None if full else window)
        if mla:
            cache = AttentionCache(576, 0, 576, 512)
        keeps_kv = index % attention_every == attention_every - 1
        layers.append(
            LayerShape(
                index,
                layer_bytes,
                expert_bytes,
                cache if keeps_kv else None,
                None if keeps_kv else RecurrentState(3 * 8192, 128 * 4096),
            )
        )
    matrix = int(vocab * n_embd * Q4_K)
    return ModelShape(
        architecture="test",
        name="Test",
        quantization=None,
        file_bytes=n_layer * layer_bytes + 2 * matrix,
        n_ctx_train=n_ctx_train,
        n_vocab=vocab,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=32,
        n_head_kv=n_head_kv,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        layers=tuple(layers),
        input_bytes=matrix,
        output_bytes=matrix,
        tied_bytes=0,
        has_chat_template=False,
    )


def qwen25_32b() -> ModelShape:
    """Qwen2.5-32B Q4_K_M: 64 layers, 5120 wide, 8 KV heads of 128, about 19.8 GB."""
    return plain(n_layer=64, n_embd=5120, n_ff=27648, layer_bytes=int(18.9e9 / 64), vocab=152064)


def hybrid_4b() -> ModelShape:
    """The seed's hybrid: 8 attention layers of 32, 4 KV heads; about 2.7 GB of weights."""
    return plain(
        n_layer=32,
        n_embd=2560,
        n_ff=9216,
        n_head_kv=4,
        head_size=128,
        layer_bytes=int(2.0e9 / 32),
        vocab=151936,
        attention_every=4,
    )


def machine(
    vram_gib: float | None,
    *,
    total_gib: float = 8.0,
    host_gib: float = 24.0,
    capability: tuple[int, int] = (8, 9),
    bandwidth: float | None = 272e9,
    n_gpus: int = 1,
    cuda: bool = True,
) -> Machine:
    """A box with `vram_gib` free on each GPU, None for no GPU."""
    host = Host(total_bytes=int(32 * GIB), free_bytes=int(host_gib * GIB), n_cores=8)
    gpus = ()
    if vram_gib is not None:
        gpus = tuple(
            Gpu(
                index=i,
                uuid=f"GPU-{i}",
                name="RTX 4060",
                total_bytes=int(total_gib * GIB),
                free_bytes=int(vram_gib * GIB),
                compute_capability=capability,
                bandwidth=bandwidth,
            )
            for i in range(n_gpus)
        )
    return Machine(host, gpus, Build("0.3.36", cuda=cuda, kv_pairs=frozenset(LADDER)))
