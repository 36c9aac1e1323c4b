"""Well-known models' dimensions, for headers of full size in front of nothing."""

from tests.gguf.families import Spec

_32K, _128K = 32768, 131072

FULL_SIZE: dict[str, Spec] = {
    "llama3-8b": Spec("llama", 32, 4096, 32, 8, 128, 14336, _128K, 128256),
    "llama3.2-1b": Spec("llama", 16, 2048, 32, 8, 64, 8192, _128K, 128256, tied=True),
    "qwen2.5-7b": Spec("qwen2", 28, 3584, 28, 4, 128, 18944, _128K, 152064),
    "qwen2.5-32b": Spec("qwen2", 64, 5120, 40, 8, 128, 27648, _128K, 152064),
    "qwen3-8b": Spec("qwen3", 36, 4096, 32, 8, 128, 12288, _128K, 151936),
    "phi-mini": Spec("phi3", 32, 3072, 32, 32, 96, 8192, _128K, 32064),
    "gemma2-9b": Spec(
        "gemma2", 42, 3584, 16, 8, 256, 14336, _128K, 256000,
        tied=True, window=4096, full_every=2,
    ),
    "gemma3-4b": Spec(
        "gemma3", 34, 2560, 8, 4, 256, 10240, _128K, 262208,
        tied=True, window=1024, full_every=6,
    ),
    "gemma3-12b": Spec(
        "gemma3", 48, 3840, 16, 8, 256, 15360, _128K, 262208,
        tied=True, window=1024, full_every=6,
    ),
    "qwen3-30b-a3b": Spec(
        "qwen3moe", 48, 2048, 32, 4, 128, 6144, _128K, 151936,
        n_expert=128, n_expert_used=8, n_ff_exp=768,
    ),
    "gpt-oss-20b": Spec(
        "gpt-oss", 24, 2880, 64, 8, 64, 2880, _128K, 201088,
        n_expert=32, n_expert_used=4, n_ff_exp=2880, window=128, full_every=2,
    ),
    "deepseek-v2-lite": Spec(
        "deepseek2", 27, 2048, 16, 1, 128, 10944, _128K, 102400,
        n_expert=64, n_expert_used=6, n_ff_exp=1408,
        kv_lora_rank=512, q_lora_rank=0, rope_dim=64,
    ),
    "deepseek-v2": Spec(
        "deepseek2", 60, 5120, 128, 1, 128, 12288, _128K, 102400,
        n_expert=160, n_expert_used=6, n_ff_exp=1536,
        kv_lora_rank=512, q_lora_rank=1536, rope_dim=64,
    ),
    "mamba2-2.7b": Spec(
        "mamba2", 64, 2560, 1, 1, 64, 256, _128K, 50288,
        ssm_state=128, ssm_inner=5120, ssm_heads=80, ssm_groups=1,
    ),
    "granite4-3b": Spec(
        "granitehybrid", 40, 2560, 40, 8, 64, 8192, _128K, 100352,
        tied=True, full_every=10, ssm_state=128, ssm_inner=5120, ssm_heads=80, ssm_groups=1,
    ),
    "qwen3.5-4b": Spec(
        "qwen35", 32, 2560, 16, 4, 256, 9216, 2 * _128K, 248320,
        tied=True, full_every=4, ssm_state=128, ssm_inner=4096, ssm_heads=32, ssm_groups=16,
    ),
    "qwen3.5-35b-a3b": Spec(
        "qwen35moe", 40, 2048, 16, 2, 256, 512, 2 * _128K, 248320,
        n_expert=256, n_expert_used=8, n_ff_exp=512,
        full_every=4, ssm_state=128, ssm_inner=4096, ssm_heads=32, ssm_groups=16,
    ),
}  # fmt: skip
