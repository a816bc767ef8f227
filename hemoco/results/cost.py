"""What a run took: device hours and images of its pretraining, wall time of its transfers, as far as MLflow knows.

MLflow knows when a run first began and last ended, and when each record was made; a process that was killed tells it
nothing. Active time is what the records say: the training steps that a record covers, at the rate it names, repeated
steps included, and what lies between two records besides (kNN, checkpoints, start), unless that is more than ten
minutes: then nobody was at work, or waited for machines, and only the steps count.
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
"""Seconds between two records, training apart, above which they are a pause."""


class RateRecord(NamedTuple):
    """One record of a training's throughput."""

    at_s: float
    """When it was made, in seconds since 1970."""
    step: int
    images_per_s: float


class Activity(NamedTuple):
    """What the records of a training add up to; nan where there are none."""

    active_s: float
    training_s: float
    """Of it in training steps."""
    trained_images: int
    """Those of repeated steps twice."""
    pauses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferTime:
    """How long a transfer took, from its first start to its last end, pauses included."""

    transfer: str
    wall_s: float
    """nan while it is not finished."""
    again: bool
    """Some of it was started more than once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a run took; unknown numbers are nan."""

    active_s: float
    """Of the pretraining; the module says what that is."""
    pauses: int
    """Within it, not counted."""
    device: Literal["GPU", "CPU"]
    devices: int
    """That the pretraining asked for when it first began: with fewer workers at times it took less."""
    images: int
    """Global batch times optimiser steps; repeated steps count once."""
    images_per_s: float
    """While training."""
    transfers: tuple[TransferTime, ...]

    @property
    def device_hours(self) -> float:
        """GPU hours, or CPU core hours where it was trained on CPUs."""
        return self.active_s * self.devices / 3600


def run_cost(uri: str, records: Records) -> Cost:
    """What a run took.

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
    """Adds up a training.

    Args:
        rates: in the order they were made; where the step falls back, a checkpoint was resumed.
        began_s: when the training first began.
        ended_s: when it last ended; None: it runs, or nobody said.
        every: steps between two records.
        batch: images per step.
    """
    active_s = training_s = 0.0
    images = pauses = 0
    last_s, last_step = began_s, 0
    for rate in rates:
        # the first record of a resumed training covers the steps since a multiple, as far as can be known
        steps = rate.step - last_step if rate.step > last_step else (rate.step - 1) % every + 1
        took_s = steps * batch / rate.images_per_s if rate.images_per_s > 0 else 0.0
        besides_s = max(0.0, rate.at_s - last_s - took_s)
        pauses += besides_s > PAUSE_S
        active_s += took_s + (besides_s if besides_s <= PAUSE_S else 0.0)
        training_s += took_s
        images += steps * batch
        last_s, last_step = rate.at_s, rate.step
    if not rates:
        return Activity(math.nan, math.nan, 0, 0)
    end_s = 0.0 if ended_s is None else max(0.0, ended_s - last_s)
    return Activity(
        active_s + (end_s if end_s <= PAUSE_S else 0.0),
        training_s,
        images,
        pauses + (end_s > PAUSE_S),
    )


def _cost(
    params: dict[str, str], activity: Activity, *, images: int, transfers: tuple[TransferTime, ...]
) -> Cost:
    def per(name: str, default: str) -> int:
        return int(params.get(f"pretrain.resources.{name}", default))

    gpus = per("gpus_per_worker", "0")
    return Cost(
        active_s=activity.active_s,
        pauses=activity.pauses,
        device="GPU" if gpus else "CPU",
        devices=per("workers", "1") * (gpus or per("cpus_per_worker", "1")),
        images=images,
        images_per_s=activity.trained_images / activity.training_s
        if activity.training_s > 0
        else math.nan,
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
    """None while it runs: a run that is reopened keeps the end it had before."""
    return facts.ended_s if facts.status in ("FINISHED", "FAILED", "KILLED") else None
