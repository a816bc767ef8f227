"""Feature samples: their images, their file, the map drawn from them, and nearest neighbours."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hemoco.config import EncoderConfig
from hemoco.data.labelled import load_images
from hemoco.data.shards.index import read_index
from hemoco.errors import CheckpointError, ShardError
from hemoco.features.extract import extract_features
from hemoco.features.map import (
    all_alike,
    chosen_rows,
    draw_map,
    nearest,
    place_in_cells,
    same_label_share,
)
from hemoco.features.sample import decode_sample, encode_sample, sample_features
from hemoco.models.resnet import Backbone, build_encoder
from tests.helpers.feature_samples import sample_of
from tests.helpers.shard_folders import write_shards


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    config = EncoderConfig(architecture="resnet10t", stem="small")
    return Backbone(
        build_encoder(config, seed=0), config, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    ).eval()


def test_a_sample_has_the_features_of_its_images(backbone: Backbone, tmp_path: Path) -> None:
    write_shards(str(tmp_path), [5, 4])
    sample = sample_features(backbone, str(tmp_path), read_index(str(tmp_path)), "train", 16)
    images, labels, keys = load_images(str(tmp_path), read_index(str(tmp_path)), "train", 16)
    assert sample.keys == tuple(keys) and sample.labels.tolist() == labels.tolist()
    assert torch.equal(sample.thumbnails, images)
    features = extract_features(backbone, images)
    assert torch.equal(sample.features, (features / features.norm(dim=1, keepdim=True)).half())


def test_undecodable_images_are_left_out_and_labels_may_be_missing(
    backbone: Backbone, tmp_path: Path
) -> None:
    write_shards(str(tmp_path), [5], bad={2}, labelled=False)
    sample = sample_features(backbone, str(tmp_path), read_index(str(tmp_path)), "train", 16)
    assert sample.keys == ("0", "1", "3", "4") and sample.labels.tolist() == [-1] * 4
    assert same_label_share(sample, nearest(sample, 1)) is None


def test_a_split_without_a_good_image_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    write_shards(str(tmp_path), [2], bad={0, 1})
    with pytest.raises(
        ShardError, match="no image of split 'train' can be decoded, of 2 that were tried"
    ):
        sample_features(backbone, str(tmp_path), read_index(str(tmp_path)), "train", 16)


def test_an_encoded_sample_decodes_to_itself_and_a_damaged_one_is_refused() -> None:
    sample = sample_of(6)
    back = decode_sample(encode_sample(sample))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(sample[:3], back[:3], strict=True))
    assert back[3:] == sample[3:]
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        decode_sample(encode_sample(sample)[:-10])


def test_a_sample_of_another_version_is_refused() -> None:
    data = encode_sample(sample_of(6)).replace(
        b"hemoco-feature-sample-1", b"hemoco-feature-sample-9"
    )
    with pytest.raises(CheckpointError, match="is of format hemoco-feature-sample-9"):
        decode_sample(data)


def test_a_collapsed_backbone_is_recognised() -> None:
    sample = sample_of(30)
    assert not all_alike(sample)
    assert all_alike(sample._replace(features=torch.zeros(30, 8, dtype=torch.float16)))
    assert all_alike(sample._replace(features=torch.full((30, 8), 8**-0.5, dtype=torch.float16)))


def test_nearest_agrees_with_a_loop_over_pairs() -> None:
    sample = sample_of(12)
    features = sample.features.float()
    for row, near in enumerate(nearest(sample, 3)):
        cosines = [
            float(torch.cosine_similarity(features[row], other, dim=0)) for other in features
        ]
        others = [other for other in range(12) if other != row]
        others.sort(key=lambda other: -cosines[other])
        expected = [cosines[other] for other in others[:3]]
        assert [image.row for image in near] == others[:3]
        assert [image.similarity for image in near] == pytest.approx(expected, abs=1e-5)


def test_shown_images_take_turns_over_the_classes() -> None:
    assert chosen_rows(sample_of(10), 4) == [0, 1, 2, 3]
    sorted_by_class = sample_of(6)._replace(labels=torch.tensor([0, 0, 0, 0, 1, 1]))
    assert chosen_rows(sorted_by_class, 3) == [0, 4, 1]
    without = sample_of(10)._replace(labels=torch.full((10,), -1))
    assert chosen_rows(without, 5) == [0, 2, 4, 6, 8]


def test_each_image_has_a_cell_of_its_own_the_nearest_where_it_is_free() -> None:
    corners = np.array([[0.0, 0.0], [0.0, 5.0], [10.0, 0.0], [10.0, 5.0]])
    assert place_in_cells(corners, 4, 3) == [(0, 0), (0, 2), (3, 0), (3, 2)]
    crowd = place_in_cells(np.zeros((12, 2)), 4, 3)
    assert len(set(crowd)) == 12


def test_a_map_shows_two_separated_classes_in_different_regions() -> None:
    sample = sample_of(40)
    pixels = np.asarray(Image.open(io.BytesIO(draw_map(sample))).convert("RGB")).astype(int)
    colours = ((0x33, 0x22, 0x88), (0x88, 0xCC, 0xEE))
    first, second = (
        np.argwhere((np.abs(pixels - colour) < 8).all(axis=2)) for colour in colours
    )  # (pixels of that colour, 2)
    assert len(first) > 20 * 100 and len(second) > 20 * 100
    assert np.linalg.norm(first.mean(axis=0) - second.mean(axis=0)) > 300
