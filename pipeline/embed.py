"""Embedding: a data set's features by one backbone, as Parquet files, computed in parallel on Ray.

There is one file for each shard. It is written completely or not at all, and records the backbone,
data and transform of its features. The same call again computes only the missing files; a call
with another backbone, data or transform is refused.
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

_TASKS_PER_SLOT = 8
"""Tasks for each slot of the cluster. With more, all slots end at about the same time; with fewer,
the backbone is loaded less often."""
_ALWAYS_ALLOWED = 10
"""Bad samples that are allowed whatever their share."""


@dataclass(frozen=True)
class Embedded:
    """Result of an embedding."""

    images: int
    """Images in the files of all chosen shards."""
    files: int
    computed: int
    """Images among them that this call computed."""
    seconds: float
    """Time it took to compute them, including the start of processes."""
    bad: tuple[Finding, ...]
    """Samples that were left out; the file BAD_SAMPLES_NAME of the folder lists each."""


def embed_steps(
    plan: EmbedPlan, shards: Sequence[Shard], *, cpus: int, gpus: int, max_bad_share: float
) -> Generator[Progress, None, Embedded]:
    """Writes the feature files of some shards.

    Yields the progress before the first file and whenever some are written; returns the result.

    Args:
        plan: plan of the data set's embedding.
        shards: the chosen shards of its index.
        cpus: cores of each Ray task. They decode images and, without a GPU, compute features.
        gpus: GPUs of each Ray task, 0 or 1.
        max_bad_share: largest share of bad samples among those read; ten are always allowed.

    Raises:
        UsageError: the plan's `dest` has other features.
        ShardError: a shard is missing or was replaced, or too many or all samples are bad.
        StorageError: a shard cannot be read, or `dest` cannot be written.
        CheckpointError: the backbone was replaced during the embedding.
        TrainingError: features are not finite.
    """
    check_writable(plan.dest)
    finished = finished_files(plan)
    done: list[EmbeddedShard] = []
    waiting: list[Shard] = []
    for shard in shards:
        file = finished.get(file_name(shard.name))
        if file is None:
            waiting.append(shard)
        else:
            done.append(EmbeddedShard(file.images, file.bad))
    images_before = sum(shard.images for shard in done)
    groups = _groups(waiting, _cluster_slots(cpus, gpus) * _TASKS_PER_SLOT)
    _check_bad_share(done, max_bad_share)
    yield Progress(len(done), len(shards))
    began = time.monotonic()
    arguments = ((plan, group, cpus, gpus) for group in groups)
    with closing(run_tasks(_embed_group, arguments, cpus=cpus, gpus=gpus)) as results:
        for group_result in results:
            done += group_result
            _check_bad_share(done, max_bad_share)
            yield Progress(len(done), len(shards))
    seconds = time.monotonic() - began
    images = sum(shard.images for shard in done)
    bad = sorted(sample for shard in done for sample in shard.bad)
    _list_bad_samples(plan, bad)
    if bad and not images:
        raise ShardError(
            f"none of the {len(bad)} samples can be used, the first is {_described(bad[0])}; "
            "repack them"
        )
    reasons = count_reasons((f"{sample.key} in {sample.shard}", sample.reason) for sample in bad)
    return Embedded(images, len(done), images - images_before, seconds, tuple(reasons))


def _embed_group(
    plan: EmbedPlan, shards: Sequence[Shard], cpus: int, gpus: int
) -> list[EmbeddedShard]:
    """Embeds the shards of one task; runs on a Ray worker."""
    torch.set_num_threads(cpus)
    device = torch.device("cuda" if gpus else "cpu")
    return list(embed_shards(plan, shards, device=device, threads=cpus))


def _cluster_slots(cpus: int, gpus: int) -> int:
    """Returns how many tasks the cluster can run at once, at least 1."""
    slots = possible_workers(ResourcesConfig(cpus_per_worker=cpus, gpus_per_worker=gpus))
    if not slots:
        logger.warning(
            "no node has %d CPUs and %d GPUs for a task: waiting for one; or set --cpus, --gpus",
            cpus,
            gpus,
        )
    return max(slots, 1)


def _groups(shards: Sequence[Shard], count: int) -> list[Sequence[Shard]]:
    """Splits shards into at most `count` groups of consecutive ones, none of them empty."""
    count = min(count, len(shards))
    cuts = [group * len(shards) // count for group in range(count + 1)] if count else []
    return [shards[first:last] for first, last in pairwise(cuts)]


def _check_bad_share(done: Sequence[EmbeddedShard], max_bad_share: float) -> None:
    bad = [sample for shard in done for sample in shard.bad]
    read = sum(shard.images for shard in done) + len(bad)
    if len(bad) > max(_ALWAYS_ALLOWED, max_bad_share * read):
        raise ShardError(
            f"{len(bad)} of {read} samples are bad, the last is {_described(bad[-1])}; "
            "repack them, or allow more with --max_bad_share"
        )


def _described(bad: BadSample) -> str:
    return f"{bad.key} in {bad.shard}: {bad.reason}"


def _list_bad_samples(plan: EmbedPlan, bad: Sequence[BadSample]) -> None:
    file = BadSampleFile(join_url(plan.dest, BAD_SAMPLES_NAME))
    file.add(bad)
    file.write()
