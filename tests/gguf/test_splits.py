"""Models in parts: all found from any part, and each way in which they can be incomplete."""

from pathlib import Path

import pytest

from kvserve.errors import BadModelFile
from kvserve.gguf.model import read_model
from kvserve.gguf.splits import read_parts
from tests.gguf.raw import LLAMA, U32, RawFile, pair, tensor, u32

PARTS = (
    ((tensor("token_embd.weight"),), 1024),
    ((tensor("output_norm.weight", (32,)),), 128),
    ((tensor("blk.0.attn_q.weight", (32, 32)),), 4096),
)


def part(number: int, n_parts: int = 3, n_tensors: int = 3, **fields: object) -> RawFile:
    tensors, data_bytes = PARTS[number]
    split = (
        pair("split.no", U32, u32(number)),
        pair("split.count", U32, u32(n_parts)),
        pair("split.tensors.count", U32, u32(n_tensors)),
    )
    pairs = (*LLAMA, *split) if number == 0 else split
    return RawFile(pairs=pairs, tensors=tensors, data=bytes(data_bytes), **fields)  # type: ignore[arg-type]


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"m-{number + 1:05}-of-00003.gguf" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes(part(number)))
    return paths


def complaint(path: Path) -> str:
    with pytest.raises(BadModelFile) as caught:
        read_parts(path)
    return caught.value.message


def test_any_part_gives_the_whole_model(paths: list[Path]) -> None:
    models = [read_model(path) for path in paths]
    assert models[0] == models[1] == models[2]
    assert models[0].path == paths[0]
    assert models[0].parts == tuple(paths)
    assert models[0].shape.file_bytes == sum(path.stat().st_size for path in paths)
    shape = models[0].shape
    # Without an output matrix the token embeddings are copied into the output.
    assert (shape.input_bytes, shape.output_bytes) == (1024, 1024 + 128)
    assert [layer.weights_bytes for layer in shape.layers] == [4096]


def test_identity_depends_on_every_part(paths: list[Path]) -> None:
    before = read_model(paths[0]).identity
    with paths[2].open("ab") as file:
        file.write(bytes(32))
    assert read_model(paths[0]).identity != before


def test_missing_parts_are_named(paths: list[Path]) -> None:
    paths[0].unlink()
    paths[2].unlink()
    assert complaint(paths[1]) == (
        f"{paths[1]} is one of 3 parts, and 2 are missing beside it "
        "(m-00001-of-00003.gguf, m-00003-of-00003.gguf): download them into the same directory"
    )


def test_many_missing_parts_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00009.gguf"
    path.write_bytes(bytes(part(0, n_parts=9)))
    assert "m-00005-of-00009.gguf and 4 more)" in complaint(path)


def test_a_renamed_part(paths: list[Path], tmp_path: Path) -> None:
    renamed = paths[1].rename(tmp_path / "model.gguf")
    assert complaint(renamed) == (
        f"{renamed} is one of 3 parts, and its name does not end in -00001-of-00003.gguf: "
        "give all parts their names back"
    )


def test_parts_in_the_wrong_place(paths: list[Path]) -> None:
    paths[1].write_bytes(bytes(part(2)))
    assert complaint(paths[0]) == (
        f"{paths[1]} is part 3 of 3 inside, and part 2 of 3 by its name: download it again"
    )


def test_a_part_that_is_no_part(paths: list[Path]) -> None:
    paths[1].write_bytes(bytes(RawFile()))
    assert "is no part inside, and part 2 of 3 by its name" in complaint(paths[0])


def test_a_truncated_part_is_named(paths: list[Path]) -> None:
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    assert complaint(paths[0]).startswith(f"{paths[2]} is truncated: tensor 'blk.0.attn_q.weight'")


def test_parts_of_different_models(paths: list[Path]) -> None:
    paths[0].write_bytes(bytes(part(0, n_tensors=4)))
    assert complaint(paths[1]) == (
        f"{paths[0]} promises 4 tensors, and its parts have 3: the parts are of different models"
    )


def test_a_tensor_in_two_parts(paths: list[Path]) -> None:
    split = part(1).pairs
    twice = RawFile(pairs=split, tensors=PARTS[0][0], data=bytes(1024))
    paths[1].write_bytes(bytes(twice))
    assert "has tensor 'token_embd.weight', which an earlier part has too" in complaint(paths[0])


def test_a_part_count_beyond_reason(tmp_path: Path) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(bytes(part(0, n_parts=2**32 - 1)))
    assert "claims 4,294,967,295 parts; it is damaged" in complaint(path)


def test_a_whole_file_may_bear_a_part_name(tmp_path: Path) -> None:
    path = tmp_path / "m-00002-of-00003.gguf"
    path.write_bytes(bytes(RawFile()))
    assert read_model(path).parts == (path,)
