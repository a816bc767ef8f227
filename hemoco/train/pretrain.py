"""The training loop as a generator: one yield per optimiser step, at which the state is a consistent checkpoint.

Whoever iterates logs, evaluates and checkpoints; the loop does not know. It runs alike in one process, under torchrun
and in Ray's workers.

Shapes: N images on this rank, G on all ranks, C embedding size.
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
    "take more workers (pretrain.resources.workers) or machines with more memory: the same words go on from the last "
    "checkpoint; a new run can also do with a higher pretrain.accumulation_steps"
)


@dataclasses.dataclass(kw_only=True)
class TrainState(TrainingState):
    """Of a pretraining."""

    config: PretrainConfig
    model: Method
    scaler: torch.amp.GradScaler
    """Of the loss in float16; in other precisions it changes nothing."""
    position: StreamPosition | None = None
    """Of the last batch consumed; None before the first."""

    @property
    def params(self) -> dict[str, str]:
        """By the names one types."""
        return flat_params({"pretrain": self.config})

    def state_dict(self) -> dict[str, Any]:
        """As of every training, with scaler and position."""
        position = tuple(self.position) if self.position else None
        return super().state_dict() | {"scaler": self.scaler.state_dict(), "position": position}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: it was trained on other shards.
        """
        super().load_state_dict(saved)
        self.scaler.load_state_dict(saved["scaler"])
        self.position = StreamPosition(*saved["position"]) if saved["position"] else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimiser step."""

    step: int
    """Optimiser steps done, this one included."""
    epoch: int
    """Epoch of the batch, from 0."""
    position: StreamPosition
    values: dict[str, float]
    """By MLflow name, equal on all ranks; empty between the steps that are logged."""


class Views(NamedTuple):
    """Augmented and normalised, float32 (N, 3, S, S) each."""

    queries: Tensor
    keys: Tensor


@dataclasses.dataclass
class Throughput:
    """What happened on this rank since the last record; seconds without those of whoever iterates."""

    steps: int = 0
    total_s: float = 0.0
    reading: ReadCounts = dataclasses.field(default_factory=ReadCounts)

    def rates(self, global_batch_size: int) -> dict[str, float]:
        """Images per second and the share of time spent waiting for data."""
        rate = self.steps * global_batch_size / self.total_s
        return {"images_per_s": rate, "data_wait": self.reading.wait_s / self.total_s}

    def amounts(self) -> dict[str, float]:
        """What was read; over all ranks it adds up."""
        reading = self.reading
        reasons = Counter(bad.reason for bad in reading.bad)
        return {
            "read_bytes_per_s": reading.bytes / self.total_s,
            "read_requests": reading.requests,
            "read_retries": reading.retries,
            "cache_hits": reading.cache_hits,
            "cache_misses": reading.cache_misses,
            "bad_samples": len(reading.bad),
            **{
                f"bad_samples/{reason.replace(' ', '_')}": reasons[reason] for reason in BAD_REASONS
            },
        }


def build_state(config: PretrainConfig, device: torch.device, *, data_digest: str) -> TrainState:
    """The state before the first step, on every rank the same; the digest is the shard index's."""
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

    Values are measured every `log_every_steps` steps and at the last step of the last epoch.

    Raises:
        TrainingError: loss or gradients are not finite, or memory ran out; raised before the optimiser step.
    """
    config, throughput = state.config, Throughput()
    total_steps = config.epochs * steps_per_epoch
    began = time.perf_counter()
    for batch in batches:
        lr = learning_rate(
            config.optimizer, step=state.step, steps_per_epoch=steps_per_epoch, epochs=config.epochs
        )
        momentum = key_momentum(config.moco, step=state.step, total_steps=total_steps)
        with memory_errors(lambda: f"step {state.step + 1}", _LESS_MEMORY):
            outputs = _optimise(state, batch, lr, momentum)
        state.step += 1
        state.position = batch.position
        logged = state.step == total_steps or state.step % config.log_every_steps == 0
        values = _measure(state, outputs) | {"lr": lr, "key_momentum": momentum} if logged else {}
        throughput.steps += 1
        throughput.total_s += time.perf_counter() - began
        throughput.reading = sum_counts([throughput.reading, batch.reading])
        if logged:
            device = batch.crops.device
            values |= _reduced(throughput.rates(config.global_batch_size), mean_over_ranks, device)
            values |= _reduced(throughput.amounts(), sum_over_ranks, device)
            values["batch_fingerprint"] = batch_fingerprint(batch.keys, device)
            _warn_of_collapse(values["embedding_std"], batch.position.epoch, state.step)
            throughput = Throughput()
        yield StepMetrics(
            step=state.step, epoch=batch.position.epoch, position=batch.position, values=values
        )
        began = time.perf_counter()


def make_views(batch: Batch, config: PretrainConfig, *, order: Tensor | None) -> Views:
    """The query views of this rank's images, and the key views that this rank embeds.

    A key's crop travels to the rank that embeds it as uint8, once, and is augmented there by the draws of its own slot.
    Gathering float32 views would bring every rank 4 x world size times the bytes.

    Args:
        batch: of N images, this rank's.
        config: of views and seed.
        order: of the key views in the global batch (G,), on the CPU; None: that of the images.
    """
    count, (epoch, step) = len(batch.crops), batch.position
    key_slots = query_slots = np.arange(rank() * count, (rank() + 1) * count)
    query_crops, key_crops = batch.crops.unbind(1)  # (N, 3, S, S)
    if order is not None:
        key_crops, key_slots = permute_global(key_crops, order), order.numpy()[query_slots]
    drawn = (0, config.global_batch_size)
    draw = functools.partial(
        draw_augmentation, config.views, seed=config.seed, epoch=epoch, step=step, slots=drawn
    )
    return Views(
        queries=augment(query_crops, draw(view=0).take(query_slots), config.views),
        keys=augment(key_crops, draw(view=1).take(key_slots), config.views),
    )


def batch_fingerprint(keys: list[str], device: torch.device) -> float:
    """A number that two runs share at a step if, and in all likelihood only if, their global batches were the same.

    It depends on which sample is in which slot, not on the world size, and is a whole number below 2^52, so that MLflow
    keeps it exactly.

    Args:
        keys: of this rank's samples (N,); N is the same on every rank.
        device: for the collective.
    """
    first = rank() * len(keys)
    named = (
        f"{slot} {key}".encode("utf-8", "surrogateescape") for slot, key in enumerate(keys, first)
    )
    total = sum(int.from_bytes(hashlib.blake2b(name, digest_size=5).digest()) for name in named)
    return float(sum_over_ranks(torch.tensor(total, device=device)).item() % 2**52)


def _optimise(state: TrainState, batch: Batch, lr: float, momentum: float) -> list[MoCoOutput]:
    """One step: EMA, forward and backward of each part of the batch, optimiser step, enqueue."""
    model, parts = state.model, state.config.accumulation_steps
    model.train()  # whoever iterates may have evaluated it
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    model.update_key_encoder(momentum)
    order = model.key_order(state.step, state.config.global_batch_size)
    views = make_views(batch, state.config, order=order)
    keys = model.embed_keys(*views, order)  # of all parts at once: shuffled over the whole batch
    as_queries = views if model.symmetric else views[:1]
    state.optimizer.zero_grad()
    outputs: list[MoCoOutput] = []
    for part, pieces in enumerate(
        zip(*(each.chunk(parts) for each in (keys, *as_queries)), strict=True)
    ):
        with without_reduction(state.forward) if part < parts - 1 else contextlib.nullcontext():
            output: MoCoOutput = state.forward(*pieces)
            state.scaler.scale(output.contrast.loss / parts).backward()  # type: ignore[no-untyped-call]
        outputs.append(output)
    _check_finite(state, outputs, lr)
    # in float16, gradients that overflowed skip the step and halve the scale; schedules and EMA go on
    state.scaler.unscale_(state.optimizer)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    model.finish_step(keys)
    return outputs


def _check_finite(state: TrainState, outputs: list[MoCoOutput], lr: float) -> None:
    """Refuses a step after which the weights could not be used: a checkpoint of them would be the newest."""
    loss = torch.stack([output.contrast.loss.detach() for output in outputs]).mean()
    norm = (
        torch.zeros_like(loss)
        if state.scaler.is_enabled()
        else gradient_norm(trained_parameters(state.model))
    )
    # over the ranks: all of them must stop
    for name, value in _reduced(
        {"loss": loss, "gradients' norm": norm}, mean_over_ranks, loss.device
    ).items():
        if not math.isfinite(value):
            raise TrainingError(
                f"the {name} is {value} at step {state.step + 1} (lr {lr:g}): lower pretrain.optimizer.lr or add "
                "pretrain.optimizer.warmup_epochs"
            )


def _measure(state: TrainState, outputs: list[MoCoOutput]) -> dict[str, float]:
    parts = [contrast_values(output.contrast, output.queries, output.keys) for output in outputs]
    values = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
    values["gradient_norm"] = gradient_norm(trained_parameters(state.model))
    if state.scaler.is_enabled():
        values["loss_scale"] = torch.tensor(state.scaler.get_scale())
    if isinstance(state.config.moco, MoCoConfig):
        age = min(state.step, state.config.moco.queue_length // state.config.global_batch_size)
        values["queue_age"] = torch.tensor(float(age))
    return _reduced(values, mean_over_ranks, outputs[0].queries.device)


def _reduced(
    values: Mapping[str, Tensor | float], reduce: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """Values reduced over the ranks; one collective and one wait for the device for all of them."""
    stacked = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()]
    )
    return dict(zip(values, reduce(stacked).tolist(), strict=True))


def _warn_of_collapse(embedding_std: float, epoch: int, step: int) -> None:
    # in the first epoch the embeddings of an untrained encoder are nearly alike too
    if epoch > 0 and embedding_std < COLLAPSED_STD:
        logger.warning(
            "event=collapse step=%d embedding_std=%.3f expected=1 "
            "advice='lower pretrain.optimizer.lr, or raise pretrain.moco.momentum'",
            *(step, embedding_std),
        )
