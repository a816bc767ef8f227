"""Detection transfer: a detector fine-tuned from a pretrained ResNet, and what it then finds.

As in `hemoco.train`, the loop is a generator that yields after each optimiser step, at which the state is a consistent
checkpoint; it runs alike in one process and on many ranks.

Shapes: N images on this rank, H x W an image.
"""

import contextlib
import dataclasses
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from hemoco import foreach
from hemoco.config import DetectionConfig, MaskRcnnConfig, flat_params
from hemoco.distributed import compute_on_all, mean_over_ranks, rank, world_size, wrap_for_gradients
from hemoco.errors import TrainingError
from hemoco.models.batch_norm import BatchNorm, synchronise_batch_norms
from hemoco.models.resnet import Backbone, seeded
from hemoco.train.state import LoggedStep, TrainingState
from hemoco.transfer.detection.data import Batch, DetectionSample, detection_batches
from hemoco.transfer.detection.detector import (
    autocast,
    build_detector,
    detection_lr,
    detection_optimizer,
    scaled_schedule,
)
from hemoco.transfer.detection.predictions import measure, predict
from hemoco.transfer.result import TransferResult

_TRAINING, _AVERAGING = 0, 1  # tell the random streams of a seed apart

Targets = list[dict[str, Tensor]]


@dataclasses.dataclass(kw_only=True)
class DetectionState(TrainingState):
    """Of a detector's training."""

    config: DetectionConfig
    model: GeneralizedRCNN
    seed: int
    """Of the new layers, the order of the samples, and the sampling of anchors and proposals."""

    @property
    def params(self) -> dict[str, str]:
        """With `transfer` for the transfer's name."""
        return flat_params({"transfer": self.config, "seed": self.seed})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device


def sorted_category_ids(categories: Iterable[dict[str, Any]]) -> list[int]:
    """Ids of COCO categories; a category's place among them, from 1, is its label in a detector."""
    return sorted(int(category["id"]) for category in categories)


def build_detection_state(
    config: DetectionConfig,
    backbone: Backbone,
    categories: Sequence[dict[str, Any]],
    device: torch.device,
    *,
    seed: int,
    data_digest: str,
) -> DetectionState:
    """The state before the first step, on every rank the same.

    Args:
        config: of the transfer.
        backbone: becomes part of the model.
        categories: COCO's.
        device: of the model.
        seed: of the training.
        data_digest: the shard index's.
    """
    with seeded(seed):
        model = build_detector(backbone, config, len(categories) + 1)
    synchronise_batch_norms(model, device)
    model.to(device=device, memory_format=torch.channels_last)
    optimizer = detection_optimizer(model, config)
    return DetectionState(
        config=config,
        model=model,
        forward=wrap_for_gradients(model),
        optimizer=optimizer,
        seed=seed,
        data_digest=data_digest,
    )


def detection_steps(
    state: DetectionState, samples: Sequence[DetectionSample], category_ids: Sequence[int]
) -> Iterator[LoggedStep]:
    """Trains to the end of the schedule, on all ranks alike, and yields after every step.

    Raises:
        ShardError: no image has an object, or one cannot be decoded.
        TrainingError: the loss is not finite; raised on all ranks before the optimiser step.
    """
    config, total = state.config, scaled_schedule(state.config).steps
    with contextlib.closing(_batches(state, samples, category_ids)) as batches:
        while state.step < total:
            values = take_step(state, *next(batches))
            logged = state.step == total or state.step % config.log_every_steps == 0
            yield LoggedStep(state.step, values if logged else {})


def take_step(state: DetectionState, images: list[Tensor], targets: Targets) -> dict[str, float]:
    """One optimiser step.

    Args:
        state: changed.
        images: this rank's, N of (3, H, W) in [0, 1].
        targets: as `build_target` makes them.

    Returns:
        Each loss, mean over the ranks; their sum `loss`; `lr`.
    """
    state.model.train()  # whoever iterates may have evaluated it
    lr = detection_lr(state.step, scaled_schedule(state.config), state.config.milestones)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with _sampling(state.seed, _TRAINING, state.step, rank(), device=state.device):
        losses = _forward(state.forward, images, targets, state)
    state.optimizer.zero_grad()
    loss = torch.stack(list(losses.values()))  # one for each part
    loss.sum().backward()  # type: ignore[no-untyped-call]
    # over the ranks: all of them must stop
    means = mean_over_ranks(loss).tolist()
    if not math.isfinite(sum(means)):
        raise TrainingError(
            f"the loss is {sum(means)} at step {state.step + 1} (lr {lr:g}): lower {_name(state.config)}.lr or add "
            f"{_name(state.config)}.warmup_steps"
        )
    state.optimizer.step()
    state.step += 1
    return {"loss": sum(means), **dict(zip(losses, means, strict=True)), "lr": lr}


@torch.no_grad()
def average_batch_norm(state: DetectionState, batches: Iterable[Batch], steps: int) -> None:
    """Replaces running statistics by their plain average over training batches with the weights as they are.

    This is detectron2's precise BN (Wu and Johnson 2021, arXiv:2105.07576, section 3): running averages lag behind the
    weights. The normalisation is over all ranks, so every rank must call it, and gets the same.

    Args:
        state: its model is changed.
        batches: of this rank, more than `steps`.
        steps: batches taken, > 0.
    """
    norms = [module for module in state.model.modules() if isinstance(module, BatchNorm)]
    statistics = [
        buffer
        for norm in norms
        for buffer in (norm.running_mean, norm.running_var)
        if buffer is not None
    ]
    sums = [torch.zeros_like(buffer) for buffer in statistics]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # so that they become those of the batch
    state.model.train()
    for place, (images, targets) in zip(range(steps), batches, strict=False):
        with _sampling(_AVERAGING, place, rank(), device=state.device):
            _forward(state.model, images, targets, state)
        foreach.add_(sums, statistics)
    for buffer, total in zip(statistics, sums, strict=True):
        buffer.copy_(total / steps)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def evaluate_detector(
    state: DetectionState,
    train: Sequence[DetectionSample],
    test: Sequence[DetectionSample],
    categories: Sequence[dict[str, Any]],
) -> TransferResult:
    """What a trained detector finds in the test images, on every rank the same; every rank must call it.

    Args:
        state: its BN statistics are replaced by averages over `config.precise_bn_steps` training batches.
        train: for those batches.
        test: to predict.
        categories: COCO's.
    """
    config, category_ids = state.config, sorted_category_ids(categories)
    if config.precise_bn_steps:
        with contextlib.closing(_batches(state, train, category_ids)) as batches:
            average_batch_norm(state, batches, config.precise_bn_steps)
    shares = compute_on_all(lambda: predict(state.model, test, category_ids, config))
    return measure(config, test, [found for share in shares for found in share], categories)


def _batches(
    state: DetectionState, samples: Sequence[DetectionSample], category_ids: Sequence[int]
) -> Generator[Batch]:
    """This rank's, from the next step on."""
    return detection_batches(
        samples,
        state.config,
        category_ids,
        seed=state.seed,
        start_step=state.step,
        rank=rank(),
        world_size=world_size(),
    )


def _name(config: DetectionConfig) -> str:
    return "mask_rcnn" if isinstance(config, MaskRcnnConfig) else "faster_rcnn"


def _forward(
    model: nn.Module, images: list[Tensor], targets: Targets, state: DetectionState
) -> dict[str, Tensor]:
    """Losses of a batch, float32 ()."""
    device = state.device
    images = [image.to(device) for image in images]
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    with autocast(state.config, device):
        losses: dict[str, Tensor] = model(images, targets)
    return losses


@contextlib.contextmanager
def _sampling(*key: int, device: torch.device) -> Iterator[None]:
    """torchvision samples anchors and proposals by the device's global generator: within, seeded by the key alone."""
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed the CUDA generators of other devices too, which are not forked here
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            torch.cuda.manual_seed(number)
        yield
