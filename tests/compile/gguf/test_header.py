"""Headers of GGUF files: what the package `gguf` writes is read, and what is damaged is refused in one line."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from fuseline.compile.gguf.folder import find_gguf
from fuseline.compile.gguf.header import GgufError, read_header, read_model, shards


def written(path: Path, shards: int = 0) -> Path:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=shards)
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "é", "<|end|>"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_bool("llama.flag", True)
    for index in range(3):
        values = np.arange(64, dtype=np.float32).reshape(2, 32) + index
        writer.add_tensor(f"blk.{index}.ffn_up.weight", gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0),
                          raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_header_is_what_the_package_wrote(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")} == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in header.settings.items()
    }  # fmt: skip
    assert header.settings["llama.attention.layer_norm_rms_epsilon"] == 1e-5
    for tensor in reader.tensors:
        found = header.tensors[tensor.name]
        assert (found.begin, found.type_id) == (tensor.data_offset, tensor.tensor_type)
        assert found.shape == tuple(tensor.shape[::-1])


def test_every_file_cut_off_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    begin = read_header(tmp_path / "whole.gguf").tensors["blk.0.ffn_up.weight"].begin
    for length in (*range(0, begin, 7), begin + 1, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError, match="cut.gguf") as caught:
            read_header(path)
        assert "\n" not in str(caught.value)
    assert "blk.2.ffn_up.weight" in str(caught.value) and "cut off" in str(caught.value)


@pytest.mark.parametrize(("at", "value", "message"), [
    (0, b"GGML", "is not a GGUF file"),
    (4, struct.pack("<I", 1), "is GGUF 1; version 2 and 3 are read"),
    (4, struct.pack(">I", 3), "the other order of bytes"),
    (8, struct.pack("<Q", 1 << 60), "damaged"),
    (16, struct.pack("<Q", 1 << 60), "damaged"),
    (24, struct.pack("<Q", 1 << 62), "damaged"),
])  # fmt: skip
def test_a_damaged_beginning_is_refused(at: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(GgufError, match=message):
        read_header(path)


def edit_entry(path: Path, name: str, skip: int, value: bytes) -> None:
    """Changes bytes of a tensor's entry, counted from behind its name: dims, type, offset."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode()) + len(name) + skip
    data[at : at + len(value)] = value
    path.write_bytes(data)


@pytest.mark.parametrize(("skip", "value", "message"), [
    (0, struct.pack("<I", 9), "has 9 dims"),
    (4, struct.pack("<Q", 0), r"has shape \[2, 0\]"),
    (4, struct.pack("<Q", 33), "rows of 33 values, which blocks of 32 .Q8_0. do not divide"),
    (4, struct.pack("<Q", 1 << 40), "cut off"),
    (20, struct.pack("<I", 99), "is of type 99, which is not known"),
    (24, struct.pack("<Q", 1 << 40), "cut off"),
])  # fmt: skip
def test_a_damaged_entry_is_refused_by_name(skip: int, value: bytes, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    edit_entry(path, "blk.1.ffn_up.weight", skip, value)
    with pytest.raises(GgufError, match=f"blk.1.ffn_up.weight in .*m.gguf .*{message}"):
        read_header(path)


def test_names_are_there_once(tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn", b"blk.0.ffn"))
    with pytest.raises(GgufError, match="tensors of the same name"):
        read_header(path)


def test_all_files_of_a_model_are_read(tmp_path: Path) -> None:
    written(tmp_path / "m.gguf", shards=1)
    first = tmp_path / "m-00001-of-00003.gguf"
    assert shards(first.with_name("m-00002-of-00003.gguf"))[0] == first == find_gguf(tmp_path)
    header = read_model(first)
    assert len(header.tensors) == 3 and header.settings["llama.block_count"] == 2
    (tmp_path / "m-00002-of-00003.gguf").unlink()
    with pytest.raises(GgufError, match="m-00002-of-00003.gguf is missing .1 of the 3 files"):
        read_model(first)
    (tmp_path / "m-00002-of-00003.gguf").write_bytes((tmp_path / "m-00003-of-00003.gguf").read_bytes())
    with pytest.raises(GgufError, match="counts 3 tensors in its 3 files, which hold 2"):
        read_model(first)


def test_a_directory_has_one_model(tmp_path: Path) -> None:
    assert find_gguf(tmp_path) is None
    path = written(tmp_path / "m.gguf")
    assert find_gguf(tmp_path) == path == find_gguf(path)
    written(tmp_path / "other.gguf")
    with pytest.raises(GgufError, match="holds 2 models"):
        find_gguf(tmp_path)
