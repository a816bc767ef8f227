"""Images, networks and training of depth.py.

Shapes: N images, S optimiser steps, L layers.
"""

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import EncoderConfig
from hemoco.models.resnet import init_convolution, remove_shortcuts, seeded, use_small_stem

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
"""Numbers of blocks in the four layers, by depth."""
PLAIN_LAYERS, PLAIN_WIDTHS = 30, (24, 48)


class Images(NamedTuple):
    """Normalised (N, 3, 16, 16) and their classes (N,)."""

    pixels: Tensor
    classes: Tensor


class Schedule(NamedTuple):
    """Length, batch size and learning rate of one training."""

    epochs: int
    batch: int
    rate: float


class Trained(NamedTuple):
    """On the batch of each step (S,), before the step."""

    losses: Tensor
    errors: Tensor


class Signals(NamedTuple):
    """Root mean squares before training, (L,).

    They are of each convolution's output and of the loss's gradient there.
    """

    activations: list[float]
    gradients: list[float]


def read_images(archive: Path) -> Images:
    """Every second image of the archive."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.endswith(".jpg")][::2]
        arrays = [
            np.array(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names
        ]
    labels = [name.split("/")[1] for name in names]
    known = sorted(set(labels))
    pixels = functional.avg_pool2d(
        torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float(), 2
    )
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return Images((pixels - mean) / std, torch.tensor([known.index(label) for label in labels]))


def narrow_resnet(depth: int, seed: int, *, shortcuts: bool) -> nn.Module:
    """(N, 3, 16, 16) -> logits (N, 10), of a quarter of the usual width."""
    with seeded(seed):
        # the deep stem is replaced at once: it is the only one whose width timm lets one choose
        network = ResNet(
            *(BasicBlock, BLOCKS[depth], 10),
            stem_type="deep",
            stem_width=8,
            channels=(16, 32, 64, 128),
            zero_init_last=False,
        )
        use_small_stem(network)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                init_convolution(module, EncoderConfig())
    if not shortcuts:
        remove_shortcuts(network)
    return network


def plain_stack(config: EncoderConfig, seed: int) -> nn.Sequential:
    """(N, 3, 16, 16) -> logits (N, 10): convolutions at 8x8, from the middle on at 4x4 pixels."""
    layers: list[nn.Module] = []
    channels, half = 3, PLAIN_LAYERS // 2
    with seeded(seed):
        for number in range(PLAIN_LAYERS):
            inputs, channels = channels, PLAIN_WIDTHS[number // half]
            stride = 2 if number % half == 0 else 1
            convolution = nn.Conv2d(
                inputs, channels, 3, stride, padding=1, padding_mode="circular", bias=False
            )
            init_convolution(convolution, config)
            layers += [convolution, nn.ReLU()]
        return nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)
        )


def train(network: nn.Module, images: Images, schedule: Schedule, seed: int) -> Trained:
    """Trains from the network's present weights; the seed orders the images."""
    network = network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        network.parameters(), lr=schedule.rate, momentum=0.9, weight_decay=1e-4
    )
    batches = list(_batches(len(images.classes), schedule, seed))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    losses, errors = [], []
    for batch in batches:
        logits = network(images.pixels[batch].to(memory_format=torch.channels_last))
        loss = functional.cross_entropy(logits, images.classes[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        losses.append(loss.detach())
        errors.append((logits.argmax(1) != images.classes[batch]).float().mean())
    return Trained(torch.stack(losses), torch.stack(errors))


def measure_signals(stack: nn.Sequential, images: Images) -> Signals:
    """On 250 images, 25 of each class."""
    hidden, outputs = images.pixels[::20], []
    for layer in stack:
        hidden = layer(hidden)
        if isinstance(layer, nn.Conv2d):
            hidden.retain_grad()
            outputs.append(hidden)
    functional.cross_entropy(hidden, images.classes[::20]).backward()
    stack.zero_grad()
    return Signals([_rms(output) for output in outputs], [_rms(output.grad) for output in outputs])


def _batches(count: int, schedule: Schedule, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    full = count - count % schedule.batch
    for _ in range(schedule.epochs):
        yield from torch.randperm(count, generator=generator)[:full].view(-1, schedule.batch)


def _rms(values: Tensor) -> float:
    return float(values.detach().square().mean().sqrt())
