"""Pascal VOC folders: a real set against an independent walk of its XML, layouts, and refusals."""

import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hemoco.data.sources.folders import Item, Source, open_source, read_items
from hemoco.errors import ShardError, UsageError
from tests.helpers.voc_xml import count_objects, listed_splits

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
DOG = OBJECT.format("dog", 48, 240, 195, 371)


def described(*objects: str, filename: str = "") -> str:
    return f"<annotation><filename>{filename}</filename>{''.join(objects)}</annotation>"


def voc(folder: Path, lists: dict[str, list[str]], annotations: dict[str, str]) -> Path:
    """Makes a VOC folder; the content of each image is its name."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for stem, content in annotations.items():
        (folder / "JPEGImages" / f"{stem}.jpg").write_text(stem)
        (folder / "Annotations" / f"{stem}.xml").write_text(content)
    for split, stems in lists.items():
        lines = "".join(f"{stem}\n" for stem in stems)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return folder


def opened(*paths: Path) -> Source:
    return open_source([str(path) for path in paths], "given")


def boxes(item: Item) -> list[list[float]]:
    return [annotation["bbox"] for annotation in item.annotations or []]


def test_bccd_has_every_object_of_its_xml(test_data: Path) -> None:
    source = opened(test_data / "bccd")
    assert Counter(item.split for item in source.items) == listed_splits(test_data / "bccd")
    names = {category["id"]: category["name"] for category in source.categories}
    assert names == {1: "Platelets", 2: "RBC", 3: "WBC"}
    objects = Counter[Any]()
    for item in source.items:
        for annotation in item.annotations or []:
            left, top, width, high = annotation["bbox"]
            corners = (left + 1, top + 1, left + width, top + high)
            objects[item.key, names[annotation["category_id"]], corners] += 1
    assert objects == count_objects(test_data / "bccd")
    assert objects.total() > 500


def test_ids_begin_at_1_and_do_not_change(test_data: Path) -> None:
    source = opened(test_data / "bccd")
    assert source == opened(test_data / "bccd")
    images = sum(listed_splits(test_data / "bccd").values())
    assert [item.image_id for item in source.items] == list(range(1, images + 1))
    annotation_ids = []
    for item in source.items:
        for annotation in item.annotations or []:
            annotation_ids.append(annotation["id"])
            assert annotation["image_id"] == item.image_id
    objects = count_objects(test_data / "bccd").total()
    assert annotation_ids == list(range(1, objects + 1))


def test_a_box_of_pixels_counted_from_1_becomes_one_from_0(tmp_path: Path) -> None:
    flags = DOG.replace("<bndbox>", "<truncated>1</truncated><difficult>1</difficult><bndbox>")
    first, second = opened(voc(tmp_path, {}, {"a": described(flags), "b": described(DOG)})).items
    assert first.annotations == [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [47, 239, 148, 132],
            "area": 148 * 132,
            "iscrowd": 0,
            "difficult": 1,
            "truncated": 1,
        }
    ]
    assert [(a["difficult"], a["truncated"]) for a in second.annotations or []] == [(0, 0)]


@pytest.mark.parametrize(
    ("corners", "box", "area"),
    [
        ((1, 1, 1, 1), [0, 0, 1, 1], 1),
        ((0, -5, 9999, 10), [-1, -6, 10000, 16], 160000),
        ((9, 9, 3, 3), [8, 8, -5, -5], 0),
        ((1.5, 2, 3.25, 4), [0.5, 1, 2.75, 3], 8.25),
    ],
)
def test_odd_boxes_are_kept_as_they_were(
    tmp_path: Path, corners: tuple[float, ...], box: list[float], area: float
) -> None:
    (item,) = opened(voc(tmp_path, {}, {"a": described(OBJECT.format("x", *corners))})).items
    assert boxes(item) == [box]
    assert [annotation["area"] for annotation in item.annotations or []] == [area]


def test_parts_of_objects_are_no_objects_and_no_objects_are_an_annotation(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    dog_with_part = DOG.replace("<bndbox>", f"{part}<bndbox>", 1)
    source = opened(voc(tmp_path, {}, {"a": described(dog_with_part), "b": described()}))
    assert [boxes(item) for item in source.items] == [[[47, 239, 148, 132]], []]
    assert [category["name"] for category in source.categories] == ["dog"]


def test_images_beside_the_lists_are_kept_apart_from_what_is_trained_on(tmp_path: Path) -> None:
    stems = {name: described() for name in ("a", "b", "c.d", "e")}
    folder = voc(tmp_path, {"train": ["a"], "test": ["c.d"], "trainval": ["a", "b", "e"]}, stems)
    assert {item.key: item.split for item in opened(folder).items} == {
        "a": "train",
        "b": "unlisted",
        "c_d": "test",
        "e": "unlisted",
    }


def test_a_folder_without_lists_is_of_the_given_split(tmp_path: Path) -> None:
    folder = voc(tmp_path, {}, {"a": described(), "b": described()})
    assert {item.split for item in opened(folder).items} == {"given"}


def test_official_archives_are_one_set_with_one_numbering(tmp_path: Path) -> None:
    voc(
        tmp_path / "1" / "VOCdevkit" / "VOC2007",
        {"train": ["1"], "val": ["2"]},
        {"1": described(DOG), "2": described()},
    )
    voc(
        tmp_path / "2" / "VOCdevkit" / "VOC2007",
        {"test": ["3"]},
        {"3": described(OBJECT.format("cat", 1, 1, 2, 2))},
    )
    for name in "12":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.add(tmp_path / name, ".")
    source = opened(tmp_path / "1.tar", tmp_path / "2.tar")
    assert [(item.key, item.split, item.image_id) for item in source.items] == [
        ("VOC2007_1", "train", 1),
        ("VOC2007_2", "val", 2),
        ("VOC2007_3", "test", 3),
    ]
    assert source.categories == ({"id": 1, "name": "cat"}, {"id": 2, "name": "dog"})
    first, second, third = [item.annotations or [] for item in source.items]
    assert (first[0]["category_id"], second, third[0]["category_id"]) == (2, [], 1)
    assert read_items(source.items) == [b"1", b"2", b"3"]


def test_other_images_beside_a_voc_folder_are_left_alone(tmp_path: Path) -> None:
    voc(tmp_path, {}, {"a": described()})
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "SegmentationClass" / "a.png").write_bytes(b"")
    assert [item.key for item in opened(tmp_path).items] == ["a"]


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c SYSTEM "file:///etc/passwd">]>'
DAMAGED = [
    ("", "not an annotation of VOC"),
    ("<annotation><object>", "not an annotation of VOC .*no element found|mismatched"),
    (BOMB + described(OBJECT.format("&b;", 1, 1, 2, 2)), "it has a DOCTYPE"),
    (described(OBJECT.format("&c;", 1, 1, 2, 2)), "undefined entity"),
    ("<html></html>", "its root is 'html', not 'annotation'"),
    (described(DOG, filename="b.jpg"), "it is of the image 'b.jpg' by its <filename>"),
    (described(DOG.replace("xmin", "left")), "an object has no bndbox/xmin"),
    (described(DOG.replace("<name>dog</name>", "")), "an object has no name"),
    (described(DOG.replace("48", "nan")), r"an object has the box \[nan, 240.0, 195.0, 371.0\]"),
    (described(DOG.replace("48", "wide")), "could not convert string to float: 'wide'"),
    (described(DOG.replace("<bndbox>", "<difficult>very</difficult><bndbox>")), "invalid literal"),
    ('<?xml version="1.0" encoding="nonsense"?>' + described(), "unknown encoding"),
]


@pytest.mark.parametrize(("content", "message"), DAMAGED)
def test_a_damaged_annotation_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ShardError, match=rf"Annotations/a\.xml: .*({message})"):
        opened(voc(tmp_path, {}, {"a": content}))


def test_a_doctype_in_another_encoding_is_found(tmp_path: Path) -> None:
    voc(tmp_path, {}, {"a": ""})
    (tmp_path / "Annotations" / "a.xml").write_bytes((BOMB + described(DOG)).encode("utf-16"))
    with pytest.raises(ShardError, match="it has a DOCTYPE"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "filename", ["a.jpg", "a", "C:\\photos\\a.png", "/home/pi/a.jpg", " a.jpg\n", ""]
)
def test_a_filename_may_have_another_folder_or_suffix(tmp_path: Path, filename: str) -> None:
    assert len(opened(voc(tmp_path, {}, {"a": described(DOG, filename=filename)})).items) == 1


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("JPEGImages/b.jpg", "b", r"JPEGImages/b\.jpg: no XML file in Annotations describes it"),
        ("Annotations/b.xml", described(), r"Annotations/b\.xml: its image is not in JPEGImages"),
        (
            "JPEGImages/a.png",
            "a",
            r"JPEGImages/a\.(jpg|png): .*JPEGImages/a\.(png|jpg) differs in its suffix only",
        ),
        (
            "ImageSets/Main/train.txt",
            "a\nb\n",
            r"train\.txt: it lists 'b', which is not in JPEGImages",
        ),
        (
            "ImageSets/Main/train.txt",
            "a  1\n",
            r"train\.txt: it lists 'a  1', which is not in JPEGImages",
        ),
        (
            "ImageSets/Main/test.txt",
            "a\n",
            r"test\.txt: it lists 'a', which val\.txt has too; keep it in one",
        ),
    ],
)
def test_files_that_do_not_belong_together_are_named(
    tmp_path: Path, path: str, content: str, message: str
) -> None:
    folder = voc(tmp_path, {"val": ["a"]}, {"a": described(DOG)})
    (folder / path).write_text(content)
    with pytest.raises(ShardError, match=message):
        opened(folder)


def test_voc_and_class_folders_do_not_mix_in_a_split(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "1.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"images in class folders .* and images with annotations"):
        opened(voc(tmp_path / "voc", {}, {"a": described(DOG)}), tmp_path / "classes")
