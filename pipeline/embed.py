"""Embedding: the features of a data set by one backbone as Parquet files, in parallel on Ray.

A file appears whole or not at all, and says what its features follow from: the same call goes on with the shards whose
files are not there, and one with another backbone, data or transform is refused.
"""

import logging
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise

import torch

from hemoco.config import ResourcesConfig
from hemoco.data.shards.index import Shard
from hemoco.data.stream.bad_samples import BadSample, BadSampleFile
from hemoco.errors import ShardError
from hemoco.features.embed import EmbeddedShard, embed_shards
from hemoco.features.parquet import BAD_SAMPLES_NAME, file_name
from hemoco.features.plan import EmbedPlan, finished_files
from hemoco.storage.objects import check_writable, join_url
from pipeline.workers.capacity import possible_workers
from pipeline.workers.tasks import Finding, Progress, count_reasons, run_tasks

logger = logging.getLogger(__name__)

_TASKS_PER_PLACE = (
    8  # so that places end at about the same time, and yet a backbone is loaded seldom
)
_ALWAYS_ALLOWED = 10  # bad samples


@dataclass(frozen=True)
class Embedded:
    """What came of an embedding."""

    images: int
    """In the files of all chosen shards."""
    files: int
    computed: int
    """Of the images those that this call computed."""
    seconds: float
    """That it took to compute them, the start of processes included."""
    bad: tuple[Finding, ...]
    """Samples that were left out; each is listed in the file BAD_SAMPLES_NAME of the folder."""


def embed_steps(
    plan: EmbedPlan, shards: Sequence[Shard], *, cpus: int, gpus: int, max_bad_share: float
) -> Generator[Progress, None, Embedded]:
    """Writes the files of some shards; yields before the first and whenever some are done, returns the result.

    Args:
        plan: of the data set.
        shards: those of its index that are wanted.
        cpus: cores of each Ray task, which decode, and without a GPU compute.
        gpus: 0 or 1 of each Ray task.
        max_bad_share: bad samples allowed as a share of those read; the first ten are always allowed.

    Raises:
        UsageError: other features are at the plan's `dest`.
        ShardError: a shard is missing or another than was packed, too many samples are bad, or all of them.
        StorageError: a shard cannot be read, or `dest` cannot be written.
        CheckpointError: the backbone was replaced meanwhile.
        TrainingError: features are not finite.
    """
    check_writable(plan.dest)
    finished = finished_files(plan)
    known = [file for shard in shards if (file := finished.get(file_name(shard.name))) is not None]
    done = [EmbeddedShard(file.images, file.bad) for file in known]
    waiting = [shard for shard in shards if file_name(shard.name) not in finished]
    places = _places(cpus, gpus)
    groups = _groups(waiting, places * _TASKS_PER_PLACE)
    _check_share(done, max_bad_share)
    yield Progress(len(done), len(shards))
    began = time.monotonic()
    with closing(
        run_tasks(
            _embed_group, ((plan, group, cpus, gpus) for group in groups), cpus=cpus, gpus=gpus
        )
    ) as results:
        for some in results:
            done += some
            _check_share(done, max_bad_share)
            yield Progress(len(done), len(shards))
    seconds = time.monotonic() - began
    images, computed = (sum(one.images for one in part) for part in (done, done[len(known) :]))
    bad = sorted(bad for one in done for bad in one.bad)
    _list_bad(plan, bad)
    if bad and not images:
        raise ShardError(
            f"none of the {len(bad)} samples can be used, the first is {_described(bad[0])}; repack them"
        )
    reasons = count_reasons((f"{one.key} in {one.shard}", one.reason) for one in bad)
    return Embedded(images, len(done), computed, seconds, tuple(reasons))


def _embed_group(
    plan: EmbedPlan, shards: Sequence[Shard], cpus: int, gpus: int
) -> list[EmbeddedShard]:
    """Runs on a Ray worker."""
    torch.set_num_threads(cpus)
    return list(
        embed_shards(plan, shards, device=torch.device("cuda" if gpus else "cpu"), threads=cpus)
    )


def _places(cpus: int, gpus: int) -> int:
    """Tasks that the cluster can run at once, at least 1."""
    places = possible_workers(ResourcesConfig(cpus_per_worker=cpus, gpus_per_worker=gpus))
    if not places:
        logger.warning(
            "no node has %d CPUs and %d GPUs for a task: waiting for one; or set --cpus, --gpus",
            cpus,
            gpus,
        )
    return max(places, 1)


def _groups(shards: Sequence[Shard], count: int) -> list[Sequence[Shard]]:
    """Shards that lie together, in so many parts at most, none of them empty."""
    count = min(count, len(shards))
    cuts = [number * len(shards) // count for number in range(count + 1)] if count else []
    return [shards[first:last] for first, last in pairwise(cuts)]


def _check_share(done: Sequence[EmbeddedShard], max_bad_share: float) -> None:
    bad = [bad for one in done for bad in one.bad]
    read = sum(one.images for one in done) + len(bad)
    if len(bad) > max(_ALWAYS_ALLOWED, max_bad_share * read):
        raise ShardError(
            f"{len(bad)} of {read} samples are bad, the last is {_described(bad[-1])}; repack them, or allow more with "
            "--max_bad_share"
        )


def _described(bad: BadSample) -> str:
    return f"{bad.key} in {bad.shard}: {bad.reason}"


def _list_bad(plan: EmbedPlan, bad: Sequence[BadSample]) -> None:
    listed = BadSampleFile(join_url(plan.dest, BAD_SAMPLES_NAME))
    listed.add(bad)
    listed.write()
