import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hemoco.backbones.file import random_backbone
from hemoco.config import EncoderConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import TrainingError
from hemoco.features.cache import FeatureCache, split_features
from hemoco.features.extract import calibrate_batch_norm, extract_features
from hemoco.models.resnet import Backbone
from tests.helpers.labelled import images_of, in_memory

TINY = EncoderConfig(architecture="resnet10t", stem="small")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class CountingBackbone(Backbone):
    """A backbone that counts the images it has computed."""

    seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return super().forward(images)


def tiny(seed: int = 0, mean: tuple[float, float, float] = MEAN) -> CountingBackbone:
    made = random_backbone(TINY, seed, mean, STD)
    return CountingBackbone(made.encoder, TINY, mean, STD).eval()


def noise(size: int = 8, seed: int = 0) -> LabelledSplit:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (10, 3, size, size), dtype=torch.uint8, generator=generator)
    return in_memory(images, torch.arange(10) % 3)


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.safetensors")
    return path


def test_features_do_not_depend_on_batch_or_mode_and_leave_the_backbone_alone() -> None:
    backbone = random_backbone(TINY, 0, MEAN, STD)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    expected = torch.cat([backbone((image[None] / 255 - 0.5) / 0.25) for image in images])
    backbone.train()
    features = extract_features(backbone, images, batch_size=2)
    torch.testing.assert_close(features, expected)
    assert backbone.training
    assert not features.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_calibration_gives_the_first_norm_the_statistics_of_the_images() -> None:
    backbone = random_backbone(TINY, 0, MEAN, STD)
    images = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    weights = [parameter.clone() for parameter in backbone.parameters()]
    calibrate_batch_norm(backbone, images)
    norm, convolution = backbone.encoder.bn1, backbone.encoder.conv1
    halves = (images[::2], images[1::2])  # 300 images make two batches
    outputs = [convolution(backbone.normalise(half)) for half in halves]
    torch.testing.assert_close(norm.running_mean, sum(o.mean((0, 2, 3)) for o in outputs) / 2)
    torch.testing.assert_close(norm.running_var, sum(o.var((0, 2, 3)) for o in outputs) / 2)
    assert (norm.momentum, norm.num_batches_tracked, backbone.training) == (0.1, 2, False)
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.parameters(), strict=True))


def test_cached_features_are_the_live_ones_bit_for_bit_and_not_computed_again(
    tmp_path: Path,
) -> None:
    backbone, split = tiny(), noise()
    live = split_features(backbone, split, None)
    first, again = (
        split_features(backbone, split, FeatureCache(tmp_path / "new")) for _ in range(2)
    )
    assert torch.equal(first, live)
    assert torch.equal(again, live)
    assert backbone.seen == 20
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_the_metadata_of_a_file_describes_its_content(tmp_path: Path) -> None:
    features = split_features(tiny(), noise(), FeatureCache(tmp_path))
    with safe_open(only_file(tmp_path), "pt") as file:
        about = file.metadata()
        assert torch.equal(file.get_tensor("features"), features)
        assert file.get_tensor("labels").tolist() == noise().labels.tolist()
    assert (about["architecture"], about["layer"], about["size"]) == ("resnet10t", "pooled", "8")
    assert (about["mean"], about["key"]) == ("[0.5, 0.5, 0.5]", only_file(tmp_path).stem)


def test_other_backbones_images_and_transforms_have_other_features(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    calibrated, counted = tiny(), tiny()
    calibrated.encoder.bn1.running_mean += 1e-6
    counted.encoder.bn1.num_batches_tracked += 1
    relabelled = noise()._replace(labels=torch.zeros(10, dtype=torch.int64))
    backbones = [tiny(), tiny(seed=1), calibrated, counted, tiny(mean=(0.5, 0.5, 0.4))]
    pairs: list[tuple[Backbone, LabelledSplit]] = [(backbone, noise()) for backbone in backbones]
    pairs += [(tiny(), split) for split in (noise(size=9), noise(seed=1), relabelled)]
    for backbone, split in pairs:
        expected = extract_features(backbone, images_of(split))
        assert torch.equal(split_features(backbone, split, cache), expected)
    assert len(list(tmp_path.glob("*.safetensors"))) == 8


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "foreign"])
def test_damaged_file_is_reported_and_replaced(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, cache = tiny(), FeatureCache(tmp_path)
    live = split_features(backbone, noise(), cache)
    path = only_file(tmp_path)
    data = path.read_bytes()
    split_features(backbone, noise(seed=1), cache)
    other = next(each for each in tmp_path.glob("*.safetensors") if each != path)
    flipped = data[:-2000] + bytes([data[-2000] ^ 1]) + data[-1999:]
    damaged = {"bit": flipped, "cut": data[:-5], "empty": b"", "foreign": other.read_bytes()}
    path.write_bytes(damaged[damage])
    assert torch.equal(split_features(backbone, noise(), cache), live)
    assert f"event=damaged_features_file path={path}" in caplog.text
    assert torch.equal(split_features(backbone, noise(), cache), live)
    assert backbone.seen == 30


def test_the_least_recently_used_file_is_removed(tmp_path: Path) -> None:
    split_features(tiny(), noise(), FeatureCache(tmp_path))
    size = only_file(tmp_path).stat().st_size
    backbone, cache = tiny(), FeatureCache(tmp_path, max_bytes=2 * size + size // 2)
    split_features(backbone, noise(seed=1), cache)
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    for index, path in enumerate(files):
        os.utime(path, (1000 + index, 1000 + index))
    split_features(backbone, noise(), cache)  # a hit, so this file is no longer the oldest
    split_features(backbone, noise(seed=2), cache)
    assert backbone.seen == 20
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    split_features(backbone, noise(), cache)
    assert backbone.seen == 20


def test_features_larger_than_the_limit_are_not_cached(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = FeatureCache(tmp_path, max_bytes=1000)
    assert split_features(tiny(), noise(), cache).shape == (10, 512)
    assert not list(tmp_path.glob("*.*t*"))
    assert "event=features_not_cached" in caplog.text


def test_the_partial_file_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    partial = tmp_path / f"{16 * '0123'}.partial"
    partial.write_bytes(b"half")
    split_features(tiny(), noise(), FeatureCache(tmp_path))
    assert not partial.exists()
    assert only_file(tmp_path).exists()


def test_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = FeatureCache(tmp_path / "file" / "features")
    assert split_features(tiny(), noise(), cache).shape == (10, 512)
    assert "event=features_not_cached" in caplog.text


def test_concurrent_writers_leave_complete_files(tmp_path: Path) -> None:
    backbone = tiny()
    live = [split_features(backbone, noise(seed=seed), None) for seed in range(3)]

    def cached(seed: int) -> torch.Tensor:
        return split_features(backbone, noise(seed=seed), FeatureCache(tmp_path))

    seeds = [index % 3 for index in range(12)]
    with ThreadPoolExecutor(4) as threads:
        for seed, features in zip(seeds, threads.map(cached, seeds), strict=True):
            assert torch.equal(features, live[seed])
    assert len(list(tmp_path.iterdir())) == 4  # three files and the lock


def test_backbone_that_has_diverged_is_named(tmp_path: Path) -> None:
    backbone = tiny()
    backbone.encoder.bn1.running_var.fill_(torch.nan)
    with pytest.raises(TrainingError, match="features are not finite: its training has diverged"):
        split_features(backbone, noise(), FeatureCache(tmp_path))
    assert not list(tmp_path.iterdir())
