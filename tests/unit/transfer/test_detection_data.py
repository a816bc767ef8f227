"""Detection samples from shards, the cleaning of annotations, targets, and the order of batches."""

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from hemoco.config import FasterRcnnConfig, MaskRcnnConfig
from hemoco.data.shards.index import Shard, ShardIndex, read_index, write_index
from hemoco.data.shards.tar import Sample, encode_shard
from hemoco.data.sources.folders import open_source, read_items
from hemoco.errors import ConfigError, ShardError
from hemoco.storage.objects import join_url, write_bytes
from hemoco.transfer.detection.annotations import clean_annotations
from hemoco.transfer.detection.coco_metric import encode_mask
from hemoco.transfer.detection.data import (
    DetectionSample,
    Draw,
    detection_batches,
    draw,
    epoch_order,
    load_detection_samples,
    make_example,
)
from hemoco.transfer.detection.targets import build_target, flip_horizontally, scale

BOXES = FasterRcnnConfig(global_batch_size=4, train_sizes=(32, 48, 64), max_size=80, cpus=2)
MASKS = MaskRcnnConfig(global_batch_size=4, train_sizes=(32, 48, 64), max_size=80, cpus=2)
CATEGORIES = ({"id": 7, "name": "bright"}, {"id": 3, "name": "dark"})


def square(left: int, top: int, side: int, **changes: Any) -> dict[str, Any]:
    mask = np.zeros((48, 64), bool)
    mask[top : top + side, left : left + side] = True
    item = {
        "category_id": 7,
        "bbox": [left, top, side, side],
        "iscrowd": 0,
        "segmentation": encode_mask(mask),
    }
    return item | changes


def picture(value: int = 60, size: tuple[int, int] = (64, 48)) -> bytes:
    buffer = io.BytesIO()
    image = Image.new("RGB", size, (value, value, value))
    ImageDraw.Draw(image).rectangle((20, 10, 39, 29), (220, 220, 220))
    image.save(buffer, "png")
    return buffer.getvalue()


def sample(image_id: int = 1, annotations: list[dict[str, Any]] | None = None) -> DetectionSample:
    return DetectionSample(
        image=picture(image_id),
        annotations=[square(20, 10, 20)] if annotations is None else annotations,
        image_id=image_id,
        shard="s3://b/train-000000.tar",
        key=f"k{image_id}",
        source_id=None,
        height=48,
        width=64,
    )


def shards(
    folder: Path, annotations: list[list[dict[str, Any]] | None], image: bytes | None = None
) -> str:
    """A shard folder with an image for each list of annotations."""
    data = encode_shard(
        Sample(f"k{i}", image or picture(i), None, items, 9, suffix="png")
        for i, items in enumerate(annotations)
    )
    shard = Shard(
        "train-0.tar", "train", len(annotations), len(data), hashlib.sha256(data).hexdigest()
    )
    write_bytes(join_url(str(folder), shard.name), data)
    write_index(str(folder), ShardIndex((shard,), (), CATEGORIES))
    return str(folder)


def test_samples_are_numbered_anew_and_keep_their_files(tmp_path: Path) -> None:
    url = shards(tmp_path, [[square(0, 0, 9, id=5)], [square(0, 0, 9, id=5)]])
    data = load_detection_samples(url, read_index(url), "train", masks=True)
    assert [(s.image_id, s.source_id, s.key) for s in data.samples] == [(1, 9, "k0"), (2, 9, "k1")]
    assert [(s.height, s.width) for s in data.samples] == [(48, 64)] * 2
    assert data.samples[1].image == picture(1) and data.samples[1].decode()[0, 0, 0] == 1
    assert set(data.counts.values()) == {0.0}


def test_what_is_clipped_dropped_and_empty_is_counted(tmp_path: Path) -> None:
    outside, flat = square(0, 0, 9, bbox=[70, 5, 10, 10]), square(0, 0, 9, bbox=[5, 5, 10, 0])
    reaching, other = square(0, 0, 9, bbox=[60, 40, 20, 20]), square(0, 0, 9)
    other["segmentation"] = encode_mask(np.ones((64, 48), bool))
    crowd = square(0, 0, 9, iscrowd=1)
    url = shards(tmp_path, [[outside, flat, reaching, other, square(1, 1, 9)], [], [crowd], [flat]])
    data = load_detection_samples(url, read_index(url), "train", masks=True)
    assert data.counts == {
        "annotations_clipped": 1.0,
        "annotations_dropped": 4.0,
        "masks_of_another_size": 1.0,
        "images_without_objects": 3.0,
    }
    assert [item["bbox"] for item in data.samples[0].annotations] == [[60, 40, 4, 8], [1, 1, 9, 9]]
    assert [item["iscrowd"] for item in data.samples[2].annotations] == [1]


def test_boxes_of_bccd_are_all_inside_by_vocs_convention_even_those_of_one_pixel(
    test_data: Path,
) -> None:
    single = 0
    for item in open_source([str(test_data / "bccd")], "train").items:
        given = item.annotations or []
        clean = clean_annotations(given, 480, 640, masks=False)
        assert [one["bbox"] for one in clean.annotations] == [one["bbox"] for one in given]
        assert not clean.counts.total()
        single += sum(one["area"] == 1 for one in clean.annotations)
    assert single == 2  # in the XML they have xmin = xmax and ymin = ymax


@pytest.mark.parametrize(
    "box",
    [
        [float("nan"), 0, 5, 5],
        [0, 0, float("nan"), 5],
        [5, 5, -3, 9],
        [5, 5, 0.004, 9],
        [1e9, 0, 5, 5],
    ],
)
def test_boxes_without_area_are_dropped(box: list[float]) -> None:
    clean = clean_annotations([square(0, 0, 9, bbox=box)], 48, 64, masks=True)
    assert not clean.annotations and clean.counts["annotations_dropped"] == 1


def test_polygons_without_area_and_uncompressed_masks_of_the_wrong_length_are_dropped() -> None:
    line = square(0, 0, 9, segmentation=[[1, 1, 9, 9]])
    partly = square(0, 0, 9, segmentation=[[1, 1, 9, 9], [0, 0, 9, 0, 9, 9]])
    overlong = square(0, 0, 9, segmentation={"size": [48, 64], "counts": [0, 48 * 64 + 1]})
    empty = square(0, 0, 9, segmentation=[])
    clean = clean_annotations([line, partly, overlong, empty], 48, 64, masks=True)
    assert [item["segmentation"] for item in clean.annotations] == [[[0, 0, 9, 0, 9, 9]]]
    assert clean.counts["annotations_dropped"] == 3
    assert clean.counts["masks_of_another_size"] == 1


def test_without_masks_objects_need_none_and_lose_theirs() -> None:
    without = square(0, 0, 9)
    del without["segmentation"]
    clean = clean_annotations([without, square(1, 1, 9)], 48, 64, masks=False)
    assert [item["area"] for item in clean.annotations] == [81, 81]
    assert all("segmentation" not in item for item in clean.annotations)


def test_masks_of_data_that_has_boxes_only_are_refused(tmp_path: Path) -> None:
    without = square(0, 0, 9)
    del without["segmentation"]
    url = shards(tmp_path, [[without], [without]])
    assert len(load_detection_samples(url, read_index(url), "train", masks=False).samples) == 2
    with pytest.raises(
        ShardError, match=r"none of the 2 objects of split 'train' has a mask.* use Faster R-CNN"
    ):
        load_detection_samples(url, read_index(url), "train", masks=True)


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        (None, "k0 has no annotations; detection needs data packed from COCO or Pascal VOC"),
        (
            [square(0, 0, 9, category_id=5)],
            "k0: annotation None is of category 5, which is none of the index's 2",
        ),
        ([square(0, 0, 9, bbox=[1, 2, 3])], "k0: an annotation without a valid bbox"),
        ([square(0, 0, 9, bbox=None)], "k0: an annotation without a valid bbox"),
        ([{"category_id": 7}], r"k0: an annotation without a valid bbox .*KeyError"),
        ([square(0, 0, 9, segmentation={"counts": "0"})], r"k0: .*KeyError: 'size'"),
    ],
)
def test_malformed_annotations_are_named(
    tmp_path: Path, annotations: list[dict[str, Any]] | None, message: str
) -> None:
    url = shards(tmp_path, [annotations])
    with pytest.raises(ShardError, match=f"train-0.tar: {message}"):
        load_detection_samples(url, read_index(url), "train", masks=True)


def test_an_image_without_a_header_is_named(tmp_path: Path) -> None:
    url = shards(tmp_path, [[square(0, 0, 9)]], image=b"no image")
    with pytest.raises(ShardError, match=r"train-0.tar: k0: not an image with a valid header"):
        load_detection_samples(url, read_index(url), "train", masks=True)


def test_damaged_pixels_and_masks_are_named_when_they_are_used() -> None:
    cut = dataclasses.replace(sample(), image=picture()[:-20])
    with pytest.raises(ShardError, match=r"train-000000\.tar: k1: damaged image"):
        make_example(cut, BOXES, [3, 7], Draw(flip=False, size=48))
    odd = sample(annotations=[square(0, 0, 9, segmentation={"size": [48, 64], "counts": "é"})])
    with pytest.raises(ShardError, match=r"train-000000\.tar: k1: damaged mask"):
        make_example(odd, MASKS, [3, 7], Draw(flip=False, size=48))


def test_a_photo_held_sideways_has_the_size_it_is_seen_in(tmp_path: Path) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(buffer, "jpeg", exif=exif)
    url = shards(tmp_path, [[square(0, 0, 9)]], buffer.getvalue())
    data = load_detection_samples(url, read_index(url), "train", masks=False)
    (rotated,) = data.samples
    assert (rotated.height, rotated.width) == (64, 48) == rotated.decode().shape[1:]


def test_targets_have_corner_boxes_labels_of_sparse_ids_and_no_crowds() -> None:
    objects = [
        square(0, 0, 9, iscrowd=1),
        square(20, 10, 20, category_id=90),
        square(1, 2, 5, category_id=13),
    ]
    target = build_target(objects, 48, 64, [7, 13, 90], masks=True)
    assert target["boxes"].tolist() == [[20, 10, 40, 30], [1, 2, 6, 7]]
    assert target["labels"].tolist() == [3, 2]
    expected = torch.zeros(2, 48, 64, dtype=torch.uint8)
    expected[0, 10:30, 20:40] = 1
    expected[1, 2:7, 1:6] = 1
    assert torch.equal(target["masks"], expected)


def test_difficult_objects_are_trained_on_and_boxes_need_no_masks() -> None:
    objects = [{"category_id": 7, "bbox": [1, 2, 5, 5], "iscrowd": 0, "difficult": 1}]
    target = build_target(objects, 48, 64, [7], masks=False)
    assert target["boxes"].tolist() == [[1, 2, 6, 7]] and "masks" not in target


def test_flipping_moves_image_box_and_mask_alike() -> None:
    one = sample()
    target = build_target(one.annotations, 48, 64, [7], masks=True)
    image, flipped = flip_horizontally(one.decode(), target)
    left, top, right, bottom = flipped["boxes"][0].int().tolist()
    assert (left, top, right, bottom) == (24, 10, 44, 30)
    assert torch.equal(image[0] == 220, flipped["masks"][0].bool())
    assert (flipped["masks"][0, top:bottom, left:right] == 1).all()
    assert flipped["masks"].sum() == 400


@pytest.mark.parametrize(("shorter", "longest"), [(48, 999), (31, 999), (77, 999), (96, 90)])
def test_training_images_are_scaled_as_torchvision_scales_test_images(
    shorter: int, longest: int
) -> None:
    one = sample()
    image = one.decode().float() / 255
    target = build_target(one.annotations, 48, 64, [7], masks=True)
    transform = GeneralizedRCNNTransform(shorter, longest, [0, 0, 0], [1, 1, 1], size_divisible=1)
    images, (expected,) = transform.eval()([image], [dict(target)])
    scaled_image, scaled = scale(image, target, shorter=shorter, longest=longest)
    torch.testing.assert_close(scaled_image, images.tensors[0])
    torch.testing.assert_close(scaled["boxes"], expected["boxes"])
    assert torch.equal(scaled["masks"], expected["masks"])


def rows(batches: Any, count: int) -> list[tuple[float, tuple[int, ...], list[list[float]]]]:
    """The number of the image, its shape and its boxes for each example of `count` batches."""
    examples = []
    for _ in range(count):
        images, targets = next(batches)
        for image, target in zip(images, targets, strict=True):
            number = round(float(image[0, -1, -1]) * 255)  # the grey value of the background
            examples.append((number, tuple(image.shape), target["boxes"].tolist()))
    batches.close()
    return examples


def some_batches(start_step: int = 0, rank: int = 0, world_size: int = 1, seed: int = 3) -> Any:
    samples = [sample(number, [] if number == 5 else None) for number in range(1, 8)]
    return detection_batches(
        samples, BOXES, [7], seed=seed, start_step=start_step, rank=rank, world_size=world_size
    )


def test_every_image_with_objects_comes_once_an_epoch() -> None:
    numbers = [number for number, *_ in rows(some_batches(), 6)]
    epochs = [numbers[first : first + 6] for first in range(0, 24, 6)]
    assert all(sorted(epoch) == [1, 2, 3, 4, 6, 7] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(world_size: int) -> None:
    alone = rows(some_batches(), 3)
    shares = [rows(some_batches(rank=rank, world_size=world_size), 3) for rank in range(world_size)]
    count = 4 // world_size
    together = []
    for step in range(3):
        for share in shares:
            together += share[step * count : (step + 1) * count]
    assert together == alone


def test_batches_can_start_at_any_step() -> None:
    assert rows(some_batches(), 2) + rows(some_batches(start_step=2), 3) == rows(some_batches(), 5)
    assert rows(some_batches(), 5) != rows(some_batches(seed=4), 5)


def test_flips_and_sizes_are_drawn_for_each_slot_of_each_step() -> None:
    drawn = [draw(BOXES, seed=0, step=step, slot=slot) for step in range(100) for slot in range(10)]
    assert 450 < sum(each.flip for each in drawn) < 550
    assert {each.size for each in drawn} == {32, 48, 64}
    assert all(290 < sum(each.size == size for each in drawn) < 380 for size in (32, 48, 64))
    never = dataclasses.replace(BOXES, flip=0.0)
    assert not any(draw(never, seed=0, step=step, slot=0).flip for step in range(50))


def test_every_epoch_has_its_own_permutation() -> None:
    orders = [epoch_order(0, epoch, 9).tolist() for epoch in range(5)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({*map(tuple, orders)}) == 5


def test_batches_that_do_not_divide_or_have_no_objects_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"transfers\.global_batch_size is 4: it must be a multiple of the ranks, 3",
    ):
        next(some_batches(world_size=3))
    empty = [sample(1, []), sample(2, [square(0, 0, 9, iscrowd=1)])]
    with pytest.raises(ShardError, match="none of the 2 training images has an object"):
        next(detection_batches(empty, BOXES, [7], seed=0, start_step=0, rank=0, world_size=1))


@pytest.mark.parametrize("name", ["dsb2018", "sparse", "polygons"])
def test_masks_become_targets_within_their_boxes(coco_sets: dict[str, Path], name: str) -> None:
    source = open_source([str(coco_sets[name])], "train")
    item = source.items[0]
    (data,) = read_items([item])
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
    clean = clean_annotations(item.annotations or [], height, width, masks=True).annotations
    ids = [category["id"] for category in source.categories]
    target = build_target(clean, height, width, ids, masks=True)
    objects = sum(not annotation["iscrowd"] for annotation in clean)
    assert len(target["masks"]) == len(target["boxes"]) == objects > 0
    boxes = target["boxes"].tolist()
    for mask, (left, top, right, bottom) in zip(target["masks"], boxes, strict=True):
        y, x = torch.nonzero(mask, as_tuple=True)
        assert left - 1 <= x.min() and x.max() <= right + 1
        assert top - 1 <= y.min() and y.max() <= bottom + 1
