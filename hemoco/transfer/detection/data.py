"""Images with their objects from shards, and the batches a detector is trained on.

Images stay encoded until they are used. What a step sees is a pure function of the seed and the step: the same global
batch on any number of processes and after any resume.

Shapes: H x W an image, D its objects.
"""

import dataclasses
import functools
import io
import itertools
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Sequence
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

_BATCHES_AHEAD = 2  # decoded while a step runs
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORDER, _DRAWS = 0, 1  # tell the random streams of a seed apart
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
    """COCO annotations: bbox (x, y, width, height), category_id, iscrowd, area and, where masks are wanted,
    segmentation (polygons or RLE)."""
    image_id: int
    """Place in the split, counted from 1: COCO's own ids may come twice where files were joined."""
    shard: str
    """URL of the shard it is in."""
    key: str
    """Its name there."""
    source_id: int | None
    """COCO's id of the image, if it has one; not always unique."""
    height: int
    width: int

    @property
    def has_objects(self) -> bool:
        """Whether there is something to train on; a crowd is not."""
        return any(not item["iscrowd"] for item in self.annotations)

    def decode(self) -> Tensor:
        """uint8 (3, H, W).

        Raises:
            ShardError: the image cannot be decoded.
        """
        try:
            return decode_image(self.image)
        except ShardError as error:
            raise ShardError(f"{self.shard}: {self.key}: {error}") from error


class DetectionData(NamedTuple):
    """A split and what cleaning it took."""

    samples: list[DetectionSample]
    counts: dict[str, float]
    """`annotations_clipped`: boxes that reached outside their image. `annotations_dropped`: boxes of no area inside
    it, and objects without the mask that is wanted; among them `masks_of_another_size` than their image.
    `images_without_objects`: not trained on, but evaluated."""


class Drawn(NamedTuple):
    """Random choices for one place in a batch."""

    flip: bool
    size: int
    """Shorter side, pixels."""


Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Images and targets."""


def load_detection_samples(
    data_url: str, index: ShardIndex, split: str, *, masks: bool
) -> DetectionData:
    """All images of a split with the annotations that can be used.

    Ids are given anew, by place, so it does not matter where an id comes twice. Objects that VOC calls difficult are
    kept, and trained on as by detectron2 (its pascal_voc.py: "they don't hurt accuracy"); the VOC metric ignores them.

    Args:
        data_url: URL of the shard folder.
        index: its index.
        split: name of the split.
        masks: whether objects need a mask; else those they have are left out.

    Raises:
        ShardError: an image has no annotations, no readable header, or an annotation that is none; or masks are wanted
            where there are boxes only.
    """
    known = frozenset(int(category["id"]) for category in index.categories)
    samples: list[DetectionSample] = []
    counts = Counter(dict.fromkeys(COUNTS, 0))
    objects = with_mask = 0
    for shard in index.split(split):
        where = shard_url(data_url, shard)
        for found in read_shard(data_url, shard):
            annotations = _annotations(found, where, known)
            objects += len(annotations)
            with_mask += sum(bool(item.get("segmentation")) for item in annotations)
            sample, needed = _usable(found, annotations, where, len(samples) + 1, masks=masks)
            samples.append(sample)
            counts += needed
    if masks and objects and not with_mask:
        raise ShardError(
            f"{data_url}: none of the {objects} objects of split {split!r} has a mask, only boxes, so Mask R-CNN has "
            "nothing to learn from: use Faster R-CNN (FasterRcnnConfig)"
        )
    return DetectionData(samples, {name: float(counts[name]) for name in COUNTS})


def samples_with_objects(samples: Sequence[DetectionSample]) -> list[DetectionSample]:
    """Those to train on: as in torchvision's reference and detectron2, images without objects are left out.

    Raises:
        ShardError: there are none.
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
    """Endless batches of this rank's images and targets, decoded ahead; close it to end its threads.

    The global batch of a step, and what is drawn for each place in it, depend on the seed and the step alone; a rank
    has the places from rank * N on, N of them. Every image comes once before any comes again.

    Raises:
        ConfigError: the global batch does not divide over the ranks.
        ShardError: no image has objects, or one cannot be decoded.
    """
    if config.global_batch_size % world_size:
        raise ConfigError(
            f"transfers.global_batch_size is {config.global_batch_size}: it must be a multiple of the ranks, "
            f"{world_size}"
        )
    usable = samples_with_objects(samples)
    count = config.global_batch_size // world_size
    places = range(rank * count, (rank + 1) * count)

    def example(step: int, place: int) -> Example:
        epoch, position = divmod(step * config.global_batch_size + place, len(usable))
        sample = usable[epoch_order(seed, epoch, len(usable))[position]]
        return make_example(
            sample, config, category_ids, draw(config, seed=seed, step=step, place=place)
        )

    pool = ThreadPoolExecutor(config.cpus)
    try:
        ahead = deque(
            _submit(pool, example, start_step + later, places) for later in range(_BATCHES_AHEAD)
        )
        for step in itertools.count(start_step + _BATCHES_AHEAD):
            ahead.append(_submit(pool, example, step, places))
            examples = [future.result() for future in ahead.popleft()]
            yield [image for image, _ in examples], [target for _, target in examples]
    finally:
        pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=4)  # two epochs of a batch, and those of one decoded ahead
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order (count,) of the images in an epoch."""
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(count)


def draw(config: DetectionConfig, *, seed: int, step: int, place: int) -> Drawn:
    """The random choices for a place in the global batch of a step."""
    rng = np.random.default_rng([seed, _DRAWS, step, place])
    return Drawn(flip=rng.random() < config.flip, size=int(rng.choice(config.train_sizes)))


def make_example(
    sample: DetectionSample, config: DetectionConfig, category_ids: Sequence[int], drawn: Drawn
) -> Example:
    """A sample decoded, scaled and perhaps mirrored, with its target.

    Raises:
        ShardError: the image or a mask cannot be decoded.
    """
    image, masks = sample.decode().float() / 255, isinstance(config, MaskRcnnConfig)
    try:
        target = build_target(
            sample.annotations, sample.height, sample.width, category_ids, masks=masks
        )
    except (ValueError, RuntimeError) as error:  # what decoders say of a damaged RLE
        raise ShardError(
            f"{sample.shard}: {sample.key}: damaged mask ({error}); correct it and pack the data again"
        ) from error
    image, target = scale(image, target, shorter=drawn.size, longest=config.max_size)
    return flip_horizontally(image, target) if drawn.flip else (image, target)


def _annotations(found: Sample, where: str, known: frozenset[int]) -> list[dict[str, Any]]:
    """A sample's annotations, all of known categories."""
    if found.annotations is None:
        raise ShardError(
            f"{where}: {found.key} has no annotations; detection needs data packed from COCO or Pascal VOC"
        )
    for item in found.annotations:
        if item.get("category_id") not in known:
            raise ShardError(
                f"{where}: {found.key}: annotation {item.get('id')} is of category {item.get('category_id')}, which is "
                f"none of the index's {len(known)}; correct it and pack the data again"
            )
    return found.annotations


def _usable(
    found: Sample, annotations: list[dict[str, Any]], shard: str, image_id: int, *, masks: bool
) -> tuple[DetectionSample, Counter[str]]:
    """A sample whose annotations are clean, and what that took."""
    height, width = _upright_size(found.image, f"{shard}: {found.key}")
    try:
        kept, counts = clean_annotations(annotations, height, width, masks=masks)
    except (KeyError, TypeError, ValueError) as error:
        raise ShardError(
            f"{shard}: {found.key}: an annotation without a sound bbox or segmentation "
            f"({type(error).__name__}: {error}); correct it and pack the data again"
        ) from error
    sample = DetectionSample(
        image=found.image,
        annotations=kept,
        image_id=image_id,
        shard=shard,
        key=found.key,
        source_id=found.image_id,
        height=height,
        width=width,
    )
    counts["images_without_objects"] = int(not sample.has_objects)
    return sample, counts


def _upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Height and width that `decode_image` will find, from the header alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        try:
            with Image.open(io.BytesIO(data)) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
                return (image.width, image.height) if turned else (image.height, image.width)
        except Exception as error:  # decoders meet damage with nearly any exception
            raise ShardError(
                f"{where}: not an image with a sound header ({error}); remove or replace it"
            ) from error


def _submit(
    pool: ThreadPoolExecutor,
    example: Callable[[int, int], Example],
    step: int,
    places: Iterable[int],
) -> list[Future[Example]]:
    return [pool.submit(example, step, place) for place in places]
