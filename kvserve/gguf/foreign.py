"""What a file without the GGUF magic is, told from its first bytes."""

from typing import Final

_BY_START: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "is a zip archive (a PyTorch checkpoint?), not a GGUF file: convert it first"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model: run git lfs pull"),
    (b"\x1f\x8b", "is a gzip archive, not a GGUF file: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is a zstd archive, not a GGUF file: unpack it first"),
    (b"FUGG", "is a big-endian GGUF file: take the little-endian one"),
    (b"lmgg", "is in the old GGML format, which llama.cpp has dropped: take a GGUF file"),
    (b"fmgg", "is in the old GGML format, which llama.cpp has dropped: take a GGUF file"),
    (b"tjgg", "is in the old GGJT format, which llama.cpp has dropped: take a GGUF file"),
    (b"algg", "is an old GGLA adapter, not a model: name a GGUF file"),
    (b"\x80\x02", "is a Python pickle, not a GGUF file: convert it first"),
)


def foreign_kind(start: bytes) -> str:
    """Describe a file by its first bytes (up to 1,024) and say what to do about it."""
    for magic, kind in _BY_START:
        if start.startswith(magic):
            return kind
    text = start.lstrip()[:64].lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a model: the download failed, download it again"
    if _is_safetensors(start):
        return "is a safetensors file, not a GGUF file: convert it first"
    if text.startswith((b"{", b"[")):
        return "is a JSON text, not a model: the download failed, download it again"
    if not start.strip(b"\0"):
        return "begins with zeros: its download has not finished, download it again"
    return "is not a GGUF file: name a .gguf file"


def _is_safetensors(start: bytes) -> bool:
    if len(start) < 9 or start[8:9] != b"{":
        return False
    return 2 <= int.from_bytes(start[:8], "little") <= 2**32
