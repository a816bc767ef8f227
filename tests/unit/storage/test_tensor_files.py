"""Files of tensors are read without running code in them."""

import argparse
import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from hemoco.errors import CheckpointError
from hemoco.storage.tensor_files import parse_file, read_safetensors_metadata

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(7)}
CONTENT = {"epoch": 3, "state_dict": TENSORS}


def saved(content: object, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


class Trap:
    """An object whose unpickling creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "write", [saved, lambda content: saved(content, legacy=True), pickle.dumps]
)
def test_code_in_a_file_is_not_run(write, tmp_path):
    data = write({"model": Trap(tmp_path / "run")})
    with pytest.raises(
        CheckpointError, match=r"theirs: holds Python objects \(posix\.mkdir\), which can run code"
    ):
        parse_file("theirs", data)
    assert not (tmp_path / "run").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "run")))
    assert (tmp_path / "run").exists()  # the trap works


def test_plain_python_objects_beside_tensors_are_refused_with_a_way_out():
    with pytest.raises(
        CheckpointError, match=r"\(argparse\.Namespace\).*keep its tensors alone: torch\.save\("
    ):
        parse_file("theirs", saved(CONTENT | {"args": argparse.Namespace(lr=1)}))


@pytest.mark.parametrize("legacy", [False, True])
def test_both_formats_of_torch_are_read_and_a_cut_one_is_no_file(legacy):
    data = saved(CONTENT, legacy)
    content = parse_file("theirs", data)
    assert content["epoch"] == 3
    assert torch.equal(content["state_dict"]["a"], TENSORS["a"])
    with pytest.raises(CheckpointError, match=r"not a whole file of safetensors, of torch\.save"):
        parse_file("theirs", data[:-10])


def test_safetensors_come_with_their_metadata():
    data = safetensors.torch.save(TENSORS, {"format": "pt"})
    content = parse_file("theirs", data)
    assert content["format"] == "pt"
    assert torch.equal(content["state_dict"]["a"], TENSORS["a"])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        parse_file("theirs", data[:-1])


@pytest.mark.parametrize("long", ["", "x" * 100_000])  # the second header needs another request
def test_the_metadata_of_safetensors_are_read_without_the_tensors(tmp_path, long):
    file = tmp_path / "b.safetensors"
    data = safetensors.torch.save(TENSORS, {"format": "pt", "long": long})
    file.write_bytes(data)
    assert read_safetensors_metadata(str(file)) == {"format": "pt", "long": long}
    file.write_bytes(safetensors.torch.save({}))
    assert read_safetensors_metadata(str(file)) == {}
    for wrong in (data[:-1], data + b"x", data[:100], b"", data[:5], b"x" * 200, saved(CONTENT)):
        file.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            read_safetensors_metadata(str(file))
    length = (20).to_bytes(8, "little")
    for header in (b"{nonsense          }", b'{"a": 1}            ', b'{"a": {"dtype": 1}} '):
        file.write_bytes(length + header)
        with pytest.raises(CheckpointError, match="its header cannot be read"):
            read_safetensors_metadata(str(file))


@pytest.mark.parametrize(
    "data", [b"", b"<html>not found</html>", pickle.dumps({"a": 1})[:-2], b"\x00" * 8 + b"{}"]
)
def test_other_bytes_are_no_checkpoint(data):
    with pytest.raises(CheckpointError, match="whole"):
        parse_file("theirs", data)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8", "<i8"])
@pytest.mark.parametrize("layout", [np.ascontiguousarray, np.asfortranarray])
def test_pickled_arrays_are_read_whatever_protocol_order_and_kind(protocol, kind, layout):
    arrays = {"a": layout(np.arange(6).reshape(2, 3)).astype(kind), "b": np.array(7, kind)}
    data = pickle.dumps({"model": arrays, "__author__": "x"}, protocol=protocol)
    model = parse_file("theirs", data)["model"]
    assert model["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (model["b"].shape, model["b"].item()) == ((), 7)


def test_the_names_of_older_numpys_are_known():
    data = pickle.dumps({"model": {"a": np.ones(2, "f4")}}, protocol=3)
    data = data.replace(b"numpy._core", b"numpy.core")
    assert parse_file("theirs", data)["model"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "value", [np.array([None]), np.array(["a"]), np.ones(2, "c8"), np.float32(1)]
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_other_values_of_numpy_are_refused(value, protocol):
    with pytest.raises(CheckpointError, match=r"not a whole file|holds Python objects \(numpy"):
        parse_file("theirs", pickle.dumps({"model": {"a": value}}, protocol=protocol))
