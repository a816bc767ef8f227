"""Shards and their index: round trips, webdataset's own reader, and every kind of damage."""

import dataclasses
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from hemoco.data.shards.index import (
    Shard,
    ShardColumns,
    ShardIndex,
    check_table,
    read_index,
    read_shard,
    read_table,
    remove_table,
    write_index,
    write_table,
)
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.errors import ShardError

SAMPLES = [
    Sample("cat_0001", b"jpeg bytes", label=3),
    Sample(
        "long_" + 150 * "x",
        b"png bytes",
        annotations=[{"id": 1, "bbox": [0, 0, 2, 2]}],
        image_id=7,
        suffix="png",
    ),
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
    shard = described("train-000000.tar", data, 3)
    (tmp_path / shard.name).write_bytes(data)
    write_table(str(tmp_path), shard, parse_tar(data, shard.name).table)
    write_index(str(tmp_path), ShardIndex((shard,), ("a", "b"), ({"id": 1, "name": "cat"},)))
    return tmp_path


def test_samples_come_back_as_they_were_written(folder: Path) -> None:
    index = read_index(str(folder))
    assert read_shard(str(folder), index.split("train")[0]) == SAMPLES
    assert index.classes == ("a", "b")
    assert index.categories == ({"id": 1, "name": "cat"},)


def test_splits_can_be_joined() -> None:
    shards = tuple(
        Shard(f"{name}-0.tar", name, 1, 1, "00" * 32) for name in ("train", "test", "val", "train")
    )
    index = ShardIndex(shards, (), ())
    assert index.split("train+val") == (shards[0], shards[2], shards[3])
    with pytest.raises(
        ShardError, match="no split 'trainval' among the shards; they have test, train, val"
    ):
        index.split("test+trainval")


# webdataset leaves its file to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_stock_webdataset_reads_the_same_samples(folder: Path) -> None:
    samples = list(webdataset.WebDataset(str(folder / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [sample.key for sample in SAMPLES]
    assert (samples[0]["jpg"], samples[0]["cls"]) == (b"jpeg bytes", b"3")
    assert json.loads(samples[1]["json"]) == {"image_id": 7, "annotations": SAMPLES[1].annotations}


def test_equal_samples_make_equal_bytes() -> None:
    assert encode_shard(SAMPLES) == encode_shard(iter(SAMPLES))


@pytest.mark.parametrize(
    "sample",
    [Sample("a.b", b""), Sample("a/b", b""), Sample("", b""), Sample("a", b"", suffix="py")],
)
def test_keys_and_suffixes_that_readers_would_misread_are_refused(sample: Sample) -> None:
    with pytest.raises(ShardError):
        encode_shard([sample])


def test_the_digest_changes_with_any_fact_of_the_index(folder: Path) -> None:
    index = read_index(str(folder))
    (shard,) = index.shards
    changed = [
        dataclasses.replace(index, shards=(dataclasses.replace(shard, split="x"),)),
        dataclasses.replace(index, shards=(dataclasses.replace(shard, samples=4),)),
        dataclasses.replace(index, classes=("b", "a")),
        dataclasses.replace(index, categories=()),
        dataclasses.replace(index, packed=False),
    ]
    assert len({index.digest, *(other.digest for other in changed)}) == 6


def test_a_folder_without_index_tells_how_to_pack(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="python -m jobs pack SOURCE DEST"):
        read_index(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not an index of format 'hemoco-shards'"),
        ({"version": 1}, "index version 1, this hemoco reads 2; pack the data again"),
        ({"classes": ["b"]}, "digest does not match"),
        ({"packed": False}, "digest does not match"),
        ({"classes": None}, "damaged index"),
        ({"shards": [{"name": "x"}]}, "damaged index"),
    ],
)
def test_an_index_that_is_not_ours_is_refused(
    folder: Path, change: dict[str, Any], message: str
) -> None:
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
    with pytest.raises(ShardError, match=r"train-000000\.tar: .*pack (the data|it) again"):
        read_shard(str(folder), read_index(str(folder)).shards[0])


@pytest.mark.parametrize(
    "members", [["nodot"], ["a.py"], ["a.jpg", "a.png"], ["a.cls"], ["a.jpg", "b.jpg"], []]
)
def test_a_tar_of_another_number_of_samples_is_refused(tmp_path: Path, members: list[str]) -> None:
    data = tar_of(dict.fromkeys(members, b""))
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(
        ShardError, match=r"s\.tar: [02] samples, the index says 1; pack the data again"
    ):
        read_shard(str(tmp_path), described("s.tar", data, 1))


def test_somebody_elses_tar_is_read_at_its_own_url(tmp_path: Path) -> None:
    data = tar_of({"x/a.v1.JPG": b"1", "x/a.cls": b"4"})
    (tmp_path / "wild.tar").write_bytes(data)
    shard = described((tmp_path / "wild.tar").as_uri(), data, 1)
    assert read_shard("s3://elsewhere/x", shard) == [Sample("x/a", b"1", label=4)]


def test_the_table_of_a_shard_is_told_by_its_content(folder: Path) -> None:
    (shard,) = read_index(str(folder)).shards
    table = read_table(str(folder), shard)
    data = (folder / shard.name).read_bytes()
    ranges = zip(table.offsets, table.sizes, strict=True)
    assert [data[start : start + size] for start, size in ranges] == [s.image for s in SAMPLES]
    assert table.keys == [s.key for s in SAMPLES]
    (path,) = (folder / "samples").iterdir()
    assert path.stem == hashlib.sha256(data).hexdigest()
    check_table(str(folder), shard, parse_tar(data, "x.tar").table)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "the sample table of train-000000.tar is missing; pack the data again"),
        ("cut", "the sample table of train-000000.tar is damaged .*; pack the data again"),
        (
            "shorter",
            "2 samples in the table of train-000000.tar, the index says 3; pack the data again",
        ),
        (
            "other",
            "the sample table of train-000000.tar does not match its content; pack the data again",
        ),
    ],
)
def test_a_table_that_is_not_the_shards_is_refused(folder: Path, damage: str, message: str) -> None:
    (shard,) = read_index(str(folder)).shards
    table, (path,) = read_table(str(folder), shard), (folder / "samples").iterdir()
    if damage == "missing":
        remove_table(str(folder), shard)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "shorter":
        write_table(str(folder), shard, parse_tar(encode_shard(SAMPLES[:2]), "x.tar").table)
    else:
        write_table(str(folder), shard, table._replace(crcs=table.crcs ^ 1))
    with pytest.raises(ShardError, match=rf"{path}: {message}"):
        check_table(str(folder), shard, table)


def test_columns_give_back_every_shard() -> None:
    shards = tuple(
        Shard(f"größe-{i:06d}.tar", split, i, 2**40 + i, hashlib.sha256(bytes([i])).hexdigest())
        for i, split in enumerate(("val", "train", "val"))
    )
    columns = ShardColumns(shards)
    assert [columns[i] for i in range(len(columns))] == list(shards)
    assert columns.samples.tolist() == [0, 1, 2]
    assert columns.bytes.tolist() == [2**40, 2**40 + 1, 2**40 + 2]
