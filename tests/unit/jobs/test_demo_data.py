"""The demo's data: splits by source digit, masks that fit the pixels, reproducible files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from hemoco.transfer.detection.coco_metric import decode_mask
from jobs import demo_data as digits


def pixels_of(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    digits.write_scenes(folder, 0)
    return folder


def test_no_test_digit_is_a_training_digit_and_all_are_used() -> None:
    split = digits.split_digits(0)
    inks = {name: Counter(digit.ink.tobytes() for digit in found) for name, found in split.items()}
    assert not inks["train"].keys() & inks["test"].keys()
    assert inks["train"] + inks["test"] == Counter(
        (scan / 16).astype(np.float32).tobytes() for scan in load_digits().data
    )


def test_split_keeps_the_share_of_each_class() -> None:
    split = digits.split_digits(3)
    train, test = (Counter(digit.label for digit in split[name]) for name in ("train", "test"))
    for label in range(10):
        assert test[label] / (train[label] + test[label]) == pytest.approx(0.3, abs=0.005)


def test_another_seed_splits_otherwise() -> None:
    first, second = (
        {digit.ink.tobytes() for digit in digits.split_digits(seed)["test"]} for seed in (0, 1)
    )
    assert first != second


def test_digits_are_class_folders_of_32_pixel_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digits, "_RENDERINGS", {"train": 1, "test": 1})
    digits.write_digits(tmp_path, 0)
    files = sorted(tmp_path.glob("*/*/*.png"))
    assert {path.parent.name for path in files} == set("0123456789")
    assert {pixels_of(path).shape for path in files} == {(32, 32, 3)}
    assert len(files) == 1797


def test_the_same_seed_draws_the_same_scenes(scenes: Path, tmp_path: Path) -> None:
    digits.write_scenes(tmp_path, 0)
    names = [path.relative_to(scenes) for path in scenes.glob("**/*") if path.is_file()]
    assert all((scenes / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_scene_boxes_and_areas_fit_their_masks(scenes: Path) -> None:
    for item in json.loads((scenes / "instances_test.json").read_text())["annotations"]:
        rows, columns = np.nonzero(decode_mask(item["segmentation"], 96, 96))
        left, top = columns.min(), rows.min()
        assert item["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
        assert item["area"] == len(rows) >= 20


def test_scene_masks_do_not_overlap_and_are_brighter_than_the_ground(scenes: Path) -> None:
    content = json.loads((scenes / "instances_train.json").read_text())
    for image in content["images"][:20]:
        objects = [item for item in content["annotations"] if item["image_id"] == image["id"]]
        covered = sum(decode_mask(item["segmentation"], 96, 96).astype(int) for item in objects)
        assert covered.max() == 1
        pixels = pixels_of(scenes / "train" / image["file_name"]).mean(axis=2)
        assert pixels[covered == 1].mean() > pixels[covered == 0].mean() + 0.15 * 255
