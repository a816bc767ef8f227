"""The pretraining loop of MoCo v1, v2 and v3: a generator that yields after every optimiser step.

One step is Algorithm 1 of arXiv:1911.05722 (v1; v2, arXiv:2003.04297, has the same) or of
arXiv:2104.02057 (v3). What differs between the methods is in `hemoco.models.moco` and
`hemoco.models.moco_v3`; this module calls them, in this order:

1. set the learning rate, and move the key encoder towards the query encoder;
2. augment the two crops of each image, on the device, to a query view and a key view;
3. embed the keys without gradient and the queries with it, and compute the InfoNCE loss;
4. backward; with several ranks, gradients are averaged;
5. optimiser step, then enqueue the keys (v1, v2).

**Why a generator.** Logging, evaluation and checkpoints are statements in the caller's `for` loop
(`pipeline/pretrain.py`), where a Trainer class would have hooks. At a yield the state is complete:
`TrainState`, with the position of the batch just consumed, is all that the next step depends on.
2k steps are therefore the same, bit for bit, as k steps, save, load, k steps
(`test_saved_and_loaded_training_goes_on_bit_for_bit`). The same generator runs in one process,
under torchrun and in Ray's workers.

**Why crops travel between ranks.** Shuffling BN embeds the keys of a rank's images on other ranks.
The official code gathers all key views as float32 on every GPU, 154 MB for 256 images of 224
pixels. Here each crop is sent once, as uint8 and before augmentation, to the rank that embeds it.

**Why draws belong to slots.** The random numbers of an augmentation depend on seed, epoch, step and
the image's place in the global batch, its slot, but not on the rank. Two ranks thus train as one
process does (`test_two_ranks_train_as_one_process_does`).

**Why every step waits for the device.** A loss or gradient that is not finite must stop all ranks
before the optimiser step, otherwise a checkpoint of useless weights could become the newest one.
The check is one collective and one transfer of two numbers.

Shapes: N images on this rank, n of them in one forward pass (n = N without gradient accumulation),
G on all ranks, C embedding size, S x S a view.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hemoco.config import MoCoConfig, PretrainConfig, flat_params
from hemoco.data.stream.bad_samples import BAD_REASONS, ReadCounts, sum_counts
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.data.transforms import augment, draw_augmentation
from hemoco.distributed import (
    mean_over_ranks,
    rank,
    sum_over_ranks,
    without_reduction,
    wrap_for_gradients,
)
from hemoco.errors import TrainingError, memory_errors
from hemoco.models.build import Method, build_method, trained_parameters
from hemoco.models.diagnostics import COLLAPSED_STD, contrast_values, gradient_norm
from hemoco.models.moco import MoCoOutput
from hemoco.models.shuffle import permute_global
from hemoco.train.optim import build_optimizer, key_momentum, learning_rate
from hemoco.train.state import TrainingState

logger = logging.getLogger(__name__)

_LESS_MEMORY = (
    "take more workers (pretrain.resources.workers) or machines with more memory, and run the same "
    "command again: it resumes from the last checkpoint; a new run can also use a higher "
    "pretrain.accumulation_steps"
)


@dataclasses.dataclass(kw_only=True)
class TrainState(TrainingState):
    """State of a pretraining run: what every training has, and what the next step needs beside."""

    config: PretrainConfig
    model: Method
    scaler: torch.amp.GradScaler
    """Scales the loss in float16; disabled, hence without effect, in other precisions."""
    position: StreamPosition | None = None
    """Position of the last batch consumed; None before the first."""

    @property
    def params(self) -> dict[str, str]:
        """Settings as flat dotted names, as on the command line."""
        return flat_params({"pretrain": self.config})

    def state_dict(self) -> dict[str, Any]:
        """State of every training, with scaler and position."""
        position = tuple(self.position) if self.position else None
        return super().state_dict() | {"scaler": self.scaler.state_dict(), "position": position}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            CheckpointError: the saved training was on other shards.
        """
        super().load_state_dict(saved)
        self.scaler.load_state_dict(saved["scaler"])
        self.position = StreamPosition(*saved["position"]) if saved["position"] else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Result of one optimiser step."""

    step: int
    """Optimiser steps done, this one included."""
    epoch: int
    """Epoch of the batch, from 0."""
    position: StreamPosition
    """Position of the batch in the stream."""
    values: dict[str, float]
    """Metrics by their names in MLflow, equal on all ranks; empty at steps that are not logged."""


class Views(NamedTuple):
    """Augmented and normalised views, float32 (N, 3, S, S) each."""

    queries: Tensor
    """Query views of this rank's images."""
    keys: Tensor
    """Key views that this rank embeds; with a shuffled order they are of other images."""


@dataclasses.dataclass
class Throughput:
    """Time and reads of this rank since the last logged step.

    The time that the caller spends between two steps, for example on an evaluation, is left out.
    """

    steps: int = 0
    """Optimiser steps."""
    total_s: float = 0.0
    """Seconds of these steps, waiting for batches included."""
    reading: ReadCounts = dataclasses.field(default_factory=ReadCounts)
    """Reads from storage and cache."""

    def rates(self, global_batch_size: int) -> dict[str, float]:
        """Images per second of all ranks, and the share of time spent waiting for data.

        To be averaged over the ranks.
        """
        images_per_s = self.steps * global_batch_size / self.total_s
        return {"images_per_s": images_per_s, "data_wait": self.reading.wait_s / self.total_s}

    def amounts(self) -> dict[str, float]:
        """Amounts read and bad samples; to be added up over the ranks."""
        reading = self.reading
        values = {
            "read_bytes_per_s": reading.bytes / self.total_s,
            "read_requests": reading.requests,
            "read_retries": reading.retries,
            "cache_hits": reading.cache_hits,
            "cache_misses": reading.cache_misses,
            "bad_samples": len(reading.bad),
        }
        counts = Counter(bad.reason for bad in reading.bad)
        # all reasons, also those with a count of 0: every rank must reduce the same values
        for reason in BAD_REASONS:
            values[f"bad_samples/{reason.replace(' ', '_')}"] = counts[reason]
        return values


def build_state(config: PretrainConfig, device: torch.device, *, data_digest: str) -> TrainState:
    """The state before the first step, the same on every rank.

    Args:
        config: settings of the pretraining.
        device: device that trains.
        data_digest: digest of the shard index; a checkpoint of other shards is refused.
    """
    model = build_method(config, device)
    return TrainState(
        config=config,
        model=model,
        forward=wrap_for_gradients(model),
        optimizer=build_optimizer(trained_parameters(model), config.optimizer),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "float16"),
        data_digest=data_digest,
    )


def train_steps(
    state: TrainState, batches: Iterable[Batch], steps_per_epoch: int
) -> Iterator[StepMetrics]:
    """Trains on the batches, one optimiser step each, and yields after every step.

    Metrics are measured every `log_every_steps` steps and at the last step of the last epoch.

    Args:
        state: changed in place; complete at every yield. Its step decides learning rate, momentum
            and shuffling, so the first batch must be the one after `state.position`.
        batches: this rank's parts of the global batches; the generator ends with them.
        steps_per_epoch: steps that the stream gives in one epoch.

    Raises:
        TrainingError: loss or gradients are not finite, or memory ran out; raised before the
            optimiser step.
    """
    config = state.config
    total_steps = config.epochs * steps_per_epoch
    throughput = Throughput()
    started = time.perf_counter()
    for batch in batches:
        epoch = batch.position.epoch
        lr = learning_rate(
            config.optimizer, step=state.step, steps_per_epoch=steps_per_epoch, epochs=config.epochs
        )
        momentum = key_momentum(config.moco, step=state.step, total_steps=total_steps)
        with memory_errors(lambda: f"step {state.step + 1}", _LESS_MEMORY):
            outputs = _optimise(state, batch, lr, momentum)
        state.step += 1
        state.position = batch.position
        logged = state.step == total_steps or state.step % config.log_every_steps == 0
        values: dict[str, float] = {}
        if logged:
            values = _measure(state, outputs)
            values["lr"] = lr
            values["key_momentum"] = momentum
        # after _measure, which waits until the device has finished the step
        throughput.steps += 1
        throughput.total_s += time.perf_counter() - started
        throughput.reading = sum_counts([throughput.reading, batch.reading])
        if logged:
            device = batch.crops.device
            values |= _reduced(throughput.rates(config.global_batch_size), mean_over_ranks, device)
            values |= _reduced(throughput.amounts(), sum_over_ranks, device)
            values["batch_fingerprint"] = batch_fingerprint(batch.keys, device)
            _warn_of_collapse(values["embedding_std"], epoch, state.step)
            throughput = Throughput()
        yield StepMetrics(step=state.step, epoch=epoch, position=batch.position, values=values)
        started = time.perf_counter()


def make_views(batch: Batch, config: PretrainConfig, *, order: Tensor | None) -> Views:
    """The query views of this rank's images, and the key views that this rank embeds.

    The crop of a key is sent as uint8, once, to the rank that embeds it, and is augmented there
    with the draws of its own slot.

    Args:
        batch: this rank's N images of the step.
        config: gives the settings of the views and the seed.
        order: order (G,) of the key views in the global batch, on the CPU; None: that of the
            images.
    """
    count = len(batch.crops)
    query_crops, key_crops = batch.crops.unbind(1)  # (N, 3, S, S) each
    query_slots = np.arange(rank() * count, (rank() + 1) * count)  # (N,)
    key_slots = query_slots
    if order is not None:
        key_crops = permute_global(key_crops, order)
        key_slots = order.numpy()[query_slots]
    # drawn for all G slots, as the keys of this rank may be of any of them
    epoch, step = batch.position
    draw = functools.partial(
        draw_augmentation,
        config.views,
        seed=config.seed,
        epoch=epoch,
        step=step,
        slots=(0, config.global_batch_size),
    )
    query_draws = draw(view=0).take(query_slots)
    key_draws = draw(view=1).take(key_slots)
    return Views(
        queries=augment(query_crops, query_draws, config.views),
        keys=augment(key_crops, key_draws, config.views),
    )


def batch_fingerprint(keys: list[str], device: torch.device) -> float:
    """A number that is equal for two global batches if (in all likelihood: only if) they are equal.

    It is a sum of hashes of slot and sample, hence independent of the world size. It is a whole
    number below 2^52, which a float64, as MLflow stores it, holds exactly.

    Args:
        keys: keys of this rank's N samples, in order; N is the same on every rank.
        device: for the collective.
    """
    total = 0
    first_slot = rank() * len(keys)
    for slot, key in enumerate(keys, first_slot):
        # keys are file names, which need not be valid UTF-8
        name = f"{slot} {key}".encode("utf-8", "surrogateescape")
        total += int.from_bytes(hashlib.blake2b(name, digest_size=5).digest())
    return float(sum_over_ranks(torch.tensor(total, device=device)).item() % 2**52)


def _optimise(state: TrainState, batch: Batch, lr: float, momentum: float) -> list[MoCoOutput]:
    """One optimiser step on a batch; the outputs are those of its parts."""
    model = state.model
    parts = state.config.accumulation_steps
    model.train()  # the caller may have switched it to evaluation mode
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    model.update_key_encoder(momentum)
    order = model.key_order(state.step, state.config.global_batch_size)
    views = make_views(batch, state.config, order=order)
    # keys of the whole batch at once, also with accumulation: they are shuffled over all of it
    keys = model.embed_keys(views.queries, views.keys, order)  # (N, C), v3: (N, 2, C)
    inputs = [keys, views.queries]
    if model.symmetric:
        inputs.append(views.keys)
    chunks = [tensor.chunk(parts) for tensor in inputs]  # (n, ...) each
    state.optimizer.zero_grad()
    outputs: list[MoCoOutput] = []
    for part, part_inputs in enumerate(zip(*chunks, strict=True)):
        # gradients of all parts are summed locally and averaged over the ranks once, in the last
        # backward; one all-reduce for each part would give the same, at `parts` times the traffic
        last = part == parts - 1
        with contextlib.nullcontext() if last else without_reduction(state.forward):
            output: MoCoOutput = state.forward(*part_inputs)
            loss = output.contrast.loss / parts
            state.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        outputs.append(output)
    _check_finite(state, outputs, lr)
    # in float16, gradients that overflow make the scaler skip the step and halve its scale;
    # schedules, moving average and queue go on
    state.scaler.unscale_(state.optimizer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    model.finish_step(keys)
    return outputs


def _check_finite(state: TrainState, outputs: list[MoCoOutput], lr: float) -> None:
    """Raises TrainingError on all ranks if loss or gradients of any rank are not finite."""
    losses = torch.stack([output.contrast.loss.detach() for output in outputs])  # (parts,)
    loss = losses.mean()
    norm = torch.zeros_like(loss)
    if not state.scaler.is_enabled():  # in float16 an overflow is no error: the scaler handles it
        norm = gradient_norm(trained_parameters(state.model))
    # NaN and infinity survive the mean over the ranks, so that all ranks raise
    values = _reduced({"loss": loss, "gradients' norm": norm}, mean_over_ranks, loss.device)
    for name, value in values.items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} at step {state.step + 1} (lr {lr:g}): "
                "lower pretrain.optimizer.lr or add pretrain.optimizer.warmup_epochs"
            )


def _measure(state: TrainState, outputs: list[MoCoOutput]) -> dict[str, float]:
    """Diagnostics of a step: means over the parts of the batch and over the ranks."""
    parts = [contrast_values(output.contrast, output.queries, output.keys) for output in outputs]
    values = {}
    for name in parts[0]:
        values[name] = torch.stack([part[name] for part in parts]).mean()
    # after the optimiser step, hence without the scale of float16
    values["gradient_norm"] = gradient_norm(trained_parameters(state.model))
    if state.scaler.is_enabled():
        values["loss_scale"] = torch.tensor(state.scaler.get_scale())
    if isinstance(state.config.moco, MoCoConfig):
        # steps since the oldest keys of the queue were embedded
        turn = state.config.moco.queue_length // state.config.global_batch_size
        values["queue_age"] = torch.tensor(float(min(state.step, turn)))
    return _reduced(values, mean_over_ranks, outputs[0].queries.device)


def _reduced(
    values: Mapping[str, Tensor | float], reduce: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """Scalars reduced over the ranks, in one collective and one transfer from the device."""
    scalars = [
        torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()
    ]
    reduced = reduce(torch.stack(scalars)).tolist()
    return dict(zip(values, reduced, strict=True))


def _warn_of_collapse(embedding_std: float, epoch: int, step: int) -> None:
    # not in the first epoch: the embeddings of an untrained encoder are nearly equal too
    if epoch > 0 and embedding_std < COLLAPSED_STD:
        logger.warning(
            "event=collapse step=%d embedding_std=%.3f expected=1 "
            "advice='lower pretrain.optimizer.lr, or raise pretrain.moco.momentum'",
            step,
            embedding_std,
        )
