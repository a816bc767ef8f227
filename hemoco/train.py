"""The training loop as a generator: one yield per optimiser step, at which the state is a consistent checkpoint.

Whoever iterates logs, evaluates and checkpoints; the loop does not know. It runs alike in one process, under torchrun
and in Ray's workers.

Shapes: N images on this rank, G on all ranks, C embedding size.
"""

import dataclasses
import hashlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hemoco.config import PretrainConfig
from hemoco.data.counts import BAD_REASONS, ReadCounts, sum_counts
from hemoco.data.loader import StreamPosition
from hemoco.data.stream import Batch
from hemoco.diagnostics import COLLAPSED_STD, contrast_values, gradient_norm
from hemoco.distributed import all_gather_cat, mean_over_ranks, rank, sum_over_ranks, wrap_for_gradients
from hemoco.errors import CheckpointError, TrainingError
from hemoco.moco import MoCo, MoCoOutput, build_method
from hemoco.optim import build_optimizer, learning_rate

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainState:
    """Everything that the next step depends on."""

    config: PretrainConfig
    model: MoCo
    forward: nn.Module
    """The model, or its DistributedDataParallel wrapper, which averages gradients over the ranks."""
    optimizer: torch.optim.SGD
    data_digest: str
    """Of the shard index trained on."""
    step: int = 0
    """Optimiser steps done."""
    position: StreamPosition | None = None
    """Of the last batch consumed; None before the first."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, as `torch.load(weights_only=True)` accepts them; tensors are not copied."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "position": tuple(self.position) if self.position else None,
            "data_digest": self.data_digest,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: it was trained on other shards.
        """
        if saved["data_digest"] != self.data_digest:
            raise CheckpointError(
                f"the training was begun on shards with digest {saved['data_digest']}, these have {self.data_digest}: "
                "give the old shards or start anew with --fresh"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]
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
            **{f"bad_samples/{reason.replace(' ', '_')}": reasons[reason] for reason in BAD_REASONS},
        }


def build_state(config: PretrainConfig, device: torch.device, *, data_digest: str) -> TrainState:
    """The state before the first step, on every rank the same; the digest is the shard index's."""
    model = build_method(config).to(device)
    optimizer = build_optimizer(model.query_encoder, config.optimizer)
    forward = wrap_for_gradients(model, device)
    return TrainState(config=config, model=model, forward=forward, optimizer=optimizer, data_digest=data_digest)


def train_steps(
    state: TrainState, batches: Iterable[Batch], config: PretrainConfig, steps_per_epoch: int
) -> Iterator[StepMetrics]:
    """Trains on the batches, one optimiser step each, and yields after every step.

    Values are measured every `config.log_every_steps` steps and at the last step of the last epoch.

    Raises:
        TrainingError: the loss is not finite; raised before the optimiser step.
    """
    throughput = Throughput()
    began = time.perf_counter()
    for batch in batches:
        lr = learning_rate(config.optimizer, step=state.step, steps_per_epoch=steps_per_epoch, epochs=config.epochs)
        output = _optimise(state, batch, lr)
        state.step += 1
        state.position = batch.position
        done = state.step == config.epochs * steps_per_epoch
        logged = done or state.step % config.log_every_steps == 0
        values = _measure(state, output) | {"lr": lr} if logged else {}
        throughput.steps += 1
        throughput.total_s += time.perf_counter() - began
        throughput.reading = sum_counts([throughput.reading, batch.reading])
        if logged:
            values |= _reduced(throughput.rates(config.global_batch_size), mean_over_ranks, output.loss.device)
            values |= _reduced(throughput.amounts(), sum_over_ranks, output.loss.device)
            values["batch_fingerprint"] = batch_fingerprint(batch.keys, output.loss.device)
            _warn_of_collapse(values["embedding_std"], batch.position.epoch, state.step)
            throughput = Throughput()
        yield StepMetrics(step=state.step, epoch=batch.position.epoch, position=batch.position, values=values)
        began = time.perf_counter()


def batch_fingerprint(keys: list[str], device: torch.device) -> float:
    """A number that two runs share at a step if, and in all likelihood only if, their global batches were the same.

    It depends on which sample is in which slot, not on the world size, and is a whole number below 2^52, so that MLflow
    keeps it exactly.

    Args:
        keys: of this rank's samples (N,); N is the same on every rank.
        device: for the collective.
    """
    first = rank() * len(keys)
    named = (f"{slot} {key}".encode("utf-8", "surrogateescape") for slot, key in enumerate(keys, first))
    total = sum(int.from_bytes(hashlib.blake2b(name, digest_size=5).digest()) for name in named)
    return float(sum_over_ranks(torch.tensor(total, device=device)).item() % 2**52)


def _optimise(state: TrainState, batch: Batch, lr: float) -> MoCoOutput:
    """One step: EMA, forward, backward, optimiser step, enqueue."""
    state.model.train()  # whoever iterates may have evaluated it
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.model.update_key_encoder(state.model.config.momentum)
    output: MoCoOutput = state.forward(batch.query_views, batch.key_views, state.step)
    state.optimizer.zero_grad()
    output.loss.backward()  # type: ignore[no-untyped-call]
    loss = output.loss.item()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is {loss} at step {state.step + 1} (lr {lr:g}): lower pretrain.optimizer.lr or add "
            "pretrain.optimizer.warmup_epochs; the last checkpoint is from before"
        )
    state.optimizer.step()
    state.model.enqueue(all_gather_cat(output.keys))  # (G, C)
    return output


def _measure(state: TrainState, output: MoCoOutput) -> dict[str, float]:
    values: dict[str, Tensor] = {"loss": output.loss.detach()}
    values |= contrast_values(output.logits, output.queries, state.model.config.temperature)
    values["gradient_norm"] = gradient_norm(state.model.query_encoder.parameters())
    return _reduced(values, mean_over_ranks, output.loss.device)


def _reduced(
    values: Mapping[str, Tensor | float], reduce: Callable[[Tensor], Tensor], device: torch.device
) -> dict[str, float]:
    """Values reduced over the ranks; one collective and one wait for the device for all of them."""
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    return dict(zip(values, reduce(stacked).tolist(), strict=True))


def _warn_of_collapse(embedding_std: float, epoch: int, step: int) -> None:
    # in the first epoch the embeddings of an untrained encoder are nearly alike too
    if epoch > 0 and embedding_std < COLLAPSED_STD:
        logger.warning("event=collapse step=%d embedding_std=%.3f expected=1", step, embedding_std)
