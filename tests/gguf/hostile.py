"""Files that are wrong, each in one way, with the beginning of what is said about it."""

from tests.gguf.raw import (
    ARRAY,
    LLAMA,
    Q4_K,
    STRING,
    TENSORS,
    U8,
    U32,
    U64,
    RawFile,
    array,
    pair,
    string,
    tensor,
    u32,
    u64,
)

HUGE = 2**60
HOSTILE: dict[str, tuple[RawFile | bytes, str]] = {
    "empty": (b"", "is empty: download it again"),
    "three bytes": (b"GGU", "is not a GGUF file: name a .gguf file"),
    "magic alone": (
        b"GGUF",
        "is truncated or damaged: its version would end at byte 8, the file has 4",
    ),
    "safetensors": (
        u64(100) + b'{"__metadata__":{}}',
        "is a safetensors file, not a GGUF file: convert it first",
    ),
    "zip": (
        b"PK\x03\x04" + bytes(100),
        "is a zip archive (a PyTorch checkpoint?), not a GGUF file",
    ),
    "web page": (b"\n<!DOCTYPE html><html>404", "is a web page, not a model: the download failed"),
    "json": (
        b'{"error":"Repository not found"}',
        "is a JSON text, not a model: the download failed, download it again",
    ),
    "lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid",
        "is a Git LFS pointer, not the model: run git lfs pull",
    ),
    "zeros": (bytes(4096), "begins with zeros: its download has not finished, download it again"),
    "old format": (
        b"tjgg" + bytes(100),
        "is in the old GGJT format, which llama.cpp has dropped: take a GGUF file",
    ),
    "big endian": (
        RawFile(version=0x03000000),
        "is a big-endian GGUF file: take the little-endian one",
    ),
    "version 0": (RawFile(version=0), "is GGUF version 0, and only 2 and 3 can be read"),
    "version 1": (
        RawFile(version=1),
        "is GGUF version 1, which llama.cpp has dropped: convert the model again",
    ),
    "version 4": (RawFile(version=4), "is GGUF version 4, and only 2 and 3 can be read"),
    "tensor count": (
        RawFile(n_tensors=HUGE),
        "declares 1,152,921,504,606,846,976 tensors, more than its",
    ),
    "key count": (
        RawFile(n_keys=HUGE),
        "declares 1,152,921,504,606,846,976 metadata keys, more than its",
    ),
    "key count off by one": (
        RawFile(n_keys=len(LLAMA) + 1),
        "is truncated or damaged: its name of tensor 0 would end at byte",
    ),
    "key length": (
        RawFile(pairs=(u64(HUGE) + b"abc",)),
        "is truncated or damaged: its metadata key 0 would end at byte 1,152,921,504",
    ),
    "key length 2**64 - 1": (
        RawFile(pairs=(u64(2**64 - 1) + b"abc",)),
        "is truncated or damaged: its metadata key 0 would end at byte",
    ),
    "long key": (
        RawFile(pairs=(pair("k" * 2**16, U8, b"\0"),)),
        "has a metadata key 0 of 65,536 bytes, and 65,535 are the most",
    ),
    "key not UTF-8": (
        RawFile(pairs=(pair(b"\xff\xfe", U8, b"\0"),)),
        "has bytes that are not UTF-8 in its metadata key 0; it is damaged",
    ),
    "key without a name": (
        RawFile(pairs=(pair("", U8, b"\0"),)),
        "has a metadata key of no name; it is damaged",
    ),
    "key twice": (
        RawFile(pairs=(*LLAMA, LLAMA[0])),
        "has the metadata key 'general.architecture' twice; it is damaged",
    ),
    "text length": (
        RawFile(pairs=(pair("k", STRING, u64(HUGE)),)),
        "is truncated or damaged: its metadata 'k' would end at byte",
    ),
    "text not UTF-8": (
        RawFile(pairs=(pair("k", STRING, string(b"\xc3\x28")),)),
        "has bytes that are not UTF-8 in its metadata 'k'; it is damaged",
    ),
    "value type": (
        RawFile(pairs=(pair("k", 13, b""),)),
        "has the unknown value type 13 in its metadata 'k'; download it again",
    ),
    "array count": (
        RawFile(pairs=(pair("k", ARRAY, array(U64, [], HUGE)),)),
        "is truncated or damaged: its metadata 'k' would end at byte",
    ),
    "array type": (
        RawFile(pairs=(pair("k", ARRAY, array(99, [], 1)),)),
        "has the unknown value type 99 in its metadata 'k'; download it again",
    ),
    "string count": (
        RawFile(pairs=(pair("k", ARRAY, array(STRING, [], HUGE)),)),
        "declares 1,152,921,504,606,846,976 strings in its metadata 'k', more than its",
    ),
    "string length": (
        RawFile(pairs=(pair("k", ARRAY, array(STRING, [u64(HUGE)])),)),
        "is truncated or damaged: its metadata 'k' would end at byte",
    ),
    "string length 2**64 - 1": (
        RawFile(pairs=(pair("k", ARRAY, array(STRING, [u64(2**64 - 1)] * 3)),)),
        "is truncated or damaged: its metadata 'k' would end at byte",
    ),
    "nested arrays": (
        RawFile(pairs=(pair("k", ARRAY, u32(ARRAY) + u64(1) + (u32(ARRAY) + u64(1)) * 1000),)),
        "has arrays inside the array of its metadata 'k', which no model uses",
    ),
    "hostile key name": (
        RawFile(pairs=(pair("a\n\x1b[31m" + "b" * 200, 99, b""),)),
        r"has the unknown value type 99 in its metadata 'a\n\x1b[31mbbb",
    ),
    "alignment 0": (
        RawFile(pairs=(*LLAMA, pair("general.alignment", U32, u32(0)))),
        "has general.alignment 0, not a power of two up to 1,048,576",
    ),
    "alignment 48": (
        RawFile(pairs=(*LLAMA, pair("general.alignment", U32, u32(48)))),
        "has general.alignment 48, not a power of two",
    ),
    "alignment 2**31": (
        RawFile(pairs=(*LLAMA, pair("general.alignment", U32, u32(2**31)))),
        "has general.alignment 2,147,483,648, not a power of two",
    ),
    "alignment in words": (
        RawFile(pairs=(*LLAMA, pair("general.alignment", STRING, string("32")))),
        "has general.alignment 0, not a power of two",
    ),
    "tensor twice": (
        RawFile(tensors=(TENSORS[0], TENSORS[0])),
        "has the tensor 'token_embd.weight' twice; it is damaged",
    ),
    "tensor name": (
        RawFile(tensors=(tensor("n" * 64),)),
        "has a name of tensor 0 of 64 bytes, and 63 are the most",
    ),
    "tensor name not UTF-8": (
        RawFile(tensors=(tensor(b"\xff"),)),
        "has bytes that are not UTF-8 in its name of tensor 0",
    ),
    "five dimensions": (
        RawFile(tensors=(tensor("t", [1] * 5),)),
        "has 5 dimensions in tensor 't', and 4 are the most",
    ),
    "dimension count": (
        RawFile(tensors=(tensor("t", [1], n_dims=2**32 - 1),)),
        "has 4,294,967,295 dimensions in tensor 't'",
    ),
    "dimensions overflow": (
        RawFile(tensors=(tensor("t", [2**32, 2**32]),)),
        "has dimensions in tensor 't' that overflow 64 bits; it is damaged",
    ),
    "dimension overflow of nothing": (
        RawFile(tensors=(tensor("t", [2**64 - 1, 0]),)),
        "has dimensions in tensor 't' that overflow 64 bits",
    ),
    "tensor type": (
        RawFile(tensors=(tensor("t", kind=43),)),
        "has the unknown tensor type 43 in tensor 't'; download it again",
    ),
    "removed type": (
        RawFile(tensors=(tensor("t", kind=31),)),
        "uses Q4_0_4_4 in tensor 't', which ggml has dropped: convert the model again",
    ),
    "broken block": (
        RawFile(tensors=(tensor("t", (100, 4), kind=Q4_K),)),
        "has rows of 100 elements in tensor 't', and Q4_K needs a multiple of 256; it is damaged",
    ),
    "offset": (
        RawFile(tensors=(tensor("t", offset=64),)),
        "has tensor 't' at offset 64 where 0 was due; it is damaged",
    ),
    "offset 2**64 - 32": (
        RawFile(tensors=(tensor("t", offset=2**64 - 32),)),
        "has tensor 't' at offset 18,446,744,073,709,551,584 where 0 was due",
    ),
    "size": (
        RawFile(tensors=(tensor("t", (2**40, 2**10)),)),
        "is truncated: tensor 't' ends at byte 4,503,599,627,37",
    ),
    "cut in the data": (
        bytes(RawFile())[:-1],
        "is truncated: tensor 'blk.0.attn_q.weight' ends at byte",
    ),
    "cut in the tensors": (
        RawFile().header()[:-1],
        "is truncated or damaged: its tensor 'blk.0.attn_q.weight' would end at byte",
    ),
}
