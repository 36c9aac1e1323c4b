"""What llama.cpp knows of an architecture and the file does not say.

One table for each question, by `general.architecture`; an architecture in no table is plain
attention. Each row follows `load_arch_hparams` in llama.cpp's src/models/<architecture>.cpp and
`llama_model::create_memory` in src/llama-model.cpp.
"""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

_EMBEDDING = "is an embedding model, which cannot chat: take a chat model"
_DIFFUSION = "is a text diffusion model, which keeps no KV cache: take another model"
_AUDIO = "is an audio decoder, not a chat model: take a chat model"
_DRAFT = "is a draft model for speculative decoding: take the model it belongs to"
_ENCODER_DECODER = "is an encoder-decoder model, which is not supported: take a chat model"
_COMPRESSED = "keeps a compressed KV cache that cannot be planned for yet: take another model"

REFUSED: Final[dict[str, str]] = {
    "bert": _EMBEDDING,
    "modern-bert": _EMBEDDING,
    "nomic-bert": _EMBEDDING,
    "nomic-bert-moe": _EMBEDDING,
    "neo-bert": _EMBEDDING,
    "jina-bert-v2": _EMBEDDING,
    "jina-bert-v3": _EMBEDDING,
    "eurobert": _EMBEDDING,
    "gemma-embedding": _EMBEDDING,
    "llama-embed": _EMBEDDING,
    "t5encoder": _EMBEDDING,
    "t5": _ENCODER_DECODER,
    "dream": _DIFFUSION,
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "rnd1": _DIFFUSION,
    "wavtokenizer-dec": _AUDIO,
    "pockettts": _AUDIO,
    "qwen3tts": _AUDIO,
    "eagle3": _DRAFT,
    "dflash": _DRAFT,
    "gemma4-assistant": _DRAFT,
    "deepseek4": _COMPRESSED,
    "clip": "is a vision projector (mmproj), not a chat model: take the model beside it",
    "controlvector": "is a control vector, not a model: take the model it belongs to",
}
"""Architectures that cannot be served, with what to say after the file's name."""

REFUSED_FILE_TYPES: Final[dict[str, str]] = {
    "adapter": "is a LoRA adapter, not a model: take the model it belongs to",
    "imatrix": "is an importance matrix, not a model: take the model made with it",
    "mmproj": REFUSED["clip"],
}
"""The same by `general.type`."""


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Which layers slide and how far, where llama.cpp has sliding windows for an architecture.

    Of every `period` layers the last is full attention (the first with `dense_first`), the others
    slide; 0 lets all slide; None means that only an array in the file can say. `default` is the
    window where the file gives none, `fixed` one that overrules the file's. With `n_layer` the
    rule holds for that size of the model alone.
    """

    period: int | None
    dense_first: bool = False
    default: int | None = None
    fixed: int | None = None
    n_layer: int | None = None


WINDOWS: Final[dict[str, WindowRule]] = {
    "afmoe": WindowRule(4),
    "cohere2": WindowRule(4),
    "cohere2moe": WindowRule(4, dense_first=True),
    "dots3note": WindowRule(None),
    "exaone-moe": WindowRule(4, default=128),
    "exaone4": WindowRule(4, default=4096, n_layer=64),
    "gemma2": WindowRule(2, default=4096),
    "gemma3": WindowRule(6),
    "gemma3n": WindowRule(5),
    "gemma4": WindowRule(None),
    "gpt-oss": WindowRule(2),
    "granite_swa": WindowRule(None),
    "laguna": WindowRule(4, dense_first=True),
    "lfm2": WindowRule(0),
    "llama4": WindowRule(4, default=8192, fixed=8192),
    "maple": WindowRule(None),
    "mellum": WindowRule(4),
    "mimo2": WindowRule(None),
    "muse-glimmer": WindowRule(4),
    "olmo2": WindowRule(4),
    "plamo3": WindowRule(8),
    "smallthinker": WindowRule(4, dense_first=True, fixed=4096),
    "spark2_5": WindowRule(None),
    "step35": WindowRule(None),
}
"""Phi-3 is not here: llama.cpp reads its window and turns it off (pull request 13676)."""


class RecurrentLayers(Enum):
    """How a file tells its recurrent layers from the others."""

    ALL = auto()
    ALL_BESIDE_ATTENTION = auto()
    WITHOUT_KV_HEADS = auto()
    WITHOUT_KV_HEADS_OR_FF = auto()
    BY_INTERVAL = auto()


class StateKind(Enum):
    """The formula for the state of a recurrent layer (llama_hparams::n_embd_r and n_embd_s)."""

    SSM = auto()
    SSM_UNGROUPED = auto()
    TOKEN_SHIFT = auto()
    SHORT_CONV = auto()
    KDA = auto()
    LINEAR = auto()


@dataclass(frozen=True, slots=True)
class RecurrentRule:
    """Which layers keep a state, and which formula gives its size.

    `interval` is the distance of attention layers where the file names none. `draft_caches` is set
    where llama.cpp gives the draft (MTP) layers of the file KV rows in the main context too.
    """

    layers: RecurrentLayers
    state: StateKind
    interval: int = 4
    draft_caches: bool = False


RECURRENT: Final[dict[str, RecurrentRule]] = {
    "arwkv7": RecurrentRule(RecurrentLayers.ALL, StateKind.TOKEN_SHIFT),
    "bailingmoe3": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.KDA, draft_caches=True
    ),
    "falcon-h1": RecurrentRule(RecurrentLayers.ALL_BESIDE_ATTENTION, StateKind.SSM),
    "glm5-next": RecurrentRule(RecurrentLayers.WITHOUT_KV_HEADS, StateKind.KDA),
    "granitehybrid": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.SSM, draft_caches=True
    ),
    "jamba": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.SSM_UNGROUPED, draft_caches=True
    ),
    "kimi-k3": RecurrentRule(RecurrentLayers.WITHOUT_KV_HEADS, StateKind.KDA, draft_caches=True),
    "kimi-linear": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.KDA, draft_caches=True
    ),
    "lfm2": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.SHORT_CONV, draft_caches=True
    ),
    "lfm2moe": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS, StateKind.SHORT_CONV, draft_caches=True
    ),
    "mamba": RecurrentRule(RecurrentLayers.ALL, StateKind.SSM_UNGROUPED),
    "mamba2": RecurrentRule(RecurrentLayers.ALL, StateKind.SSM),
    "minimax-01": RecurrentRule(RecurrentLayers.BY_INTERVAL, StateKind.LINEAR, interval=8),
    "nemotron_h": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS_OR_FF, StateKind.SSM, draft_caches=True
    ),
    "nemotron_h_moe": RecurrentRule(
        RecurrentLayers.WITHOUT_KV_HEADS_OR_FF, StateKind.SSM, draft_caches=True
    ),
    "plamo2": RecurrentRule(RecurrentLayers.WITHOUT_KV_HEADS, StateKind.SSM, draft_caches=True),
    "qwen35": RecurrentRule(RecurrentLayers.BY_INTERVAL, StateKind.SSM),
    "qwen35moe": RecurrentRule(RecurrentLayers.BY_INTERVAL, StateKind.SSM),
    "qwen3next": RecurrentRule(RecurrentLayers.BY_INTERVAL, StateKind.SSM),
    "qwen4exp": RecurrentRule(RecurrentLayers.BY_INTERVAL, StateKind.SSM),
    "rwkv6": RecurrentRule(RecurrentLayers.ALL, StateKind.TOKEN_SHIFT),
    "rwkv6qwen2": RecurrentRule(RecurrentLayers.ALL, StateKind.TOKEN_SHIFT),
    "rwkv7": RecurrentRule(RecurrentLayers.ALL, StateKind.TOKEN_SHIFT),
}


class IndexerLayers(Enum):
    """Which layers of a sparse-attention model cache indexer keys too."""

    ALL = auto()
    BY_TYPE = auto()
    BY_TYPE_GLM = auto()
    AFTER_DENSE = auto()


@dataclass(frozen=True, slots=True)
class IndexerRule:
    """An indexer's cache: one key head a layer, `rows` keys a token, V rows with `keeps_v`."""

    layers: IndexerLayers
    rows: int = 1
    keeps_v: bool = False


INDEXERS: Final[dict[str, IndexerRule]] = {
    "deepseek32": IndexerRule(IndexerLayers.ALL),
    "dots3note": IndexerRule(IndexerLayers.BY_TYPE),
    "glm-dsa": IndexerRule(IndexerLayers.BY_TYPE_GLM),
    "glm5-next": IndexerRule(IndexerLayers.BY_TYPE, rows=3),
    "hy_v4": IndexerRule(IndexerLayers.BY_TYPE),
    "minimax-m3": IndexerRule(IndexerLayers.AFTER_DENSE, keeps_v=True),
    "qwen4exp": IndexerRule(IndexerLayers.ALL),
}

LAYERS_WITH_CACHE: Final[dict[str, int]] = {"gemma3n": 20}
"""Layers from this one on reuse the cache of an earlier layer, whatever the file says."""

SHARES_CACHE_BY_FILE: Final[frozenset[str]] = frozenset({"gemma4"})
"""The last `attention.shared_kv_layers` layers reuse the cache of an earlier layer."""

NORM_AFTER_EMBEDDING_IS_OUTPUT: Final[frozenset[str]] = frozenset({"lfm2", "lfm2moe"})
"""Their `token_embd_norm` is the output norm under a wrong name (LLM_TENSOR_OUTPUT_NORM_LFM2)."""
