"""Detection samples from shards, and the batches that a detector is trained on.

Images stay encoded in memory until they are used. The global batch of a step is a pure function of
the seed and the step: it is the same for any number of ranks and after any resume.

Shapes: N images of a batch on this rank, H x W pixels of an image.
"""

import dataclasses
import functools
import io
import itertools
import warnings
from collections import Counter, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from hemoco.config import DetectionConfig, MaskRcnnConfig
from hemoco.data.decode import decode_image
from hemoco.data.shards.index import ShardIndex, read_shard, shard_url
from hemoco.data.shards.tar import Sample
from hemoco.errors import ConfigError, ShardError
from hemoco.transfer.detection.annotations import clean_annotations
from hemoco.transfer.detection.targets import Example, build_target, flip_horizontally, scale

_BATCHES_AHEAD = 2  # batches decoded while a step runs
_SWAPS_SIDES = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORDER_STREAM, _DRAW_STREAM = 0, 1  # independent random streams of one seed
COUNTS = (
    "annotations_clipped",
    "annotations_dropped",
    "masks_of_another_size",
    "images_without_objects",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DetectionSample:
    """An image and its objects."""

    image: bytes
    """The encoded file."""
    annotations: list[dict[str, Any]]
    """COCO annotations: bbox (x, y, width, height), category_id, iscrowd, area and, if the split
    was loaded with masks, segmentation (polygons or RLE)."""
    image_id: int
    """Index in the split, from 1. COCO's own ids may repeat where data sets were joined."""
    shard: str
    """URL of the sample's shard."""
    key: str
    """Key of the sample in its shard."""
    source_id: int | None
    """COCO's id of the image, if it has one; not always unique."""
    height: int
    width: int

    @property
    def has_objects(self) -> bool:
        """True if there is an object to train on; crowds do not count."""
        return any(not item["iscrowd"] for item in self.annotations)

    def decode(self) -> Tensor:
        """Decodes the image: uint8 (3, H, W).

        Raises:
            ShardError: the image cannot be decoded.
        """
        try:
            return decode_image(self.image)
        except ShardError as error:
            raise ShardError(f"{self.shard}: {self.key}: {error}") from error


class DetectionData(NamedTuple):
    """The samples of a split, with counts of what was corrected."""

    samples: list[DetectionSample]
    counts: dict[str, float]
    """Counts by the names in `COUNTS`.

    `annotations_clipped`: boxes that reached outside their image. `annotations_dropped`: boxes
    without area inside the image, and objects without a usable mask where masks are required.
    `masks_of_another_size`: masks that do not have the size of their image; their objects are
    dropped. `images_without_objects`: images that are evaluated but not trained on."""


class Draw(NamedTuple):
    """The random choices for one slot of a global batch."""

    flip: bool
    size: int
    """Shorter side in pixels."""


Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""N images and their targets."""


def load_detection_samples(
    data_url: str, index: ShardIndex, split: str, *, masks: bool
) -> DetectionData:
    """Loads all images of a split with their usable annotations.

    Images are numbered anew, so repeated COCO ids do no harm. Objects that VOC marks as difficult
    stay and are trained on, as in detectron2 (pascal_voc.py: "they don't hurt accuracy"); the VOC
    metric ignores them.

    Args:
        data_url: URL of the shard folder.
        index: index of that folder.
        split: name of the split.
        masks: require a mask of each object; if False, masks are removed.

    Raises:
        ShardError: an image has no annotations, a malformed annotation or no readable header; or
            masks are required and no object has one.
    """
    category_ids = frozenset(int(category["id"]) for category in index.categories)
    samples: list[DetectionSample] = []
    counts = Counter(dict.fromkeys(COUNTS, 0))
    objects = objects_with_mask = 0
    for shard in index.split(split):
        url = shard_url(data_url, shard)
        for packed in read_shard(data_url, shard):
            annotations = _annotations(packed, url, category_ids)
            objects += len(annotations)
            objects_with_mask += sum(bool(item.get("segmentation")) for item in annotations)
            sample, corrections = _clean_sample(
                packed, annotations, url, image_id=len(samples) + 1, masks=masks
            )
            samples.append(sample)
            counts += corrections
    if masks and objects and not objects_with_mask:
        raise ShardError(
            f"{data_url}: none of the {objects} objects of split {split!r} has a mask, only boxes, "
            "so Mask R-CNN has nothing to learn from: use Faster R-CNN (FasterRcnnConfig)"
        )
    return DetectionData(samples, {name: float(counts[name]) for name in COUNTS})


def samples_with_objects(samples: Sequence[DetectionSample]) -> list[DetectionSample]:
    """The samples to train on.

    Images without objects are left out, as in torchvision's reference training and detectron2.

    Raises:
        ShardError: no sample has an object.
    """
    usable = [sample for sample in samples if sample.has_objects]
    if not usable:
        raise ShardError(
            f"none of the {len(samples)} training images has an object; a detector needs some"
        )
    return usable


def detection_batches(
    samples: Sequence[DetectionSample],
    config: DetectionConfig,
    category_ids: Sequence[int],
    *,
    seed: int,
    start_step: int,
    rank: int,
    world_size: int,
) -> Generator[Batch, None, None]:
    """Yields this rank's batches endlessly, decoded ahead in threads; close it to end the threads.

    The global batch of a step and the random choices for its slots depend on the seed and the step
    only. A rank has the N slots from rank * N on. An epoch contains every image once.

    Args:
        samples: samples of the training split.
        config: batch size, image sizes, flip probability and number of threads (`cpus`).
        category_ids: ids of all categories, in order.
        seed: seed of the order and of the random choices.
        start_step: step of the first batch.
        rank: index of this process.
        world_size: number of processes.

    Raises:
        ConfigError: the global batch size is not a multiple of the world size.
        ShardError: no image has objects, or one cannot be decoded.
    """
    if config.global_batch_size % world_size:
        raise ConfigError(
            f"transfers.global_batch_size is {config.global_batch_size}: it must be a multiple of "
            f"the ranks, {world_size}"
        )
    usable = samples_with_objects(samples)
    count = config.global_batch_size // world_size
    slots = range(rank * count, (rank + 1) * count)

    def example(step: int, slot: int) -> Example:
        epoch, index = divmod(step * config.global_batch_size + slot, len(usable))
        sample = usable[epoch_order(seed, epoch, len(usable))[index]]
        drawn = draw(config, seed=seed, step=step, slot=slot)
        return make_example(sample, config, category_ids, drawn)

    pool = ThreadPoolExecutor(config.cpus)
    pending: deque[list[Future[Example]]] = deque()
    try:
        for step in itertools.count(start_step):
            pending.append([pool.submit(example, step, slot) for slot in slots])
            if len(pending) > _BATCHES_AHEAD:
                examples = [future.result() for future in pending.popleft()]
                yield [image for image, _ in examples], [target for _, target in examples]
    finally:
        pool.shutdown(cancel_futures=True)


# The size is 4 since a global batch may span two epochs, and so may one that is decoded ahead.
@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of the images in an epoch: a permutation (count,)."""
    return np.random.default_rng([seed, _ORDER_STREAM, epoch]).permutation(count)


def draw(config: DetectionConfig, *, seed: int, step: int, slot: int) -> Draw:
    """Draws the random choices for a slot in the global batch of a step."""
    rng = np.random.default_rng([seed, _DRAW_STREAM, step, slot])
    return Draw(flip=rng.random() < config.flip, size=int(rng.choice(config.train_sizes)))


def make_example(
    sample: DetectionSample, config: DetectionConfig, category_ids: Sequence[int], drawn: Draw
) -> Example:
    """Decodes a sample, builds its target, and scales and mirrors both as drawn.

    Raises:
        ShardError: the image or a mask cannot be decoded.
    """
    image = sample.decode().float() / 255
    masks = isinstance(config, MaskRcnnConfig)
    try:
        target = build_target(
            sample.annotations, sample.height, sample.width, category_ids, masks=masks
        )
    except (ValueError, RuntimeError) as error:  # raised by the decoder of a damaged RLE
        raise ShardError(
            f"{sample.shard}: {sample.key}: damaged mask ({error}); correct it and pack the data "
            "again"
        ) from error
    image, target = scale(image, target, shorter=drawn.size, longest=config.max_size)
    return flip_horizontally(image, target) if drawn.flip else (image, target)


def _annotations(packed: Sample, url: str, category_ids: frozenset[int]) -> list[dict[str, Any]]:
    """The annotations of a sample in the shard at `url`, after checking their categories."""
    if packed.annotations is None:
        raise ShardError(
            f"{url}: {packed.key} has no annotations; detection needs data packed from COCO or "
            "Pascal VOC"
        )
    for item in packed.annotations:
        category_id = item.get("category_id")
        if category_id not in category_ids:
            raise ShardError(
                f"{url}: {packed.key}: annotation {item.get('id')} is of category {category_id}, "
                f"which is none of the index's {len(category_ids)}; correct it and pack the data "
                "again"
            )
    return packed.annotations


def _clean_sample(
    packed: Sample, annotations: list[dict[str, Any]], url: str, *, image_id: int, masks: bool
) -> tuple[DetectionSample, Counter[str]]:
    """A sample with clean annotations, and the counts of corrections."""
    height, width = _upright_size(packed.image, f"{url}: {packed.key}")
    try:
        clean, counts = clean_annotations(annotations, height, width, masks=masks)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{url}: {packed.key}: an annotation without a valid bbox or segmentation "
            f"({type(error).__name__}: {error}); correct it and pack the data again"
        ) from error
    sample = DetectionSample(
        image=packed.image,
        annotations=clean,
        image_id=image_id,
        shard=url,
        key=packed.key,
        source_id=packed.image_id,
        height=height,
        width=width,
    )
    counts["images_without_objects"] = int(not sample.has_objects)
    return sample, counts


def _upright_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width of the image as `decode_image` returns it, read from the header only."""
    with warnings.catch_warnings():
        # Pillow warns of odd but harmless metadata, and in tests a warning is an error.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                # `decode_image` applies the EXIF orientation
                swapped = image.getexif().get(ExifTags.Base.Orientation) in _SWAPS_SIDES
                return (image.width, image.height) if swapped else (image.height, image.width)
        except Exception as error:  # Pillow raises almost any exception on a damaged file
            raise ShardError(
                f"{name}: not an image with a valid header ({error}); remove or replace it"
            ) from error
