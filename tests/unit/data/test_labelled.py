from pathlib import Path

import pytest
import torch

from hemoco.backbones.file import random_backbone
from hemoco.config import EncoderConfig
from hemoco.data.labelled import load_images, open_split, some_images
from hemoco.data.shards.index import read_index
from hemoco.errors import ShardError
from hemoco.features.cache import FeatureCache, split_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.scores import check_labels
from tests.helpers.labelled import in_memory
from tests.helpers.shard_folders import write_shards

SIZES = (300, 1, 250)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("labelled")), SIZES)


def backbone(seed: int = 0) -> Backbone:
    return random_backbone(
        EncoderConfig(architecture="resnet10t", stem="small"), seed, (0.5,) * 3, (0.25,) * 3
    )


def test_a_split_in_storage_is_the_one_in_memory(shards: str) -> None:
    images, labels, _ = load_images(shards, read_index(shards), "train", 8)
    split = open_split(shards, read_index(shards), "train", 8)
    batches = list(split.batches())
    assert [len(batch) for batch in batches] == [256, 256, 39]
    assert torch.equal(torch.cat(batches), images)
    assert torch.equal(split.labels, labels)
    assert split.classes == ("a", "b", "c") and check_labels(split, split) == 3
    expected = split_features(backbone(), in_memory(images, labels), None)
    assert torch.equal(split_features(backbone(), split, None), expected)


def test_cached_features_need_no_image(tmp_path: Path) -> None:
    url, cache = write_shards(str(tmp_path / "shards"), (9, 3)), FeatureCache(tmp_path / "cache")
    split = open_split(url, read_index(url), "train", 8)
    live = split_features(backbone(), split, cache)
    for path in (tmp_path / "shards").glob("*.tar"):
        path.unlink()
    assert torch.equal(split_features(backbone(), split, cache), live)


@pytest.mark.parametrize("change", ["backbone", "size", "data"])
def test_features_of_anything_else_are_computed(change: str, tmp_path: Path) -> None:
    url, cache = write_shards(str(tmp_path / "shards"), (9, 3)), FeatureCache(tmp_path / "cache")
    split_features(backbone(), open_split(url, read_index(url), "train", 8), cache)
    other = write_shards(str(tmp_path / "other"), (8, 4)) if change == "data" else url
    made = backbone(int(change == "backbone"))
    split = open_split(other, read_index(other), "train", 12 if change == "size" else 8)
    assert torch.equal(split_features(made, split, cache), split_features(made, split, None))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2


def test_some_images_come_from_few_shards_all_over_the_split(tmp_path: Path) -> None:
    url = write_shards(str(tmp_path), [10] * 25)
    for path in tmp_path.glob("*.tar"):
        if int(path.stem[-6:]) % 5:
            path.unlink()  # not read
    values = some_images(url, read_index(url), "train", size=8, count=50)[:, 0, 0, 0].tolist()
    assert values == [shard * 10 + row for shard in range(0, 25, 5) for row in range(10)]


@pytest.mark.parametrize(("count", "expected"), [(551, 551), (10_000, 551), (100, 100)])
def test_some_images_are_about_as_many_as_wanted_or_all(
    shards: str, count: int, expected: int
) -> None:
    images = some_images(shards, read_index(shards), "train", size=4, count=count)
    assert len(images) == pytest.approx(expected, abs=5)


def test_images_without_a_label_are_told_before_any_is_read(tmp_path: Path) -> None:
    url = write_shards(str(tmp_path), (4,), labelled=False)
    (tmp_path / read_index(url).shards[0].name).unlink()
    split = open_split(url, read_index(url), "train", 8)
    with pytest.raises(ShardError, match="4 of 4 images have no label"):
        check_labels(split, split)
