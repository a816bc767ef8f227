"""`python -m jobs embed SHARDS BACKBONE DEST`: features of a data set as Parquet."""

from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cluster.local.ray import local_ray
from hemoco.data.shards.index import read_index
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, check_writable, join_url
from jobs.arguments import read_arguments
from jobs.progress import follow, printable

if TYPE_CHECKING:
    from pipeline.embed import Embedded

_MAX_BAD_SHARE = 0.001
_Split = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
_Pixels = Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")]


def main(argv: list[str]) -> None:
    """Computes and writes the features."""
    read_arguments(embed, argv, command="embed")


def embed(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    backbone: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BACKBONE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    split: _Split = None,
    size: _Pixels = None,
    resize: _Pixels = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 256,
    cpus: int = 1,
    gpus: int = 0,
    max_bad_share: float = _MAX_BAD_SHARE,
) -> None:
    """Computes the features of a data set with a frozen backbone and writes them as Parquet.

    Each shard becomes one file with the columns key, split, label, class and feature.

    Run the same command again to resume. Another backbone, data set or transform needs another
    DEST.

    Args:
        shards: folder or s3:// URL that holds index.json.
        backbone: URL or path of a backbone.safetensors, or models:/NAME@ALIAS of a registered one.
        dest: folder or s3:// URL for the files.
        split: split of the data, or several as train+val; default: all.
        size: side of the square that is cut from the centre of an image; default: that of the
            backbone's pretraining; for imported backbones 224, or 32 with the small stem.
        resize: length to which the shorter side is scaled before; default: size, as for kNN and
            probes.
        precision: number format in which the backbone computes; the lower ones are stored as
            float16.
        batch_size: images computed at a time.
        cpus: cores of each Ray task, which decode the images and without a GPU compute.
        gpus: GPUs of each Ray task, 0 or 1.
        max_bad_share: stop if a larger share of the samples is damaged or cannot be decoded; ten
            samples are always allowed.
    """
    if cpus < 1 or gpus not in (0, 1):
        raise UsageError(
            f"--cpus is {cpus}, --gpus {gpus}: a task has at least 1 core, and 0 or 1 GPU"
        )
    # imported late: torch takes seconds, and wrong usage is reported at once
    from hemoco.features.plan import (
        EmbedConfig,
        finished_files,
        fixed_url,
        plan_embedding,
        usual_size,
    )
    from pipeline.embed import embed_steps

    shards, dest = absolute_url(shards), absolute_url(dest)
    index = read_index(shards)
    chosen = index.shards if split is None else index.split(split)
    url = fixed_url(backbone)
    size = usual_size(url) if size is None else size
    resize = size if resize is None else resize
    config = EmbedConfig(size=size, resize=resize, precision=precision, batch_size=batch_size)
    plan = plan_embedding(shards, index, url, dest, config)
    check_writable(plan.dest)
    finished_files(plan)  # raises for files of another backbone before Ray starts
    with local_ray():
        done = follow(embed_steps(plan, chosen, cpus=cpus, gpus=gpus, max_bad_share=max_bad_share))
    _print_result(plan.dest, done)


def _print_result(dest: str, done: "Embedded") -> None:
    from hemoco.features.parquet import BAD_SAMPLES_NAME

    for reason, count, first in done.bad:
        print(f"warning: {count} images left out: {reason} (first: {printable(first)})")
    if done.bad:
        print(f"all of them: {join_url(dest, BAD_SAMPLES_NAME)}")
    speed = f"{done.computed / done.seconds:.1f} images/s" if done.computed else "all were there"
    print(f"{dest}: {done.images} images in {done.files} files, {speed}")
    print(f"neighbours  python -m jobs neighbours {dest} KEY")
