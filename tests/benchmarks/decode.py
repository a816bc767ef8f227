"""Speed of decoding and cropping; takes a minute.

    uv run python tests/benchmarks/decode.py --data DIR

Speeds are in images per CPU-second of one thread, from the bytes of a JPEG in memory. The ways
take turns, round by round, so that a busy machine slows all of them; each figure is the median of
the rounds. The limit is simplejpeg, which decodes and does no more: the share of it that a way
reaches is what its checks, crops and copies leave. The usual path, Pillow decoding twice for two
views, is the other yardstick; it ends in the same uint8 tensor (2, 3, S, S), cropped, resized and
mirrored.

Photos are scaled to at most 500 pixels and saved with quality 90, as ImageNet's are; views of 224.
The small images are CIFAR's, 32 x 32; views of 32. There the calls count, not the pixels.
"""

import argparse
import functools
import io
import random
import statistics
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from big_sets import add_data_option, cifar10_archives, photo_files
from machine import describe_machine, table
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import Compose, PILToTensor, RandomHorizontalFlip, RandomResizedCrop

from hemoco.config import ViewsConfig
from hemoco.data.decode import decode_image
from hemoco.data.transforms import CropDraws, crop_into, draw_crops

SMALL_IMAGES, ROUNDS = 1000, 9
USUAL = "two views, Pillow twice"

Way = Callable[[bytes, int], object]
"""Takes a JPEG and its row in the draws."""


def photos(data: Path) -> Iterator[bytes]:
    """JPEGs of at most 500 pixels."""
    for path in photo_files(data):
        with Image.open(path) as photo:
            small, buffer = photo.convert("RGB"), io.BytesIO()
        small.thumbnail((500, 500), Image.Resampling.LANCZOS)
        small.save(buffer, "jpeg", quality=90)
        yield buffer.getvalue()


def small_images(data: Path) -> Iterator[bytes]:
    """CIFAR's JPEGs."""
    with zipfile.ZipFile(cifar10_archives(data, "test")[0]) as archive:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][:SMALL_IMAGES]:
            yield archive.read(name)


def by_pillow(data: bytes) -> Image.Image:
    """Decodes as torchvision's image folders do."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def by_torchvision(data: bytes) -> Tensor:
    """Decodes to uint8 (3, H, W) in one call."""
    return decode_jpeg(torch.from_numpy(np.frombuffer(data, np.uint8).copy()), ImageReadMode.RGB)


def crops(count: int, image: Tensor, draws: CropDraws, row: int, size: int) -> Tensor:
    """One view or two, uint8 (count, 3, S, S).

    They are made as the stream makes them and mirrored as the training device mirrors them.
    """
    made = torch.empty((count, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    crop_into(made, image, draws, row)
    for view in made:
        if random.random() < 0.5:
            view.copy_(view.flip(-1))
    return made


def ways(size: int, draws: CropDraws) -> dict[str, Way]:
    """Every way of making views of a size, by name."""
    crop = RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True)
    usual = Compose([crop, RandomHorizontalFlip(), PILToTensor()])
    floats = Compose([crop, RandomHorizontalFlip()])
    return {
        "decode, simplejpeg (the limit)": lambda data, row: simplejpeg.decode_jpeg(data),
        "decode, hemoco": lambda data, row: decode_image(data),
        "decode, torchvision": lambda data, row: by_torchvision(data),
        "decode, Pillow": lambda data, row: by_pillow(data),
        "one view, hemoco": lambda data, row: crops(1, decode_image(data), draws, row, size),
        "one view, torchvision in floats": lambda data, row: floats(by_torchvision(data) / 255),
        "one view, Pillow": lambda data, row: usual(by_pillow(data)),
        "two views, hemoco": lambda data, row: crops(2, decode_image(data), draws, row, size),
        "two views, torchvision once, in floats": lambda data, row: _twice(
            floats, by_torchvision(data) / 255
        ),
        "two views, Pillow once": lambda data, row: _twice(usual, by_pillow(data)),
        USUAL: lambda data, row: torch.stack([usual(by_pillow(data)) for _ in range(2)]),
        "two views, Pillow twice, crops only": lambda data, row: [
            crop(by_pillow(data)) for _ in range(2)
        ],
    }


def measure(way: Way, images: list[bytes]) -> float:
    """Images per CPU-second."""
    begun = time.process_time()
    for row, data in enumerate(images):
        way(data, row)
    return len(images) / (time.process_time() - begun)


def report(title: str, images: list[bytes], size: int) -> str:
    """A table of all ways on some images."""
    found = ways(
        size, draw_crops(ViewsConfig(size=size), seed=0, epoch=0, step=0, slots=(0, len(images)))
    )
    turns = [[measure(way, images) for way in found.values()] for _ in range(ROUNDS)]
    speeds = dict(zip(found, map(statistics.median, zip(*turns, strict=True)), strict=True))
    limit, usual = next(iter(speeds.values())), speeds[USUAL]
    rows = [(name, speed, speed / limit, speed / usual) for name, speed in speeds.items()]
    kilobytes = sum(map(len, images)) / len(images) / 1e3
    title = f"{title}: {len(images)} of {kilobytes:.1f} KB on average, views of {size}"
    return table(title, ("way", "images / CPU-s", "/ limit", "/ Pillow twice"), rows)


def _twice(transform: Callable[..., Tensor], image: object) -> Tensor:
    return torch.stack([transform(image), transform(image)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_option(parser)
    folder = parser.parse_args().data
    torch.set_num_threads(1)
    torch.manual_seed(0)
    describe = functools.partial(
        describe_machine, ("torch", "torchvision", "pillow", "simplejpeg", "numpy")
    )
    print(describe(f"one thread, medians of {ROUNDS} rounds in which all ways take turns"))
    print(report("Photos", list(photos(folder)), 224))
    print(report("Small images", list(small_images(folder)), 32))
    print(describe("at the end"))
