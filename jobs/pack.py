"""`python -m jobs pack SOURCE [SOURCE ...] DEST`: images -> shards and their index."""

from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import Progress

from cluster.local import local_ray
from hemoco.errors import UsageError
from hemoco.storage import absolute_url, check_writable
from pipeline.pack import Packed, pack_steps


def main(argv: list[str]) -> None:
    """Packs."""
    tyro.cli(pack, args=argv, prog="python -m jobs pack", use_underscores=True)


def pack(
    paths: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    *,
    split: str = "train",
    samples_per_shard: int = 1000,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Images -> WebDataset shards and their index, in parallel.

    Args:
        paths: SOURCE [SOURCE ...] DEST: class folders, a flat folder, zip or tar archives or a COCO folder; the last
            is the folder or s3:// URL that receives the shards.
        split: split of images whose folders name none (folders train/, val/, test/ do).
        samples_per_shard: images in a shard.
        seed: of the order in which images are dealt to shards.
        overwrite: replace other shards that are there.
    """
    if len(paths) < 2:
        raise UsageError("pack needs a SOURCE and a DEST: python -m jobs pack SOURCE [SOURCE ...] DEST")
    if samples_per_shard < 1:
        raise UsageError(f"--samples_per_shard is {samples_per_shard}: it must be at least 1")
    *sources, dest = paths
    dest = absolute_url(dest)
    check_writable(dest)
    with local_ray():
        pack_with_progress(
            tuple(sources), dest, split=split, samples_per_shard=samples_per_shard, seed=seed, overwrite=overwrite
        )


def pack_with_progress(
    sources: tuple[str, ...], dest: str, *, split: str, samples_per_shard: int, seed: int, overwrite: bool = False
) -> None:
    """Packs under a progress bar (plain lines where output is no terminal) and says what came of it."""
    console = Console()
    steps = pack_steps(sources, dest, split=split, samples_per_shard=samples_per_shard, seed=seed, overwrite=overwrite)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("shards", total=None)
        while True:
            try:
                done = next(steps)
            except StopIteration as finished:
                packed: Packed = finished.value
                break
            bar.update(task, completed=done.done, total=done.total)
    index = packed.index
    counts = ", ".join(f"{name} {sum(shard.samples for shard in index.split(name))} images" for name in index.splits)
    size = sum(shard.bytes for shard in index.shards) / 1e6
    print(f"{dest}: {len(index.shards)} shards, {size:.1f} MB, {counts}, digest {index.digest[:12]}")
    for reason, count in sorted(packed.skipped.items()):
        print(f"warning: {count} images left out: {reason}")
    if packed.duplicates:
        print(f"warning: {packed.duplicates} images of other splits are in the training split too")
