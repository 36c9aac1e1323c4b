"""`gguf_tokenizer.py MODEL.gguf FOLDER`: a SentencePiece GGUF's tokenizer as a folder that
transformers opens, for clients such as lm-eval where no model hub can be reached.

Needs `gguf` and `transformers`, not torch. Only `tokenizer.ggml.model = llama` (Gemma, Llama 2,
Mistral) is understood; other files are refused.
"""

import sys

from gguf import GGUFReader
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

CONTROL, USER_DEFINED = 3, 4
"""Token types of GGUF that are matched before the text is split (llama.cpp's llama.h)."""
BLANK = "▁"


def merges_of(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece joins the pair whose result has the best score: as BPE merges, best first, and
    of one result the pairs whose parts are themselves the better ones."""
    rank = {token: index for index, token in enumerate(tokens)}
    score = dict(zip(tokens, scores, strict=True))
    found = []
    for token in tokens:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        known.sort(key=lambda pair: (rank[pair[0]], rank[pair[1]]))
        found += [(score[token], pair) for pair in known]
    found.sort(key=lambda each: -each[0])
    return [pair for _, pair in found]


def main(source: str, folder: str) -> None:
    fields = GGUFReader(source).fields
    value = {name: field.contents() for name, field in fields.items() if "tokenizer" in name}
    if value["tokenizer.ggml.model"] != "llama":
        sys.exit(f"{source}: a {value['tokenizer.ggml.model']} tokenizer, not SentencePiece")
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            {token: index for index, token in enumerate(tokens)},
            merges_of(tokens, value["tokenizer.ggml.scores"]),
            unk_token=tokens[value.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Replace(" ", BLANK)]
    if value.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(" "))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_special_tokens(
                [AddedToken(token, special=kind == CONTROL, normalized=False)]
            )
    bos = value.get("tokenizer.ggml.bos_token_id")
    if bos is not None and value.get("tokenizer.ggml.add_bos_token", True):
        # Without it a model that was trained with it answers nonsense.
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)]
        )
    named = {
        f"{name}_token": tokens[value[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in value
    }
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
