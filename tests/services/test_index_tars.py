"""Indexing of others' tars on a real Ray: what is read, reported, refused and left behind."""

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from hemoco.data.shards.index import read_index, read_shard, read_table, write_table
from hemoco.data.shards.tar import encode_shard
from hemoco.errors import ShardError, StorageError, UsageError
from hemoco.storage.objects import absolute_url, join_url, list_names, write_bytes
from jobs.cli import main
from jobs.verbs.pack import index_with_progress
from pipeline.shards.index_tars import Indexed, index_steps
from pipeline.workers.tasks import Finding
from tests.helpers.whole_stages import finish, pack

pytestmark = pytest.mark.usefixtures("ray_cluster")


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 0, 0)).save(buffer, "jpeg")
    return buffer.getvalue()


def tar_of(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def photos(first: int, count: int = 3) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    return [
        m
        for i in numbers
        for m in ((f"n/{i:05d}.JPEG", jpeg(i)), (f"n/{i:05d}.cls", f"{i}".encode()))
    ]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars for training and one for validation."""
    folder = tmp_path / "tars"
    for name, first in (
        ("imagenet-train-000000.tar", 0),
        ("imagenet-train-000001.tar", 3),
        ("val/00000.tar", 6),
    ):
        write_bytes(str(folder / name), tar_of(*photos(first)))
    return folder


def indexed(dest: Path | str, *sources: Path | str, overwrite: bool = False) -> Indexed:
    return finish(
        index_steps(
            [str(source) for source in sources],
            absolute_url(str(dest)),
            split="given",
            overwrite=overwrite,
        )
    )


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns bytes and modification time of every file."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in found
    }


def test_tars_in_the_folder_of_their_index_are_named_below_it(tars: Path, tmp_path: Path) -> None:
    before = files(tars)
    index = indexed(tars, tars).index
    assert [(shard.name, shard.split, shard.samples) for shard in index.shards] == [
        ("imagenet-train-000000.tar", "train", 3), ("imagenet-train-000001.tar", "train", 3),
        ("val/00000.tar", "val", 3),
    ]  # fmt: skip
    assert before.items() <= files(tars).items()
    moved = tars.rename(tmp_path / "moved")
    assert read_index(str(moved)) == index
    assert [s.key for shard in index.shards for s in read_shard(str(moved), shard)] == [
        f"n/{i:05d}" for i in range(9)
    ]


def test_tars_elsewhere_are_named_by_their_urls(tars: Path, bucket: str) -> None:
    write_bytes(
        join_url(bucket, "a/train-0.tar"), (tars / "imagenet-train-000000.tar").read_bytes()
    )
    index = indexed(
        f"{bucket}/index", f"{bucket}/a", f"{tars}/imagenet-train-00000{{1..1}}.tar", tars / "val"
    ).index
    urls = [
        f"{tars.as_uri()}/imagenet-train-000001.tar",
        f"{tars.as_uri()}/val/00000.tar",
        f"{bucket}/a/train-0.tar",
    ]
    assert [shard.name for shard in index.shards] == urls
    assert list_names(f"{bucket}/index") == ["index.json", "samples"]
    assert [len(read_table(f"{bucket}/index", shard).keys) for shard in index.shards] == [3, 3, 3]
    assert read_shard(f"{bucket}/index", index.shards[2])[1].image == jpeg(1)


def test_classes_are_the_numbers_up_to_the_largest(tars: Path) -> None:
    index = indexed(tars, tars).index
    assert index.classes == tuple("012345678")
    labels = [
        label for shard in index.shards for label in read_table(str(tars), shard).labels.tolist()
    ]
    assert labels == list(range(9))


def test_what_is_left_out_is_counted_and_the_first_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        members = (
            [(f"photo.{i}.jpg", jpeg(i)) for i in (1, 2)]
            + photos(0)
            + [("n/00001.txt", b""), ("x.txt", b"")]
        )
        (tmp_path / f"{name}.tar").write_bytes(
            tar_of(*members, ("bad.jpg", b"<html>"), ("bad.cls", b"cat"))
        )
    result = indexed(tmp_path, tmp_path)
    assert result.left_out == (
        Finding("a class that is no number from 0 to 999999", 2, "bad.cls in a.tar"),
        Finding("a key without an image", 2, "x.txt in a.tar"),
        Finding("several images under one key", 2, "photo (.1.jpg, .2.jpg) in a.tar"),
    )
    assert result.undecodable == (Finding("not an image", 2, "bad in a.tar"),)
    assert [shard.samples for shard in result.index.shards] == [4, 4]


def test_empty_tars_are_named_and_only_empty_ones_are_an_error(tars: Path, tmp_path: Path) -> None:
    write_bytes(str(tars / "empty.tar"), tar_of())
    assert indexed(tars, tars).empty == ("empty.tar",)
    assert read_index(str(tars)).split("given")[0].samples == 0
    with pytest.raises(ShardError, match=r"none of the 1 tars holds a sample$"):
        indexed(tmp_path / "out", tars / "empty.tar")
    write_bytes(str(tars / "text.tar"), tar_of(("a.txt", b"")))
    with pytest.raises(
        ShardError, match=r"none of the 1 tars .*; a key without an image: a\.txt in text\.tar"
    ):
        indexed(tmp_path / "out", tars / "text.tar")
    assert list_names(str(tmp_path / "out")) == []


def test_keys_may_be_the_same_in_several_tars(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.tar").write_bytes(tar_of(*photos(0)))
    index = indexed(tmp_path, tmp_path).index
    assert [read_table(str(tmp_path), shard).keys for shard in index.shards] == 2 * [
        [f"n/0000{i}" for i in range(3)]
    ]


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_a_damaged_tar_is_named_and_nothing_is_written(
    tars: Path, tmp_path: Path, damage: str
) -> None:
    bad = tars / "imagenet-train-000001.tar"
    data = bad.read_bytes()
    with tarfile.open(bad) as tar:
        third = tar.getmembers()[2].offset
    if damage == "missing":
        bad.unlink()
    else:
        bad.write_bytes(data[:third] + (b"" if damage == "cut" else b"\xff" + data[third + 1 :]))
    with pytest.raises(
        (ShardError, StorageError),
        match=r"imagenet-train-000001\.tar: (cut at|damaged at|not found)",
    ):
        indexed(tmp_path / "out", f"{tars}/imagenet-train-{{000000..000001}}.tar", tars / "val")
    assert list_names(str(tmp_path / "out")) == []


def test_a_damaged_tar_leaves_the_index_that_is_there(tars: Path) -> None:
    index = indexed(tars, tars).index
    write_bytes(str(tars / "bad.tar"), b"no tar")
    before = files(tars)
    with pytest.raises(ShardError, match=r"bad\.tar: not a tar file"):
        indexed(tars, tars, overwrite=True)
    assert read_index(str(tars)) == index
    assert files(tars).keys() == before.keys()


def test_the_same_again_is_verified_and_writes_nothing(tars: Path) -> None:
    first = indexed(tars, tars)
    before = files(tars)
    assert indexed(tars, tars) == first
    assert files(tars) == before


def test_the_same_again_restores_a_table(tars: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = indexed(tars, tars).index.shards
    before = {name: content for name, (content, _) in files(tars).items()}
    write_table(str(tars), first, read_table(str(tars), second))
    next((tars / "samples").glob(f"{third.sha256}.*")).unlink()
    indexed(tars, tars)
    assert {name: content for name, (content, _) in files(tars).items()} == before
    assert caplog.text.count("written again: ") == 2


@pytest.mark.parametrize("change", ["replaced", "added", "removed"])
def test_other_tars_are_refused_unless_told(tars: Path, change: str) -> None:
    indexed(tars, tars)
    if change == "removed":
        (tars / "imagenet-train-000001.tar").unlink()
    else:
        write_bytes(
            str(tars / ("val/00000.tar" if change == "replaced" else "new.tar")),
            tar_of(*photos(50)),
        )
    before = files(tars)
    with pytest.raises(UsageError, match="choose another DEST, or replace with --overwrite"):
        indexed(tars, tars)
    assert files(tars) == before
    index = indexed(tars, tars, overwrite=True).index
    assert read_index(str(tars)) == index
    assert {path.stem for path in (tars / "samples").iterdir()} == {
        shard.sha256 for shard in index.shards
    }


def test_packing_never_removes_tars_that_it_did_not_make(tars: Path, tmp_path: Path) -> None:
    (tars / "imagenet-train-000000.tar").rename(tars / "train-000000.tar")
    indexed(tars, tars)
    before = files(tars)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(1))
    for overwrite, message in (
        (False, "holds other shards"),
        (True, "tars that hemoco only made the index of"),
    ):
        with pytest.raises(UsageError, match=message):
            pack(
                [str(tmp_path / "images")],
                str(tars),
                split="train",
                samples_per_shard=9,
                seed=0,
                overwrite=overwrite,
            )
    assert files(tars) == before


def test_shards_of_our_own_can_be_indexed_in_place(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(jpeg(1))
    out = tmp_path / "out"
    packed = pack(
        [str(tmp_path / "images")], str(out), split="test", samples_per_shard=9, seed=0
    ).index
    with pytest.raises(UsageError, match="holds other shards"):
        indexed(out, out)
    index = indexed(out, out, overwrite=True).index
    assert (index.shards, index.packed, packed.packed) == (packed.shards, False, True)


def test_a_person_sees_what_was_left_out(
    tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes(
        str(tars / "x.tar"), tar_of(("p.1.jpg", b""), ("p.2.jpg", b""), ("\x1b[2J.jpg", b""))
    )
    index_with_progress((str(tars),), (tmp_path / "out").as_uri(), split="train", overwrite=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{(tmp_path / 'out').as_uri()}: 4 shards, ")
    assert lines[1:] == [
        "warning: 1 members left out: several images under one key "
        "(first: p (.1.jpg, .2.jpg) in x.tar)",
        "warning: 1 images cannot be decoded: not an image (first: ?[2J in x.tar); "
        "they stay in: training replaces them, an evaluation of their split refuses",
    ]


def test_options_of_packing_do_not_go_with_index_only(
    tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", str(tars), str(tars), "--index_only", "--seed", "3"]) == 2
    assert "--samples_per_shard and --seed do not go with it" in capsys.readouterr().err


def test_a_key_of_any_length_and_script_survives(tmp_path: Path) -> None:
    names = [f"{'größe' * 60}/{i}" for i in range(3)]
    (tmp_path / "a.tar").write_bytes(tar_of(*((f"{name}.png", jpeg(1)) for name in names)))
    (shard,) = indexed(tmp_path, tmp_path).index.shards
    assert read_table(str(tmp_path), shard).keys == names
    with pytest.raises(ShardError, match="neither dots nor slashes"):
        encode_shard(read_shard(str(tmp_path), shard))
