"""Sources in every supported layout, real data sets, and refusals."""

import json
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hemoco.data.sources.folders import Source, open_source, read_items
from hemoco.errors import HemocoError, ShardError, UsageError
from tests.helpers.drawn_sets import CLASSES, SPARSE_IDS, write_class_zip


def fill(folder: Path, *names: str) -> Path:
    """Makes files whose content is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def facts(source: Source) -> list[tuple[str, str, str | None]]:
    """Key, split and class name of every image."""
    names: dict[int | None, str | None] = {None: None, **dict(enumerate(source.classes))}
    return [(item.key, item.split, names[item.label]) for item in source.items]


def zipped(path: Path, *names: str) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name.encode())
    return str(path)


def coco_file(path: Path, **changes: Any) -> None:
    fields = {
        "images": [{"id": 5, "file_name": "a.png"}, {"id": 6, "file_name": "b.png"}],
        "annotations": [{"id": 1, "image_id": 6, "category_id": 3, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 3, "name": "cell"}],
    }
    path.write_text(json.dumps(fields | changes))


LAYOUTS = [
    (
        ["b/1.jpg", "a/2.PNG", "a/deep/3.x.jpg"],
        [("a_2", "given", "a"), ("a_deep_3_x", "given", "a"), ("b_1", "given", "b")],
    ),
    (
        ["train/a/1.jpg", "train/b/1.jpg", "test/b/1.jpg"],
        [("test_b_1", "test", "b"), ("train_a_1", "train", "a"), ("train_b_1", "train", "b")],
    ),
    (["1.jpg", "2.webp", "notes.txt"], [("1", "given", None), ("2", "given", None)]),
    (["val/1.jpg", "train/2.jpg"], [("train_2", "train", None), ("val_1", "val", None)]),
    (["set/a/1.jpg", "set/b/1.jpg", "set/README"], [("a_1", "given", "a"), ("b_1", "given", "b")]),
    (
        ["a/1.jpg", "b/1.jpg", ".git/x.jpg", "__MACOSX/a/1.jpg"],
        [("a_1", "given", "a"), ("b_1", "given", "b")],
    ),
    (["x/1.jpg", "x/1.png"], [("x_1", "given", None), ("x_1-2", "given", None)]),
]
"""Names of files, and key, split and class of each image."""


@pytest.mark.parametrize(("names", "expected"), LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_a_layout_means_the_same_in_a_folder_and_in_an_archive(
    tmp_path: Path, names: list[str], expected: list[tuple[str, str, str | None]], kind: str
) -> None:
    path = fill(tmp_path / "data", *names)
    if kind == "zip":
        path = Path(zipped(tmp_path / "data.zip", *names))
    elif kind != "folder":
        path = tmp_path / f"data.{kind}"
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(tmp_path / "data", ".")
    source = open_source([str(path)], "given")
    assert facts(source) == expected
    items = pickle.loads(pickle.dumps(source.items[::-1]))  # as another process gets them
    contents = [content.decode() for content in read_items(items)]
    visible = [name for name in names if name[0] not in "._"]
    assert sorted(contents) == sorted(
        name for name in visible if name.lower().endswith(("jpg", "png", "webp"))
    )
    suffixes = [content.rpartition(".")[2].lower() for content in contents]
    assert suffixes == [item.suffix for item in items]


def test_archives_of_class_folders_are_one_source_of_ten_classes(tmp_path: Path) -> None:
    # both training archives number their images from 0, as parts of one set often do
    archives = (("train-0.zip", "train"), ("train-1.zip", "train"), ("test.zip", "test"))
    paths = [
        str(write_class_zip(tmp_path / name, split, per_class=30, seed=seed))
        for seed, (name, split) in enumerate(archives)
    ]
    source = open_source(paths, "train")
    splits = [item.split for item in source.items]
    assert (splits.count("train"), splits.count("test")) == (600, 300)
    assert source.classes == CLASSES
    assert len({item.key for item in source.items}) == 900
    assert all(source.classes[item.label or 0] in item.key for item in source.items)
    with zipfile.ZipFile(paths[2]) as archive:
        assert read_items(source.items[-1:]) == [archive.read("test/truck/0029.jpg")]


def test_coco_has_its_annotations_and_categories(coco_sets: dict[str, Path]) -> None:
    source = open_source([str(coco_sets["sparse"])], "train")
    official = json.loads((coco_sets["sparse"] / "instances_val.json").read_text())
    items = [item for item in source.items if item.split == "val"]
    images = list(coco_sets["sparse"].glob("*/*.jpg"))
    assert len(source.items) == len(images) > len(items)
    assert [category["id"] for category in source.categories] == list(SPARSE_IDS)
    assert {item.image_id for item in items} == {image["id"] for image in official["images"]}
    by_id = {a["id"]: a for item in items for a in item.annotations or []}
    assert by_id == {a["id"]: a for a in official["annotations"]}


def test_coco_images_in_one_folder_are_split_by_their_json(test_data: Path) -> None:
    folder = test_data / "dsb2018"
    splits = Counter(item.split for item in open_source([str(folder)], "x").items)
    official = {
        split: len(json.loads((folder / f"instances_{split}.json").read_text())["images"])
        for split in ("train", "val")
    }
    assert splits == official
    assert splits.total() == len(list((folder / "images").iterdir()))


def test_coco_instances_all_takes_the_given_split(coco_sets: dict[str, Path]) -> None:
    source = open_source([str(coco_sets["polygons"])], "test")
    assert {item.split for item in source.items} == {"test"}
    assert {item.image_id for item in source.items} == set(range(18))


def test_a_coco_image_without_objects_is_annotated(tmp_path: Path) -> None:
    coco_file(fill(tmp_path, "a.png", "b.png") / "instances_val.json")
    assert [len(item.annotations or []) for item in open_source([str(tmp_path)], "x").items] == [
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"images": [{"id": 6, "file_name": "../b.png"}]},
            "1 of its 1 images are not there, first '../b.png'",
        ),
        (
            {"images": [{"id": 6, "file_name": "a.png"}] * 2},
            "1 of its images have the id of another",
        ),
        ({"images": [{"id": 7, "file_name": "a.png"}]}, "annotation 1 is of an unknown image"),
        ({"images": [{"id": 6}]}, "not a COCO file"),
        ({"images": [], "annotations": []}, "list no images"),
        ({"categories": []}, "annotation 1 is of an unknown image or category"),
    ],
)
def test_coco_files_that_contradict_themselves_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    coco_file(fill(tmp_path / "data", "a.png", "../b.png") / "instances_val.json", **changes)
    with pytest.raises(HemocoError, match=message):
        open_source([str(tmp_path / "data")], "x")


@pytest.mark.parametrize(
    "name", ["../evil.jpg", "a/../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"]
)
def test_names_that_lead_out_of_an_archive_are_refused(tmp_path: Path, name: str) -> None:
    path = zipped(tmp_path / "evil.zip", "a/good.jpg", name)
    with pytest.raises(ShardError, match="leads out of the archive"):
        open_source([path], "train")


def test_a_tar_of_webdataset_is_told_apart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(fill(tmp_path / "data", "1.jpg", "1.cls"), ".")
    open_source([str(tmp_path / "x.tar")], "train")
    assert "--index_only" in caplog.text


def test_links_out_of_a_folder_are_left_out(tmp_path: Path) -> None:
    outside = fill(tmp_path / "outside", "secret.jpg")
    inside = fill(tmp_path / "inside", "1.jpg")
    (inside / "2.jpg").symlink_to(outside / "secret.jpg")
    (inside / "more").symlink_to(outside)
    (inside / "3.jpg").symlink_to(inside / "1.jpg")
    assert [item.key for item in open_source([str(inside)], "train").items] == ["1", "3"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "found nothing"),
        (["a.txt", "b.txt", "c.csv", "Makefile"], "found 2 .txt, 1 .csv, 1 without suffix"),
        (["train/a/1.jpg", "valid/a/1.jpg"], "train are splits, but there are also folder valid"),
        (
            ["a/1.jpg", "b/1.jpg", "loose.jpg"],
            "would mix images in class folders .* and images without a class",
        ),
    ],
)
def test_folders_that_mean_nothing_are_refused(
    tmp_path: Path, names: list[str], message: str
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match=message):
        open_source([str(fill(tmp_path / "data", *names))], "train")


def test_a_missing_path_and_a_wrong_split_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: not found"):
        open_source([str(tmp_path / "nowhere")], "train")
    with pytest.raises(UsageError, match=r"split '\.\./x': use letters"):
        open_source([str(tmp_path)], "../x")


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "txt"])
def test_a_damaged_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    fill(tmp_path / "data", *(f"{i}.jpg" for i in range(50)))
    path = tmp_path / f"data.{suffix}"
    if suffix == "zip":
        zipped(path, *(f"{i}.jpg" for i in range(50)))
    elif suffix != "txt":
        with tarfile.open(path, "w:gz" if suffix == "tar.gz" else "w") as archive:
            archive.add(tmp_path / "data", ".")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if suffix != "txt" else b"hello")
    with pytest.raises(HemocoError, match=r"data\..*damaged"):
        open_source([str(path)], "train")


def test_damage_inside_an_archive_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "data.zip"
    zipped(path, "a/1.jpg", "b/1.jpg")
    path.write_bytes(path.read_bytes().replace(b"a/1.jpga/1.jpg", b"a/1.jpga/2.jpg"))
    with pytest.raises(
        ShardError, match=r"data\.zip: cannot be read \(Bad CRC-32 for file 'a/1\.jpg'\)"
    ):
        read_items(open_source([str(path)], "train").items)


def test_sources_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    first, second = (
        fill(tmp_path / "first", "a.png", "b.png"),
        fill(tmp_path / "second", "a.png", "b.png"),
    )
    coco_file(first / "instances_val.json")
    coco_file(second / "instances_val.json")
    with pytest.raises(UsageError, match="split val: 2 COCO image ids occur twice"):
        open_source([str(first), str(second)], "x")
    coco_file(second / "instances_test.json", categories=[{"id": 3, "name": "bolt"}])
    (second / "instances_val.json").unlink()
    with pytest.raises(UsageError, match="category 3 is both 'cell' and 'bolt'"):
        open_source([str(first), str(second)], "x")
