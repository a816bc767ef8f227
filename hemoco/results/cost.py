"""Cost of a run: device hours and images of its pretraining, wall time of its transfers.

All of it is computed from MLflow, which has the times of a run's first start and last end, and of
each logged record; a process that was killed logs no end. The active time of a pretraining is
therefore summed over its records. Each contributes the training steps that it covers, at the rate
it gives, with repeated steps counted again, plus the remaining time since the record before (kNN,
checkpoints, start-up). A remainder of more than ten minutes is a pause, in which the training was
stopped or waited for machines; then only the steps count.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from hemoco.results.records import Records
from hemoco.tracking.client import ask
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag

PAUSE_S = 600.0
"""Seconds between two records, minus the training steps, above which they count as a pause."""


class RateRecord(NamedTuple):
    """One record of a training's throughput."""

    at_s: float
    """Time of the record, in seconds since 1970."""
    step: int
    images_per_s: float


class Activity(NamedTuple):
    """Sums over the records of a training; nan if there are none."""

    active_s: float
    training_s: float
    """The part of `active_s` spent in training steps."""
    trained_images: int
    """Images in those steps; repeated steps count each time."""
    pauses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferTime:
    """Wall time of a transfer, from its first start to its last end, pauses included."""

    transfer: str
    wall_s: float
    """nan unless the transfer is finished."""
    again: bool
    """True if a unit of it was started more than once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a run; unknown numbers are nan."""

    active_s: float
    """Active time of the pretraining, as the module defines it."""
    pauses: int
    """Number of pauses of the pretraining, which are not part of `active_s`."""
    device: Literal["GPU", "CPU"]
    devices: int
    """Devices that the pretraining requested at its first start. It may have run with fewer at
    times, so the device hours are an upper bound."""
    images: int
    """Global batch size times optimiser steps; repeated steps count once."""
    images_per_s: float
    """Throughput of the training steps."""
    transfers: tuple[TransferTime, ...]

    @property
    def device_hours(self) -> float:
        """GPU hours, or CPU core hours where it was trained on CPUs."""
        return self.active_s * self.devices / 3600


def run_cost(uri: str, records: Records) -> Cost:
    """Computes the cost of a run.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    facts = records.pretraining
    transfers = tuple(_transfer_time(run) for run in records.transfers)
    if facts is None or "pretrain.global_batch_size" not in facts.params:
        nothing = Activity(math.nan, math.nan, 0, 0)
        return _cost({}, nothing, images=0, transfers=transfers)
    points = ask(uri, lambda client: client.get_metric_history(facts.run_id, "images_per_s"))
    rates = sorted(RateRecord(point.timestamp / 1000, point.step, point.value) for point in points)
    batch = int(facts.params["pretrain.global_batch_size"])
    activity = measure_activity(
        rates,
        began_s=facts.started_s,
        ended_s=_ended_s(facts),
        every=int(facts.params["pretrain.log_every_steps"]),
        batch=batch,
    )
    return _cost(
        facts.params,
        activity,
        images=max((rate.step for rate in rates), default=0) * batch,
        transfers=transfers,
    )


def measure_activity(
    rates: Sequence[RateRecord], *, began_s: float, ended_s: float | None, every: int, batch: int
) -> Activity:
    """Sums active time, training time, images and pauses over the records of a training.

    Args:
        rates: records in the order they were made; a step lower than the one before marks a
            resumed checkpoint.
        began_s: time of the training's first start.
        ended_s: time of its last end; None if it is running or its end was not recorded.
        every: steps between two records.
        batch: images per step.
    """
    active_s = training_s = 0.0
    images = pauses = 0
    last_s, last_step = began_s, 0
    for rate in rates:
        # A training that was resumed does not record from which step. Its first record is then
        # taken to cover the steps since the last multiple of `every`.
        resumed = rate.step <= last_step
        steps = (rate.step - 1) % every + 1 if resumed else rate.step - last_step
        steps_s = steps * batch / rate.images_per_s if rate.images_per_s > 0 else 0.0
        active_s += steps_s
        training_s += steps_s
        images += steps * batch
        other_s = max(0.0, rate.at_s - last_s - steps_s)
        if other_s > PAUSE_S:
            pauses += 1
        else:
            active_s += other_s
        last_s, last_step = rate.at_s, rate.step
    if not rates:
        return Activity(math.nan, math.nan, 0, 0)
    if ended_s is not None:
        end_s = max(0.0, ended_s - last_s)
        if end_s > PAUSE_S:
            pauses += 1
        else:
            active_s += end_s
    return Activity(active_s, training_s, images, pauses)


def _cost(
    params: dict[str, str], activity: Activity, *, images: int, transfers: tuple[TransferTime, ...]
) -> Cost:
    def resource(name: str, default: str) -> int:
        return int(params.get(f"pretrain.resources.{name}", default))

    gpus = resource("gpus_per_worker", "0")
    images_per_s = math.nan
    if activity.training_s > 0:
        images_per_s = activity.trained_images / activity.training_s
    return Cost(
        active_s=activity.active_s,
        pauses=activity.pauses,
        device="GPU" if gpus else "CPU",
        devices=resource("workers", "1") * (gpus or resource("cpus_per_worker", "1")),
        images=images,
        images_per_s=images_per_s,
        transfers=transfers,
    )


def _transfer_time(facts: RunFacts) -> TransferTime:
    ended_s = facts.ended_s if facts.status == "FINISHED" else None
    attempts = [value for tag, value in facts.tags.items() if tag.startswith(Tag.ATTEMPT_PREFIX)]
    return TransferTime(
        transfer=facts.tags[Tag.TRANSFER],
        wall_s=math.nan if ended_s is None else ended_s - facts.started_s,
        again=any(int(value) > 1 for value in attempts),
    )


def _ended_s(facts: RunFacts) -> float | None:
    # MLflow keeps the last end of a run that was reopened, so it holds only for a run that is over.
    return facts.ended_s if facts.status in ("FINISHED", "FAILED", "KILLED") else None
