"""The header reader: what it reads, and each way in which a file can be wrong."""

import os
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest

from kvserve.errors import BadModelFile
from kvserve.gguf import header, source, tensor_types
from kvserve.gguf.header import ArrayValue, LongText, read_header
from tests.gguf.hostile import HOSTILE
from tests.gguf.raw import ARRAY, LLAMA, STRING, U8, U32, RawFile, array, pair, string, u32
from tests.models import PRESETS


def write(path: Path, content: RawFile | bytes) -> Path:
    path.write_bytes(bytes(content))
    return path


def complaint(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        read_header(path)
    message = caught.value.message
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


def test_reads_values_and_tensors(tmp_path: Path) -> None:
    read = read_header(write(tmp_path / "m.gguf", RawFile()))
    assert read.version == 3
    assert read.values["general.architecture"] == "llama"
    assert read.values["llama.block_count"] == 1
    assert read.values["tokenizer.ggml.tokens"] == ArrayValue(8, None)
    assert read.values["tokenizer.ggml.scores"] == ArrayValue(8, (0.5,) * 8)
    assert [item.size_bytes for item in read.tensors] == [1024, 128, 4096]
    assert read.data_offset % 32 == 0
    assert read.file_bytes == (tmp_path / "m.gguf").stat().st_size


def test_version_2_reads_alike(tmp_path: Path) -> None:
    older = read_header(write(tmp_path / "2.gguf", RawFile(version=2)))
    newer = read_header(write(tmp_path / "3.gguf", RawFile(version=3)))
    assert older.tensors == newer.tensors
    assert older.sha256 != newer.sha256


def test_long_arrays_and_texts_are_stepped_over(tmp_path: Path) -> None:
    n_long = header.KEPT_ARRAY_ELEMENTS + 1
    pairs = (
        *LLAMA,
        pair("long", ARRAY, array(U8, [bytes(n_long)], n_long)),
        pair("short", ARRAY, array(U8, [b"\1\2\3"], 3)),
        pair("text", STRING, string(bytes(header.KEPT_TEXT_BYTES + 1))),
        pair("last", U32, u32(7)),
    )
    values = read_header(write(tmp_path / "m.gguf", RawFile(pairs=pairs))).values
    assert values["long"] == ArrayValue(n_long, None)
    assert values["short"] == ArrayValue(3, (1, 2, 3))
    assert values["text"] == LongText(header.KEPT_TEXT_BYTES + 1)
    assert values["last"] == 7


def test_kept_elements_and_texts_have_a_budget(tmp_path: Path) -> None:
    n_arrays = header.KEPT_ELEMENTS // header.KEPT_ARRAY_ELEMENTS + 1
    n_texts = header.KEPT_TEXTS_BYTES // header.KEPT_TEXT_BYTES + 1
    full = header.KEPT_ARRAY_ELEMENTS
    pairs = [pair(f"a{i}", ARRAY, array(U8, [bytes(full)], full)) for i in range(n_arrays)]
    pairs += [pair(f"t{i}", STRING, string(b"x" * 2**20)) for i in range(n_texts)]
    values = read_header(write(tmp_path / "m.gguf", RawFile(pairs=tuple(pairs)))).values
    kept = [isinstance(v, ArrayValue) and v.values is not None for v in values.values()]
    assert sum(kept) == n_arrays - 1
    assert sum(isinstance(value, LongText) for value in values.values()) == 1


def test_sizes_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for number, (elements, size_bytes) in gguf.GGML_QUANT_SIZES.items():
        if number.name != "Q8_1":  # the package counts two f32 in it, ggml two f16
            known = tensor_types.TENSOR_TYPES[int(number)]
            assert known == tensor_types.TensorType(number.name, elements, size_bytes)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    content, expected = HOSTILE[case]
    path = write(tmp_path / "m.gguf", content)
    begun = time.perf_counter()
    tracemalloc.start()
    try:
        message = complaint(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert message.startswith(expected)
    assert time.perf_counter() - begun < 1
    assert peak_bytes < path.stat().st_size + 2**18


def test_a_damaged_size_is_told_with_the_whole_size(tmp_path: Path) -> None:
    whole = bytes(RawFile())
    message = complaint(write(tmp_path / "m.gguf", whole[:-100]))
    assert message == (
        f"is truncated: tensor 'blk.0.attn_q.weight' ends at byte {len(whole):,}, "
        f"the file has {len(whole) - 100:,}; download it again"
    )


def test_missing_directory_and_device(tmp_path: Path) -> None:
    assert complaint(tmp_path / "no.gguf") == "does not exist: check the path"
    assert complaint(tmp_path) == "is a directory: name the .gguf file in it"
    (tmp_path / "plain").touch()
    assert complaint(tmp_path / "plain" / "m.gguf") == "does not exist: check the path"
    os.mkfifo(tmp_path / "pipe")
    assert complaint(tmp_path / "pipe") == "is not a regular file: name a .gguf file"


def test_no_permission() -> None:
    # Not below tmp_path: only its owner may enter that, and root may read every file.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        path = write(Path(folder) / "m.gguf", RawFile())
        path.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            assert complaint(path) == "may not be read by this user: change its permissions"
        finally:
            os.seteuid(user)


def test_a_path_with_control_characters_stays_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"a\\nb.gguf does not exist"):
        read_header(tmp_path / "a\nb.gguf")


def test_endless_strings_are_bounded(tmp_path: Path) -> None:
    start = RawFile(pairs=(pair("k", ARRAY, array(STRING, [], source.MAX_STRINGS)),), tensors=())
    path = write(tmp_path / "m.gguf", start.header())
    with path.open("r+b") as file:
        file.truncate(2**30)
    begun = time.perf_counter()
    read = read_header(path)
    assert read.values["k"] == ArrayValue(source.MAX_STRINGS, None)
    assert time.perf_counter() - begun < 5


def test_a_header_is_bounded(tmp_path: Path) -> None:
    n_bytes = source.MAX_HEADER_BYTES + 1
    start = RawFile(pairs=(pair("k", ARRAY, array(U8, [], n_bytes)),), tensors=())
    path = write(tmp_path / "m.gguf", start.header())
    with path.open("r+b") as file:
        file.truncate(2 * n_bytes)
    assert complaint(path).startswith("has a header of more than 268,435,456 bytes")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_full_vocabulary_is_read_fast(preset: str, presets: dict[str, Path]) -> None:
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        read = read_header(presets[preset])
        seconds.append(time.perf_counter() - begun)
    assert read.values["tokenizer.ggml.tokens"] == ArrayValue(PRESETS[preset][0].n_vocab, None)
    assert min(seconds) < 1.0
