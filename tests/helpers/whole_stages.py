"""Stages run to the end, as the verbs run them with a progress bar."""

from collections.abc import Generator, Sequence
from typing import TypeVar

from hemoco.storage.objects import absolute_url
from pipeline.shards.pack import Packed, pack_steps
from pipeline.workers.tasks import Progress

ResultT = TypeVar("ResultT")


def finish(steps: Generator[Progress, None, ResultT]) -> ResultT:
    """Returns the result of a stage."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: ResultT = done.value
            return result


def pack(
    sources: Sequence[str],
    dest: str,
    *,
    split: str,
    samples_per_shard: int,
    seed: int,
    overwrite: bool = False,
) -> Packed:
    """Packs sources into shards at a URL or path."""
    return finish(
        pack_steps(
            sources,
            absolute_url(dest),
            split=split,
            samples_per_shard=samples_per_shard,
            seed=seed,
            overwrite=overwrite,
        )
    )
