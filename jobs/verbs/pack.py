"""`python -m jobs pack SOURCE [SOURCE ...] DEST`: images -> shards and their index."""

from typing import Annotated

import tyro

from cluster.local.ray import local_ray
from hemoco.data.shards.index import ShardIndex
from hemoco.data.sources.folders import open_source
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, check_writable
from jobs.progress import follow, printable
from pipeline.shards.index_tars import index_steps
from pipeline.shards.pack import pack_steps

_SAMPLES_PER_SHARD = 1000
_SEED = 0


def main(argv: list[str]) -> None:
    """Packs."""
    tyro.cli(pack, args=argv, prog="python -m jobs pack", use_underscores=True)


def pack(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    *,
    split: str = "train",
    samples_per_shard: int = _SAMPLES_PER_SHARD,
    seed: int = _SEED,
    overwrite: bool = False,
    index_only: bool = False,
) -> None:
    """Images -> WebDataset shards and their index, in parallel; with --index_only, the index of existing tars.

    Args:
        paths: SOURCE [SOURCE ...] DEST: class folders, a flat folder, a COCO or Pascal VOC folder, or zip or tar
            archives of these; the last is the folder or s3:// URL that receives the shards. The same words again
            verify what is there. With --index_only each SOURCE is a folder or s3:// URL of WebDataset tars, one tar,
            or a pattern such as s3://bucket/train-{000000..000012}.tar, and DEST receives only index.json and the
            tables in samples/; labels are the numbers in .cls.
        split: split of images (or tars) whose folders (or names) name none (train, val, test do).
        samples_per_shard: images in a shard.
        seed: of the order in which images are dealt to shards.
        overwrite: replace other shards that are there; of tars that were only indexed, the index alone.
        index_only: leave WebDataset tars where and as they are.
    """
    if len(paths) < 2:
        raise UsageError(
            "pack needs a SOURCE and a DEST: python -m jobs pack SOURCE [SOURCE ...] DEST"
        )
    if samples_per_shard < 1:
        raise UsageError(f"--samples_per_shard is {samples_per_shard}: it must be at least 1")
    if index_only and (samples_per_shard, seed) != (_SAMPLES_PER_SHARD, _SEED):
        raise UsageError(
            "--index_only leaves the tars as they are: --samples_per_shard and --seed do not go with it"
        )
    *sources, dest = paths
    dest = absolute_url(dest)
    check_writable(dest)
    if not index_only:
        open_source(sources, split)  # errors before Ray starts; to list twice is cheap
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
    """Packs under a progress bar (plain lines where output is no terminal) and says what came of it."""
    packed = follow(
        pack_steps(
            sources,
            dest,
            split=split,
            samples_per_shard=samples_per_shard,
            seed=seed,
            overwrite=overwrite,
        )
    )
    _print_index(dest, packed.index)
    for reason, count, first in packed.skipped:
        print(f"warning: {count} images left out: {reason} (first: {printable(first)})")
    if packed.duplicates:
        print(f"warning: {packed.duplicates} images of other splits are in the training split too")


def index_with_progress(
    sources: tuple[str, ...], dest: str, *, split: str, overwrite: bool
) -> None:
    """Makes the index of existing tars under a progress bar and says what came of it."""
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
        print(
            f"warning: {len(indexed.empty)} tars are empty (first: {printable(indexed.empty[0])})"
        )


def _print_index(dest: str, index: ShardIndex) -> None:
    counts = ", ".join(
        f"{name} {sum(shard.samples for shard in index.split(name))} images"
        for name in index.splits
    )
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(
        f"{dest}: {len(index.shards)} shards, {size:.1f} MB, {counts}, digest {index.digest[:12]}"
    )
