"""The section `augment` of step.py: hemoco's batched augmentation beside torchvision's.

torchvision's transforms work sample by sample. Both take the same crops, uint8 (3, S, S), and end
in normalised float32. torchvision's are measured on floats, which is what hemoco computes, and on
uint8 up to the normalisation, which is cheaper. The colours must come out alike.

Shapes: N images, S x S a view.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from big_sets import cifar10_archives, photo_files
from machine import table
from PIL import Image
from step_case import seconds_per_call
from step_rounds import Found, Goal, over_rounds, print_gaps, print_goals, take_turns
from torch import Tensor
from torchvision.transforms import v2

from hemoco.config import ViewsConfig
from hemoco.data.transforms import augment, crop_into, draw_augmentation, draw_crops

OURS, FLOATS, BYTES = "hemoco, batched", "torchvision v2, floats", "torchvision v2, uint8"
BLUR_PIXELS = 13  # three of the largest sigma to each side


class Source(NamedTuple):
    """A source of images, and how many of them are used at a time."""

    name: str
    size: int
    views: int
    """Number of views in one turn."""
    batch: int


SOURCES = (Source("CIFAR-10", 32, 512, 256), Source("photos", 224, 448, 64))


class Colours:
    """Mean and standard deviation per channel over all that was added."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = (
            0,
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(3).double(),
        )

    def add(self, views: Tensor) -> None:
        """Takes (N, 3, S, S)."""
        pixels = views.detach().cpu().double().transpose(0, 1).flatten(1)  # (3, N S S)
        self._count += pixels.shape[1]
        self._sum += pixels.sum(dim=1)
        self._squares += pixels.square().sum(dim=1)

    def found(self) -> Tensor:
        """Means, then standard deviations (6,)."""
        mean = self._sum / self._count
        return torch.cat([mean, (self._squares / self._count - mean.square()).sqrt()])


def measure(device: str, rounds: int, data: Path | None, *, quick: bool) -> None:
    """Prints speeds and colours for both kinds of image."""
    if data is None:
        print_gaps({"augment": "it needs images; --data names their folder"})
        return
    for source in SOURCES:
        if quick:
            source = source._replace(views=16, batch=8)
        crops = torch.stack([*_crops(source, data, rounds * source.views)]).split(source.views)
        colours = {name: Colours() for name in (OURS, FLOATS, BYTES)}
        found = _rounds(source, device, crops, colours)
        speeds = {
            name: over_rounds(found, lambda each, n=name, s=source: s.views / each[n])  # type: ignore[misc]
            for name in colours
        }
        _report(
            source,
            device,
            rounds,
            speeds,
            {name: each.found() for name, each in colours.items()},
            found,
        )


def _rounds(
    source: Source, device: str, crops: tuple[Tensor, ...], colours: dict[str, Colours]
) -> list[dict[str, float]]:
    """Seconds of each way for the crops of a round; every round has its own crops and draws."""
    config, places = ViewsConfig(size=source.size), {OURS: device, FLOATS: "cpu", BYTES: "cpu"}
    samples = {FLOATS: _torchvision(config, floats=True), BYTES: _torchvision(config, floats=False)}

    def batched(chosen: Tensor, turn: int) -> list[Tensor]:
        made = []
        for step, batch in enumerate(chosen.split(source.batch)):
            draws = draw_augmentation(
                config, seed=turn, epoch=0, step=step, slots=(0, len(batch)), view=0
            )
            made.append(augment(batch.to(device), draws, config))
        return made

    def one_by_one(chosen: Tensor, way: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [torch.stack([way(crop) for crop in batch]) for batch in chosen.split(source.batch)]

    turns = iter(range(len(crops) * len(places)))

    def seconds(name: str) -> float:
        turn, made = next(turns) // len(places), []
        chosen = crops[turn]
        if name == OURS:
            taken = seconds_per_call(lambda: made.extend(batched(chosen, turn)), 1, places[name])
        else:
            taken = seconds_per_call(
                lambda: made.extend(one_by_one(chosen, samples[name])), 1, places[name]
            )
        colours[name].add(torch.cat(made))
        return taken

    batched(crops[0], 0)
    for way in samples.values():
        one_by_one(crops[0][: source.batch], way)
    return take_turns(list(places), len(crops), seconds)


def _torchvision(config: ViewsConfig, *, floats: bool) -> Callable[[Tensor], Tensor]:
    """MoCo v2's augmentation of one crop uint8 (3, S, S)."""
    to_floats = v2.ToDtype(torch.float32, scale=True)
    changes: list[Any] = [
        v2.RandomHorizontalFlip(config.flip),
        v2.RandomApply(
            [v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue)],
            config.jitter,
        ),
        v2.RandomGrayscale(config.grayscale),
        v2.RandomApply([v2.GaussianBlur(BLUR_PIXELS, (0.1, 2.0))], config.blur[0]),
    ]
    ordered = [to_floats, *changes] if floats else [*changes, to_floats]
    made: Callable[[Tensor], Tensor] = v2.Compose([*ordered, v2.Normalize(config.mean, config.std)])
    return made


def _report(
    source: Source,
    device: str,
    rounds: int,
    speeds: dict[str, Found],
    colours: dict[str, Tensor],
    found: list[dict[str, float]],
) -> None:
    rows = []
    for name, speed in speeds.items():
        ratio = over_rounds(found, lambda each, n=name: each[n] / each[OURS])  # type: ignore[misc]
        numbers = " ".join(f"{value:6.3f}" for value in colours[name].tolist())
        rows.append((name, speed.median, ratio.median, ratio.spread(), numbers))
    where = (
        "one thread; img/CPU-s"
        if device == "cpu"
        else "hemoco on the GPU, torchvision on one CPU thread; img/s"
    )
    title = (
        f"Augmentation, {source.name} at {source.size} pixels, "
        f"{rounds * source.views} views each, {where}"
    )
    print(
        table(
            title,
            ("way", "img/s", "ours / this", "range", "means, then stds of RGB, normalised"),
            rows,
        )
    )
    apart = float((colours[OURS] - colours[FLOATS]).abs().max())
    print_goals(
        f"Augmentation, {source.name}: goals",
        [
            Goal(
                "largest difference of a mean or std",
                Found(apart, apart, apart),
                0.05,
                at_least=False,
            )
        ],
    )


def _crops(source: Source, data: Path, count: int) -> Iterator[Tensor]:
    """Random resized crops, uint8 (3, S, S), of all images in turn, then of the same anew."""
    images, config = list(_images(source, data, count)), ViewsConfig(size=source.size)
    for made in range(count):
        row = made % len(images)
        draws = draw_crops(config, seed=1, epoch=0, step=made // len(images), slots=(row, row + 1))
        crop = torch.empty((1, source.size, source.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        crop_into(crop, images[row], draws, 0)
        yield crop[0].contiguous()


def _images(source: Source, data: Path, count: int) -> Iterator[Tensor]:
    """At most as many images uint8 (3, H, W)."""
    if source.name == "CIFAR-10":
        with zipfile.ZipFile(cifar10_archives(data, "test")[0]) as archive:
            names = [name for name in archive.namelist() if name.endswith(".jpg")]
            # spread over the classes, which follow one another
            for name in names[:: max(1, len(names) // count)][:count]:
                yield _decoded(archive.read(name))
    else:
        for path in photo_files(data)[:count]:
            yield _decoded(path.read_bytes())


def _decoded(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
