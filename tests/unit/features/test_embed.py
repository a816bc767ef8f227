"""Embedding: the contents of the Parquet files, bad samples, refused inputs and file names."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from hemoco import load_backbone
from hemoco.backbones.file import export_backbone, random_backbone
from hemoco.config import EncoderConfig
from hemoco.data.shards.index import (
    Shard,
    ShardIndex,
    read_index,
    read_table,
    write_index,
    write_table,
)
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.data.stream.bad_samples import BadSample
from hemoco.errors import CheckpointError, ConfigError, ShardError, TrainingError, UsageError
from hemoco.features.embed import EmbeddedShard, embed_shards
from hemoco.features.parquet import file_name
from hemoco.features.plan import (
    EmbedConfig,
    EmbedPlan,
    finished_files,
    fixed_url,
    plan_embedding,
    usual_size,
)
from hemoco.storage.objects import list_names, write_bytes
from jobs.cli import main
from tests.helpers.shard_folders import png, write_shards

ROOT = Path(__file__).parents[3]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CONFIG = EmbedConfig(size=10, resize=10, batch_size=4)


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """The path of a backbone with random weights."""
    return saved(tmp_path / "backbone.safetensors", seed=0)


def saved(path: Path, seed: int) -> str:
    tiny = EncoderConfig(architecture="resnet10t", stem="small")
    export_backbone(
        random_backbone(tiny, seed, MEAN, STD), str(path), {"data_digest": "d", "run_id": "r"}
    )
    return str(path)


def planned(
    shards: str, backbone: str, dest: Path | str, config: EmbedConfig = CONFIG
) -> EmbedPlan:
    return plan_embedding(shards, read_index(shards), fixed_url(backbone), str(dest), config)


def embedded(plan: EmbedPlan) -> list[EmbeddedShard]:
    """Embeds all shards of the plan in this process, without Ray."""
    shards = read_index(plan.shards_url).shards
    return list(embed_shards(plan, shards, device=torch.device("cpu"), threads=2))


def shards_of(url: str, images: dict[str, np.ndarray]) -> str:
    """A folder with one shard of images (H, W, 3)."""
    samples = []
    for key, pixels in images.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        samples.append(Sample(key, buffer.getvalue(), None, suffix="png"))
    data = encode_shard(samples)
    digest = hashlib.sha256(data).hexdigest()
    shard = Shard("train-000000.tar", "train", len(samples), len(data), digest)
    write_bytes(f"{url}/{shard.name}", data)
    write_table(url, shard, parse_tar(data, shard.name).table)
    write_index(url, ShardIndex((shard,), (), ()))
    return url


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def features(dest: Path | str) -> dict[str, np.ndarray]:
    table = pandas.read_parquet(dest)
    return dict(zip(table["key"], table["feature"], strict=True))


def by_hand(backbone: str, crops: np.ndarray) -> np.ndarray:
    """Features of crops (N, S, S, 3), computed with the backbone itself."""
    inputs = ((crops / 255 - np.array(MEAN)) / np.array(STD)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        outputs = load_backbone(backbone)(torch.from_numpy(inputs.astype(np.float32)))
    expected: np.ndarray = outputs.numpy()
    return expected


def test_features_are_the_backbone_of_the_normalised_centre(tmp_path: Path, backbone: str) -> None:
    wide, high = noise(10, 16, 3), noise(15, 10, 3)
    shards = shards_of(str(tmp_path / "shards"), {"wide": wide, "high": high})
    embedded(planned(shards, backbone, tmp_path / "out"))
    expected = by_hand(backbone, np.stack([wide[:, 3:13], high[2:12]]))
    by_key = features(tmp_path / "out")
    actual = np.stack([by_key["wide"], by_key["high"]])
    # not equal, since rounding depends on the batch size
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_image_is_scaled_to_resize_before_its_centre_is_cut_out(
    tmp_path: Path, backbone: str
) -> None:
    image = np.asarray(Image.fromarray(noise(3, 4, 3)).resize((40, 30), Image.Resampling.BICUBIC))
    shards = shards_of(str(tmp_path / "shards"), {"a": image})
    embedded(planned(shards, backbone, tmp_path / "out", dataclasses.replace(CONFIG, resize=12)))
    scaled = np.asarray(Image.fromarray(image).resize((16, 12), Image.Resampling.BILINEAR))
    expected = by_hand(backbone, scaled[None, 1:11, 3:13])
    # torch and Pillow round a few pixels to neighbouring values
    np.testing.assert_allclose(features(tmp_path / "out")["a"], expected[0], rtol=0.02, atol=0.01)


def test_pandas_alone_reads_keys_splits_labels_and_classes(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [5, 2])
    embedded(planned(shards, backbone, tmp_path / "out"))
    table = pandas.read_parquet(tmp_path / "out")
    assert list(table) == ["key", "split", "label", "class_name", "feature"]
    assert table["key"].tolist() == ["0", "1", "2", "3", "4", "5", "6"]
    assert set(table["split"]) == {"train"}
    assert table["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert table["class_name"].tolist() == ["a", "b", "c", "a", "b", "c", "a"]
    assert np.stack(table["feature"]).shape == (7, 512)


def test_images_without_labels_have_null(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [2], labelled=False)
    embedded(planned(shards, backbone, tmp_path / "out"))
    table = pyarrow.parquet.read_table(tmp_path / "out" / "train-000000.parquet")
    assert table["label"].null_count == table["class_name"].null_count == 2
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[512]"


def test_the_schema_records_the_origin_of_the_features(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [2])
    embedded(planned(shards, backbone, tmp_path / "out"))
    about = pyarrow.parquet.read_schema(tmp_path / "out" / "train-000000.parquet").metadata
    index = read_index(shards)
    expected = {
        "backbone_sha256": hashlib.sha256(Path(backbone).read_bytes()).hexdigest(),
        "backbone_url": Path(backbone).as_uri(),
        "data_digest": index.digest,
        "shard_sha256": index.shards[0].sha256,
        "size": "10",
        "transform": "RGB, shorter side scaled to 10 (bilinear, antialiased), centre 10 x 10, "
        "(x / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.25, 0.3]",
    }
    assert {name: about[f"hemoco.{name}".encode()].decode() for name in expected} == expected


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_features_do_not_depend_on_the_batch(
    tmp_path: Path, backbone: str, batch_size: int
) -> None:
    shards = write_shards(str(tmp_path / "shards"), [5, 0, 3])
    config = dataclasses.replace(CONFIG, batch_size=batch_size)
    done = embedded(planned(shards, backbone, tmp_path / "out", config))
    assert [shard.images for shard in done] == [5, 0, 3]
    by_key = features(tmp_path / "out")
    actual = np.stack([by_key[str(number)] for number in range(8)])
    crops = np.stack([np.full((10, 10, 3), number, np.uint8) for number in range(8)])
    np.testing.assert_allclose(actual, by_hand(backbone, crops), rtol=1e-4, atol=1e-5)


def test_lower_precision_is_near_and_stored_in_half(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [4])
    bfloat16 = dataclasses.replace(CONFIG, precision="bfloat16")
    embedded(planned(shards, backbone, tmp_path / "full"))
    embedded(planned(shards, backbone, tmp_path / "half", bfloat16))
    full, half = (np.stack([*features(tmp_path / name).values()]) for name in ("full", "half"))
    assert half.dtype == np.float16
    # the tolerance is wide: bfloat16 has 8 significant bits
    np.testing.assert_allclose(half, full, rtol=0.1, atol=0.02 * full.max())


def test_undecodable_samples_are_left_out_and_listed(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [3, 3], bad={1})
    plan = planned(shards, backbone, tmp_path / "out")
    bad = BadSample(f"{plan.shards_url}/train-000000.tar", "1", "not an image")
    assert embedded(plan)[0] == (2, (bad,))
    assert sorted(features(tmp_path / "out")) == ["0", "2", "3", "4", "5"]
    assert finished_files(plan)["train-000000.parquet"].bad == (bad,)


def test_undamaged_samples_of_a_damaged_shard_are_used(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [3, 3])
    shard = read_index(shards).shards[1]
    path = Path(shards) / shard.name
    data = bytearray(path.read_bytes())
    data[int(read_table(shards, shard).offsets[0]) + 50] ^= 1  # in the first image
    path.write_bytes(data)
    whole, damaged = embedded(planned(shards, backbone, tmp_path / "out"))
    assert (whole.images, damaged.images) == (3, 2)
    assert [(bad.key, bad.reason) for bad in damaged.bad] == [("3", "damaged since packed")]


def test_another_shard_than_was_packed_is_an_error(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [3, 3])
    first, second = (Path(shards) / shard.name for shard in read_index(shards).shards)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ShardError, match=r"train-000001\.tar: its SHA-256 is"):
        embedded(planned(shards, backbone, tmp_path / "out"))


def test_a_backbone_that_has_diverged_is_named(tmp_path: Path) -> None:
    broken = random_backbone(EncoderConfig(architecture="resnet10t", stem="small"), 0, MEAN, STD)
    broken.encoder.bn1.running_var.fill_(torch.nan)
    export_backbone(broken, str(tmp_path / "backbone"), {})
    shards = write_shards(str(tmp_path / "shards"), [2])
    with pytest.raises(TrainingError, match="features are not finite"):
        embedded(planned(shards, str(tmp_path / "backbone"), tmp_path / "out"))
    assert list_names(str(tmp_path / "out")) == []


def test_a_backbone_replaced_meanwhile_is_refused(tmp_path: Path, backbone: str) -> None:
    plan = planned(write_shards(str(tmp_path / "shards"), [2]), backbone, tmp_path / "out")
    saved(Path(backbone), seed=1)
    with pytest.raises(CheckpointError, match="was replaced meanwhile"):
        embedded(plan)


def other(plan: EmbedPlan, what: str, folder: Path) -> EmbedPlan:
    """A plan for the same folder that would give other features."""
    if what == "backbone_sha256":
        return planned(plan.shards_url, saved(folder / "other.safetensors", seed=1), plan.dest)
    if what == "data_digest":
        return planned(write_shards(str(folder / "more"), [2, 3]), plan.backbone_url, plan.dest)
    value: Any = {"precision": "bfloat16", "resize": 12}[what]
    return dataclasses.replace(plan, config=dataclasses.replace(plan.config, **{what: value}))


@pytest.mark.parametrize("what", ["backbone_sha256", "data_digest", "precision", "resize"])
def test_other_features_in_the_folder_are_refused_with_the_difference(
    tmp_path: Path, backbone: str, what: str
) -> None:
    plan = planned(write_shards(str(tmp_path / "shards"), [2]), backbone, tmp_path / "out")
    embedded(plan)
    assert finished_files(plan).keys() == {"train-000000.parquet"}
    changed = other(plan, what, tmp_path)
    difference = f"{what}: {plan.identity[what]} -> {changed.identity[what]}"
    with pytest.raises(
        UsageError, match=rf"out holds other features \(train-000000\.parquet: {difference}\)"
    ):
        finished_files(changed)


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_parquet_file_that_is_not_ours_is_refused(
    tmp_path: Path, backbone: str, damage: str
) -> None:
    plan = planned(write_shards(str(tmp_path / "shards"), [2]), backbone, tmp_path / "out")
    embedded(plan)
    path = tmp_path / "out" / "train-000000.parquet"
    if damage == "foreign":
        pandas.DataFrame({"key": ["a"]}).to_parquet(path)
    else:
        path.write_bytes(path.read_bytes()[:-5] if damage == "cut" else b"")
    reason = "is not a complete Parquet file|holds no features of hemoco"
    with pytest.raises(UsageError, match=rf"train-000000\.parquet: ({reason})"):
        finished_files(plan)


def test_file_names_of_shards_are_unique_and_without_slashes() -> None:
    shards = ["train-000000.tar", "s3://a/x/0.tar", "s3://b/x/0.tar", "x/0.tar", "a b.tar", ".tar"]
    names = [file_name(shard) for shard in shards]
    assert names[0] == "train-000000.parquet"
    assert len(set(names)) == len(shards)
    assert not [name for name in names if "/" in name]


def test_the_size_is_that_of_the_pretraining_or_depends_on_the_stem(
    tmp_path: Path, backbone: str
) -> None:
    large = random_backbone(EncoderConfig(architecture="resnet10t"), 0, MEAN, STD)
    export_backbone(large, str(tmp_path / "imported"), {})
    export_backbone(large, str(tmp_path / "pretrained"), {"size": "48"})
    sizes = (
        usual_size(backbone),
        usual_size(str(tmp_path / "imported")),
        usual_size(str(tmp_path / "pretrained")),
    )
    assert sizes == (32, 224, 48)


def test_a_crop_larger_than_its_image_is_wrong_usage() -> None:
    with pytest.raises(ConfigError, match=r"embed\.resize is 20: it must be at least size \(24\)"):
        EmbedConfig(size=24, resize=20)


def test_a_wrong_backbone_is_one_line_before_ray_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(str(tmp_path / "shards"), [2])
    (tmp_path / "image").write_bytes(png(0))
    assert main(["embed", shards, str(tmp_path / "image"), str(tmp_path / "out")]) == 1
    assert "image: is not a whole safetensors file" in capsys.readouterr().err
