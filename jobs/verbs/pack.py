"""`python -m jobs pack SOURCE [SOURCE ...] DEST`: images as shards with their index."""

from typing import Annotated

import tyro

from cluster.local.ray import local_ray
from hemoco.data.shards.index import ShardIndex
from hemoco.data.sources.folders import open_source
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, check_writable
from jobs.arguments import read_arguments
from jobs.progress import follow, printable
from pipeline.shards.index_tars import index_steps
from pipeline.shards.pack import pack_steps

_SAMPLES_PER_SHARD = 1000
_SEED = 0
_Paths = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="SOURCE [SOURCE ...] DEST", help_behavior_hint=""),
]
_Split = Annotated[str, tyro.conf.arg(metavar="NAME")]


def main(argv: list[str]) -> None:
    """Packs the images, or indexes existing tars."""
    read_arguments(pack, argv, command="pack")


def pack(
    paths: _Paths = (),
    /,
    *,
    split: _Split = "train",
    samples_per_shard: int = _SAMPLES_PER_SHARD,
    seed: int = _SEED,
    overwrite: bool = False,
    index_only: bool = False,
) -> None:
    """Writes images as WebDataset shards with their index, in parallel.

    Run the same command again to resume; what is there already is verified.

    With --index_only the tars stay where they are, and DEST receives only their index.

    Args:
        paths: SOURCE is a folder of class folders, a flat folder, a COCO or Pascal VOC folder, or a
            zip or tar archive of one of these. With --index_only it is a folder or
            s3:// URL of WebDataset tars, one tar, or a pattern such as
            s3://bucket/train-{000000..000012}.tar. DEST is the folder or s3:// URL that receives
            the shards.
        split: split of images whose folders name none, and of tars whose names name none (train,
            val, test do).
        samples_per_shard: images in a shard.
        seed: seed of the order in which images are distributed over the shards.
        overwrite: replace other shards that are at DEST; with --index_only, only their index.
        index_only: write index.json and the tables in samples/ for existing WebDataset tars; labels
            are the numbers in .cls.
    """
    if len(paths) < 2:
        raise UsageError(
            "pack needs a SOURCE and a DEST: python -m jobs pack SOURCE [SOURCE ...] DEST"
        )
    if samples_per_shard < 1:
        raise UsageError(f"--samples_per_shard is {samples_per_shard}: it must be at least 1")
    if index_only and (samples_per_shard, seed) != (_SAMPLES_PER_SHARD, _SEED):
        raise UsageError(
            "--index_only leaves the tars as they are: --samples_per_shard and --seed do not go "
            "with it"
        )
    *sources, dest = paths
    dest = absolute_url(dest)
    check_writable(dest)
    if not index_only:
        open_source(sources, split)  # raises for a wrong SOURCE before Ray starts
    with local_ray():
        if index_only:
            index_with_progress(tuple(sources), dest, split=split, overwrite=overwrite)
        else:
            pack_with_progress(
                tuple(sources),
                dest,
                split=split,
                samples_per_shard=samples_per_shard,
                seed=seed,
                overwrite=overwrite,
            )


def pack_with_progress(
    sources: tuple[str, ...],
    dest: str,
    *,
    split: str,
    samples_per_shard: int,
    seed: int,
    overwrite: bool = False,
) -> None:
    """Packs, with a progress bar if the output is a terminal, and prints the result."""
    steps = pack_steps(
        sources,
        dest,
        split=split,
        samples_per_shard=samples_per_shard,
        seed=seed,
        overwrite=overwrite,
    )
    packed = follow(steps)
    _print_index(dest, packed.index)
    for reason, count, first in packed.skipped:
        print(f"warning: {count} images left out: {reason} (first: {printable(first)})")
    if packed.duplicates:
        print(f"warning: {packed.duplicates} images of other splits are in the training split too")


def index_with_progress(
    sources: tuple[str, ...], dest: str, *, split: str, overwrite: bool
) -> None:
    """Indexes existing tars, with a progress bar as `pack_with_progress`; prints the result."""
    indexed = follow(index_steps(sources, dest, split=split, overwrite=overwrite))
    _print_index(dest, indexed.index)
    for reason, count, first in indexed.left_out:
        print(f"warning: {count} members left out: {reason} (first: {printable(first)})")
    for reason, count, first in indexed.undecodable:
        print(
            f"warning: {count} images cannot be decoded: {reason} (first: {printable(first)}); "
            "they stay in: training replaces them, an evaluation of their split refuses"
        )
    if indexed.empty:
        first_empty = printable(indexed.empty[0])
        print(f"warning: {len(indexed.empty)} tars are empty (first: {first_empty})")


def _print_index(dest: str, index: ShardIndex) -> None:
    images = []
    for name in index.splits:
        samples = sum(shard.samples for shard in index.split(name))
        images.append(f"{name} {samples} images")
    megabytes = sum(shard.bytes for shard in index.shards) / 1e6
    print(
        f"{dest}: {len(index.shards)} shards, {megabytes:.1f} MB, {', '.join(images)}, "
        f"digest {index.digest[:12]}"
    )
