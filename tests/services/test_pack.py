"""Packing on a real Ray: what is written, left out and refused, and interruptions."""

import itertools
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from hemoco.data.shards.index import ShardIndex, read_index, read_shard, read_table
from hemoco.errors import ShardError, StorageError, UsageError
from hemoco.storage.objects import list_names
from pipeline.shards.pack import Packed, pack_steps
from pipeline.workers.tasks import Progress
from tests.helpers.drawn_sets import write_class_zip
from tests.helpers.voc_xml import count_objects, listed_splits
from tests.helpers.whole_stages import pack

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 6 images; one test image is also in train."""
    folder = tmp_path / "photos"
    for split, name in itertools.product(("train", "test"), "ab"):
        (folder / split / name).mkdir(parents=True)
    for i, name in itertools.product(range(6), "ab"):
        Image.new("RGB", (4, 4), (i, 40 * (name == "a"), 0)).save(
            folder / "train" / name / f"{i}.png"
        )
    Image.new("RGB", (4, 4), (255, 255, 255)).save(folder / "test" / "a" / "new.png")
    shutil.copy(folder / "train" / "b" / "3.png", folder / "test" / "b" / "old.png")
    return folder


def packed(source: Path, dest: Path | str, **changes: Any) -> Packed:
    settings: dict[str, Any] = {"split": "train", "samples_per_shard": 5, "seed": 0}
    return pack((str(source),), str(dest), **settings | changes)


def keys(dest: Path, index: ShardIndex) -> list[str]:
    return [sample.key for shard in index.shards for sample in read_shard(str(dest), shard)]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns bytes and modification time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in files
    }


def test_every_image_comes_back_with_its_class(photos: Path, tmp_path: Path) -> None:
    index = packed(photos, tmp_path / "out").index
    assert read_index(str(tmp_path / "out")) == index
    assert [(shard.name, shard.samples) for shard in index.shards] == [
        ("test-000000.tar", 2),
        ("train-000000.tar", 4),
        ("train-000001.tar", 4),
        ("train-000002.tar", 4),
    ]  # fmt: skip
    for shard in index.shards:
        for sample in read_shard(str(tmp_path / "out"), shard):
            split, name, stem = sample.key.split("_")
            assert index.classes[sample.label or 0] == name
            assert sample.image == (photos / split / name / f"{stem}.png").read_bytes()


def test_every_shard_has_a_table_of_its_samples(photos: Path, tmp_path: Path) -> None:
    index = packed(photos, tmp_path / "out").index
    for shard in index.shards:
        samples, table = (
            read_shard(str(tmp_path / "out"), shard),
            read_table(str(tmp_path / "out"), shard),
        )
        assert (table.keys, table.labels.tolist()) == (
            [s.key for s in samples],
            [s.label for s in samples],
        )
    assert {path.stem for path in (tmp_path / "out" / "samples").iterdir()} == {
        shard.sha256 for shard in index.shards
    }


def test_the_seed_decides_the_order_and_only_that(photos: Path, tmp_path: Path) -> None:
    first, again, other = (
        packed(photos, tmp_path / name, seed=seed).index
        for name, seed in (("1", 1), ("2", 1), ("3", 2))
    )
    assert first == again
    ordered, reordered = keys(tmp_path / "1", first), keys(tmp_path / "3", other)
    assert ordered != reordered
    assert ordered != sorted(ordered)
    assert sorted(ordered) == sorted(reordered)


def test_images_in_train_and_test_are_counted(photos: Path, tmp_path: Path) -> None:
    assert packed(photos, tmp_path / "out").duplicates == 1


def test_the_same_pack_again_is_verified_and_writes_nothing(photos: Path, tmp_path: Path) -> None:
    first = packed(photos, tmp_path / "out")
    before = contents(tmp_path / "out")
    assert packed(photos, tmp_path / "out") == first
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["missing", "damaged"])
@pytest.mark.parametrize("kind", ["tar", "table"])
def test_the_same_pack_again_restores_what_is_missing_or_damaged(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, damage: str
) -> None:
    out = tmp_path / "out"
    shard = packed(photos, out).index.shards[1]
    (path,) = [out / shard.name] if kind == "tar" else (out / "samples").glob(f"{shard.sha256}.*")
    good = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(good[:-9] + b"xxxxxxxxx")
    packed(photos, out)
    assert path.read_bytes() == good
    assert "written again: " in caplog.text and shard.name in caplog.text


@pytest.mark.parametrize("change", ["seed", "size", "pixel", "class", "fewer"])
def test_other_shards_are_refused_and_left_alone_unless_told(
    photos: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "out"
    old = packed(photos, out).index
    settings = {"seed": {"seed": 1}, "size": {"samples_per_shard": 3}}.get(change, {})
    if change == "pixel":
        Image.new("RGB", (4, 4), (9, 9, 9)).save(photos / "train" / "a" / "0.png")
    elif change == "class":
        (photos / "train" / "a").rename(photos / "train" / "c")
    elif change == "fewer":
        shutil.rmtree(photos / "test")
    with pytest.raises(UsageError, match="choose another DEST, or replace with --overwrite"):
        packed(photos, out, **settings)
    assert sorted(keys(out, read_index(str(out)))) == sorted(keys(out, old))
    new = packed(photos, out, **settings, overwrite=True).index
    assert read_index(str(out)) == new
    assert set(list_names(str(out))) == {
        "index.json",
        "samples",
        *(shard.name for shard in new.shards),
    }
    assert {path.stem for path in (out / "samples").iterdir()} == {
        shard.sha256 for shard in new.shards
    }


def test_an_interrupted_pack_has_no_index_and_is_repeated_by_the_same_call(
    photos: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    steps = pack_steps(
        (str(photos),), Path(out).as_uri(), split="x", samples_per_shard=2, seed=0, overwrite=False
    )
    assert list(itertools.islice(steps, 3)) == [Progress(0, 7), Progress(1, 7), Progress(2, 7)]
    steps.close()
    with pytest.raises(ShardError, match="python -m jobs pack"):
        read_index(out)
    packed(photos, out, samples_per_shard=2)
    assert len(keys(tmp_path / "out", read_index(out))) == 14


def test_an_interrupted_pack_goes_on_with_what_is_missing(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps = pack_steps(
        (str(photos),), out.as_uri(), split="x", samples_per_shard=2, seed=0, overwrite=False
    )
    list(itertools.islice(steps, 5))
    steps.close()
    # a shard in progress when the pack was closed may exist without its marker: it is written again
    marks = [json.loads(path.read_bytes()) for path in (out / "unfinished").glob("*.json")]
    times = {mark["name"]: (out / mark["name"]).stat().st_mtime_ns for mark in marks}
    index = packed(photos, out, samples_per_shard=2).index
    assert len(times) >= 4
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert sorted(keys(out, index)) == sorted(
        keys(tmp_path / "b", packed(photos, tmp_path / "b").index)
    )
    assert not (out / "unfinished").exists()


def test_what_an_interrupted_pack_of_other_settings_left_is_removed(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    steps = pack_steps(
        (str(photos),), out.as_uri(), split="x", samples_per_shard=1, seed=0, overwrite=False
    )
    list(itertools.islice(steps, 15))
    steps.close()
    (out / "train-000001.tar.123.partial").write_bytes(b"what a killed worker had written")
    index = packed(photos, out).index
    assert {path.name for path in out.glob("*.tar*")} == {shard.name for shard in index.shards}
    assert len(list((out / "samples").iterdir())) == len(index.shards)


def test_tars_of_others_are_not_written_over(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(UsageError, match="choose another DEST"):
        packed(photos, tmp_path / "out")
    assert (tmp_path / "out" / "train-000000.tar").read_bytes() == b"somebody's"


def test_images_that_cannot_be_decoded_are_left_out_and_counted(
    test_data: Path, tmp_path: Path
) -> None:
    result = packed(test_data / "odd", tmp_path / "out", samples_per_shard=40)
    found = set(keys(tmp_path / "out", result.index))
    assert {
        "made_gray16",
        "made_name with spaces",
        "made_UPPER",
        "made_cmyk",
        "pillow_hopper_orientation_6",
    } <= found
    assert found.isdisjoint(
        {"made_empty", "made_text", "made_half", "made_solid_20000x20000", "sharp_truncated"}
    )
    images = [
        path
        for path in (test_data / "odd").glob("*/*")
        if path.suffix not in (".txt", ".j2k", ".jp2")
    ]
    others = [path for path in images if path.suffix in (".avif", ".ico", ".mpo", ".pcx")]
    assert len(found) + sum(finding.times for finding in result.skipped) == len(images) - len(
        others
    )
    assert {finding.reason for finding in result.skipped} >= {
        "not an image",
        "damaged",
        "too large",
    }


def test_a_damaged_index_is_replaced_only_when_told(photos: Path, tmp_path: Path) -> None:
    packed(photos, tmp_path / "out")
    (tmp_path / "out" / "index.json").write_text("{")
    with pytest.raises(ShardError, match="not JSON"):
        packed(photos, tmp_path / "out")
    assert packed(photos, tmp_path / "out", overwrite=True).index == read_index(
        str(tmp_path / "out")
    )


def test_a_source_of_only_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_bytes(b"no")
    with pytest.raises(
        ShardError, match=r"none of the 1 images can be decoded, first .*1\.jpg: its 2 bytes"
    ):
        packed(tmp_path / "bad", tmp_path / "out")
    assert "index.json" not in list_names(str(tmp_path / "out"))


@pytest.mark.filterwarnings(
    "ignore::ResourceWarning"
)  # webdataset leaves its files to the garbage collector
def test_stock_webdataset_decodes_what_was_packed(tmp_path: Path) -> None:
    source = write_class_zip(tmp_path / "test.zip", "test", per_class=100, seed=0)
    index = packed(source, tmp_path / "out", samples_per_shard=400).index
    assert [shard.samples for shard in index.split("test")] == [333, 333, 334]
    url = str(tmp_path / "out" / "test-{000000..000002}.tar")
    found = {s["__key__"]: s for s in webdataset.WebDataset(url, shardshuffle=False).decode("pil")}
    assert len(found) == 1000
    with zipfile.ZipFile(source) as archive, archive.open("test/frog/0007.jpg") as file:
        assert found["test_frog_0007"]["jpg"].tobytes() == Image.open(file).convert("RGB").tobytes()
    assert found["test_frog_0007"]["cls"] == 6


def test_coco_annotations_travel_to_s3_and_back(coco_sets: dict[str, Path], bucket: str) -> None:
    index = packed(coco_sets["sparse"], bucket, samples_per_shard=10).index
    official = json.loads((coco_sets["sparse"] / "instances_val.json").read_text())
    samples = [sample for shard in index.split("val") for sample in read_shard(bucket, shard)]
    found = [annotation for sample in samples for annotation in sample.annotations or []]
    assert sorted(found, key=lambda a: a["id"]) == sorted(
        official["annotations"], key=lambda a: a["id"]
    )
    assert {sample.image_id for sample in samples} == {image["id"] for image in official["images"]}
    assert {category["id"] for category in index.categories} == {
        c["id"] for c in official["categories"]
    }


def test_damage_found_by_a_worker_is_raised_here(photos: Path, tmp_path: Path) -> None:
    steps = pack_steps(
        (str(photos),),
        (tmp_path / "out").as_uri(),
        split="x",
        samples_per_shard=2,
        seed=0,
        overwrite=False,
    )
    next(steps)
    shutil.rmtree(photos)
    with pytest.raises(ShardError, match=r"photos/.*\.png: cannot be read"):
        list(steps)


def test_a_dest_that_cannot_be_written_fails_before_the_source_is_read(
    tmp_path: Path, bucket: str
) -> None:
    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        packed(tmp_path / "missing", "s3://nowhere/x")


def test_voc_boxes_travel_with_their_images(test_data: Path, tmp_path: Path) -> None:
    index = packed(test_data / "bccd", tmp_path / "out", samples_per_shard=20).index
    samples = {
        split: [s for shard in index.split(split) for s in read_shard(str(tmp_path / "out"), shard)]
        for split in index.splits
    }
    assert {split: len(found) for split, found in samples.items()} == listed_splits(
        test_data / "bccd"
    )
    boxes = sum(len(sample.annotations or []) for found in samples.values() for sample in found)
    assert boxes == count_objects(test_data / "bccd").total()
    assert [category["name"] for category in index.categories] == ["Platelets", "RBC", "WBC"]
