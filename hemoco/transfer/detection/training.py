"""Training and evaluation of a detector, fine-tuned from a backbone.

As in `hemoco.train`, the loop is a generator that yields after each optimiser step. At a yield the
state is a consistent checkpoint. The same loop runs in one process and on many ranks.

Shapes: N images on this rank, H x W pixels of an image.
"""

import contextlib
import dataclasses
import itertools
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

_TRAINING, _AVERAGING = 0, 1  # keys of independent random streams

Targets = list[dict[str, Tensor]]
"""The targets of N images, as `build_target` returns them."""


@dataclasses.dataclass(kw_only=True)
class DetectionState(TrainingState):
    """State of a detector's training."""

    config: DetectionConfig
    model: GeneralizedRCNN
    seed: int
    """Seed of the new layers, the sample order, and the sampling of anchors and proposals."""

    @property
    def params(self) -> dict[str, str]:
        """Settings as flat dotted names, all below `transfer`, and the seed."""
        return flat_params({"transfer": self.config, "seed": self.seed})

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = next(self.model.parameters()).device
        return device


def sorted_category_ids(categories: Iterable[dict[str, Any]]) -> list[int]:
    """Ids of COCO categories in ascending order; label i of a detector, from 1, is the i-th."""
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
    """Builds the state before the first step, the same on every rank.

    Args:
        config: settings of the transfer.
        backbone: becomes part of the model and is modified.
        categories: COCO categories.
        device: device of the model.
        seed: seed of the training.
        data_digest: digest of the shard index.
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
    """Trains to the end of the schedule and yields after every step; every rank must run it.

    Raises:
        ShardError: no image has an object, or one cannot be decoded.
        TrainingError: the loss is not finite; raised on all ranks before the optimiser step.
    """
    total = scaled_schedule(state.config).steps
    with contextlib.closing(_batches(state, samples, category_ids)) as batches:
        while state.step < total:
            images, targets = next(batches)
            values = take_step(state, images, targets)
            logged = state.step == total or state.step % state.config.log_every_steps == 0
            yield LoggedStep(state.step, values if logged else {})


def take_step(state: DetectionState, images: list[Tensor], targets: Targets) -> dict[str, float]:
    """Runs one optimiser step.

    Args:
        state: changed.
        images: N images (3, H, W) in [0, 1], those of this rank.
        targets: targets returned by `build_target`.

    Returns:
        Each part of the loss, as the mean over the ranks; their sum as `loss`; and `lr`.

    Raises:
        TrainingError: the loss is not finite; raised on all ranks before the optimiser step.
    """
    state.model.train()  # the caller may have evaluated the model since the last step
    lr = detection_lr(state.step, scaled_schedule(state.config), state.config.milestones)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    with _sampling(state.seed, _TRAINING, state.step, rank(), device=state.device):
        losses = _forward(state.forward, images, targets, state)
    state.optimizer.zero_grad()
    loss = torch.stack(list(losses.values()))  # (number of parts,)
    loss.sum().backward()  # type: ignore[no-untyped-call]
    # The mean over the ranks is the same on all of them, so all raise below or none does.
    means = mean_over_ranks(loss).tolist()
    if not math.isfinite(sum(means)):
        name = "mask_rcnn" if isinstance(state.config, MaskRcnnConfig) else "faster_rcnn"
        raise TrainingError(
            f"the loss is {sum(means)} at step {state.step + 1} (lr {lr:g}): lower {name}.lr or "
            f"add {name}.warmup_steps"
        )
    state.optimizer.step()
    state.step += 1
    return {"loss": sum(means), **dict(zip(losses, means, strict=True)), "lr": lr}


@torch.no_grad()
def average_batch_norm(state: DetectionState, batches: Iterable[Batch], steps: int) -> None:
    """Replaces the BN running statistics with their mean over training batches.

    This is detectron2's precise BN (Wu and Johnson 2021, arXiv:2105.07576, section 3). The running
    averages of training lag behind the weights; here the weights stay fixed. BN statistics are
    taken over all ranks, so every rank must call this, and all get the same result.

    Args:
        state: its model is changed.
        batches: batches of this rank, at least `steps`.
        steps: number of batches to use, > 0.
    """
    norms = [module for module in state.model.modules() if isinstance(module, BatchNorm)]
    statistics: list[Tensor] = []
    for norm in norms:
        statistics += [
            buffer for buffer in (norm.running_mean, norm.running_var) if buffer is not None
        ]
    sums = [torch.zeros_like(buffer) for buffer in statistics]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # with 1, the running statistics become those of the last batch
    state.model.train()
    for step, (images, targets) in zip(range(steps), batches, strict=False):
        with _sampling(_AVERAGING, step, rank(), device=state.device):
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
    """Evaluates a trained detector; every rank must call it, and all get the same result.

    Args:
        state: its BN statistics are replaced by their mean over `config.precise_bn_steps` batches.
        train: training samples, for those batches.
        test: samples to evaluate.
        categories: COCO categories.

    Raises:
        ShardError: an image cannot be decoded; raised on all ranks.
    """
    config, category_ids = state.config, sorted_category_ids(categories)
    if config.precise_bn_steps:
        with contextlib.closing(_batches(state, train, category_ids)) as batches:
            average_batch_norm(state, batches, config.precise_bn_steps)
    by_rank = compute_on_all(lambda: predict(state.model, test, category_ids, config))
    predictions = list(itertools.chain.from_iterable(by_rank))
    return measure(config, test, predictions, categories)


def _batches(
    state: DetectionState, samples: Sequence[DetectionSample], category_ids: Sequence[int]
) -> Generator[Batch]:
    """This rank's batches from the next step on."""
    return detection_batches(
        samples,
        state.config,
        category_ids,
        seed=state.seed,
        start_step=state.step,
        rank=rank(),
        world_size=world_size(),
    )


def _forward(
    model: nn.Module, images: list[Tensor], targets: Targets, state: DetectionState
) -> dict[str, Tensor]:
    """The parts of the loss of a batch, by name, each a float32 scalar."""
    device = state.device
    images_on_device = [image.to(device) for image in images]
    targets_on_device = []
    for target in targets:
        targets_on_device.append({name: value.to(device) for name, value in target.items()})
    with autocast(state.config, device):
        losses: dict[str, Tensor] = model(images_on_device, targets_on_device)
    return losses


@contextlib.contextmanager
def _sampling(*key: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators in the block with the key, and restores them after it.

    torchvision samples anchors and proposals with the device's global generator, which is not part
    of a checkpoint. Seeded by step, a resumed training takes the same samples
    (test_a_resumed_training_goes_on_bit_for_bit).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Not torch.manual_seed: it also seeds the generators of CUDA devices not forked here.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
