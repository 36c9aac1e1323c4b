"""Asks llama.cpp itself what caches it would make. Run as a program: one JSON line for each file.

A crash in native code must not take the tests along, so this is never imported by them. With
`--from-metadata` the model is built from the metadata alone, its tensors only imagined.
"""

import ctypes
import json
import re
import sys
from pathlib import Path

import llama_cpp

_LIBRARIES = Path(llama_cpp.__file__).parent / "lib"

N_CTX = 8192
N_SEQ_MAX = 16
N_UBATCH = 64

_CACHE = re.compile(
    r"llama_kv_cache: size = .*\(\s*(\d+) cells,\s*(\d+) layers,\s*(\d+)/(\d+) seqs\), "
    r"K \(\w+\):\s*([\d.]+) MiB, V \(\w+\):\s*([\d.]+) MiB"
)
_STATE = re.compile(
    r"llama_memory_recurrent: size = .*\(\s*(\d+) cells.* R \(f32\):\s*([\d.]+) MiB, "
    r"S \(f32\):\s*([\d.]+) MiB, P \(f32\):\s*([\d.]+) MiB"
)


def main(arguments: list[str]) -> None:
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(_level: int, text: bytes, _user: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    llama_cpp.llama_log_set(log, None)
    llama_cpp.llama_backend_init()
    imagined = arguments[:1] == ["--from-metadata"]
    for path in arguments[imagined:]:
        lines.clear()
        facts = _create(path, imagined=imagined)
        answer = {"path": path, "facts": facts, **_caches("".join(lines))}
        if not facts:
            answer["log"] = "".join(lines)[-2000:]
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _create(path: str, *, imagined: bool) -> dict[str, int]:
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = 0
    params.use_extra_bufts = False
    params.n_gpu_layers = 0
    params.load_mtp = imagined
    if imagined:
        model = _imagine(path, params)
    else:
        model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    if not model:
        return {}
    context = llama_cpp.llama_context_default_params()
    context.n_ctx = N_CTX
    context.n_batch = context.n_ubatch = N_UBATCH
    context.n_seq_max = N_SEQ_MAX
    context.kv_unified = True
    context.swa_full = False
    context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    created = llama_cpp.llama_init_from_model(model, context)
    if not created:
        return {}
    facts = {
        "size_bytes": llama_cpp.llama_model_size(model),
        "n_ctx_train": llama_cpp.llama_model_n_ctx_train(model),
        "n_embd": llama_cpp.llama_model_n_embd(model),
        "n_layer": llama_cpp.llama_model_n_layer(model),
        "n_vocab": llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)),
    }
    llama_cpp.llama_free(created)
    llama_cpp.llama_model_free(model)
    return facts


def _imagine(path: str, params: llama_cpp.llama_model_params) -> object:
    class InitParams(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    library = ctypes.CDLL(str(next(_LIBRARIES.glob("*ggml-base*"))))
    library.gguf_init_from_file.restype = ctypes.c_void_p
    library.gguf_init_from_file.argtypes = (ctypes.c_char_p, InitParams)
    metadata = library.gguf_init_from_file(path.encode(), InitParams(True, None))
    no_data = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: None)
    return llama_cpp.llama_model_init_from_user(metadata, no_data, None, params)


def _caches(log: str) -> dict[str, object]:
    return {
        "kv": [
            {"cells": int(cells), "k_mib": float(k), "v_mib": float(v)}
            for cells, _, _, _, k, v in _CACHE.findall(log)
        ],
        "states": [
            {"rows": int(rows), "r_mib": float(r) + float(p), "s_mib": float(s)}
            for rows, r, s, p in _STATE.findall(log)
        ],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
