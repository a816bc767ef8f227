"""Shards and their index: round trips, a stock webdataset reader, and every kind of damage."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from hemoco.data.shards import Sample, Shard, ShardIndex, encode_shard, read_index, read_shard, write_index
from hemoco.errors import ShardError

SAMPLES = [
    Sample("cat_0001", b"jpeg bytes", label=3),
    Sample("long_" + 150 * "x", b"png bytes", annotations=[{"id": 1, "bbox": [0, 0, 2, 2]}], image_id=7, suffix="png"),
    Sample("größe", b"", annotations=[], image_id=8),
]


def described(name: str, data: bytes, samples: int) -> Shard:
    return Shard(name, "train", samples, len(data), hashlib.sha256(data).hexdigest())


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = encode_shard(SAMPLES)
    (tmp_path / "train-000000.tar").write_bytes(data)
    categories = ({"id": 1, "name": "cat"},)
    write_index(str(tmp_path), ShardIndex((described("train-000000.tar", data, 3),), ("a", "b"), categories))
    return tmp_path


def test_samples_come_back_as_they_were_written(folder: Path) -> None:
    index = read_index(str(folder))
    assert read_shard(str(folder), index.split("train")[0]) == SAMPLES
    assert index.classes == ("a", "b")
    assert index.categories == ({"id": 1, "name": "cat"},)


# webdataset leaves its file to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_stock_webdataset_reads_the_same_samples(folder: Path) -> None:
    found = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in SAMPLES]
    assert (found[0]["jpg"], found[0]["cls"]) == (b"jpeg bytes", b"3")
    assert json.loads(found[1]["json"]) == {"image_id": 7, "annotations": SAMPLES[1].annotations}


def test_equal_samples_make_equal_bytes() -> None:
    assert encode_shard(SAMPLES) == encode_shard(iter(SAMPLES))


@pytest.mark.parametrize(
    "sample", [Sample("a.b", b""), Sample("a/b", b""), Sample("", b""), Sample("a", b"", suffix="py")]
)
def test_keys_and_suffixes_that_readers_would_misread_are_refused(sample: Sample) -> None:
    with pytest.raises(ShardError):
        encode_shard([sample])


def test_the_digest_changes_with_any_fact_of_the_index(folder: Path) -> None:
    index = read_index(str(folder))
    (shard,) = index.shards
    others = [dataclasses.replace(shard, **{name: value}) for name, value in {"split": "x", "samples": 4}.items()]
    changed = [dataclasses.replace(index, shards=(other,)) for other in others]
    changed += [dataclasses.replace(index, classes=("b", "a")), dataclasses.replace(index, categories=())]
    assert len({index.digest, *(other.digest for other in changed)}) == 5


def test_a_folder_without_index_tells_how_to_pack(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="python -m jobs pack SOURCE DEST"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not an index of format 'hemoco-shards'"),
        ({"version": 2}, "index version 2, this hemoco reads 1"),
        ({"classes": ["b"]}, "digest does not fit"),
        ({"classes": None}, "damaged index"),
        ({"shards": [{"name": "x"}]}, "damaged index"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    fields = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(fields | change))
    with pytest.raises(ShardError, match=message):
        read_index(str(folder))


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b""])
def test_an_index_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / "index.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"index\.json: not"):
        read_index(str(folder))


def test_an_unknown_split_names_those_there_are(folder: Path) -> None:
    with pytest.raises(ShardError, match="no split 'test' among the shards; they have train"):
        read_index(str(folder)).split("test")


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_shard_is_named(folder: Path, damage: str) -> None:
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ShardError, match=r"train-000000\.tar: .*pack the data again"):
        read_shard(str(folder), read_index(str(folder)).shards[0])


@pytest.mark.parametrize(
    "members",
    [
        {"../../etc/x.jpg": b""},
        {"nodot": b""},
        {"a.py": b""},
        {"a.jpg": b"", "a.png": b""},
        {"a.cls": b"1"},
        {"a.jpg": b"", "a.cls": b"cat"},
        {"a.jpg": b"", "a.json": b"[]"},
        {"a.jpg": b"", "b.jpg": b""},
        {},
    ],
)
def test_a_tar_of_other_things_is_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    data = tar_of(members)
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"s\.tar: "):
        read_shard(str(tmp_path), described("s.tar", data, 1))
