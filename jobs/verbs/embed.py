"""`python -m jobs embed SHARDS BACKBONE DEST`: features of a data set as Parquet."""

from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cluster.local.ray import local_ray
from hemoco.data.shards.index import read_index
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, check_writable, join_url
from jobs.progress import follow, printable

if TYPE_CHECKING:
    from pipeline.embed import Embedded

_MAX_BAD_SHARE = 0.001
_Size = Annotated[int | None, tyro.conf.arg(metavar="PIXELS", help_behavior_hint="")]


def main(argv: list[str]) -> None:
    """Embeds."""
    tyro.cli(embed, args=argv, prog="python -m jobs embed", use_underscores=True)


def embed(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    backbone: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BACKBONE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    split: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None,
    size: _Size = None,
    resize: _Size = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 256,
    cpus: int = 1,
    gpus: int = 0,
    max_bad_share: float = _MAX_BAD_SHARE,
) -> None:
    """Features of a data set by a frozen backbone as Parquet: a file per shard with key, split, label, class, feature.

    The same words again go on where they stopped. Another backbone, other data or another transform need another DEST.

    Args:
        shards: folder or s3:// URL that holds index.json.
        backbone: URL or path of a backbone.safetensors, or models:/NAME@ALIAS of a registered one.
        dest: folder or s3:// URL for the files.
        split: of the data, or several as train+val; default: all.
        size: of the square that is cut from an image's centre; default: that of the backbone's pretraining, of
            imported ones 224, or 32 with the small stem.
        resize: to which the shorter side is scaled before; default: size, as for kNN and probes.
        precision: in which the backbone computes; the lower ones are stored as float16.
        batch_size: images computed at a time.
        cpus: cores of each Ray task: they decode, and without a GPU compute.
        gpus: GPUs of each Ray task, 0 or 1.
        max_bad_share: share of undecodable or damaged samples above which it stops; ten are always allowed.
    """
    if cpus < 1 or gpus not in (0, 1):
        raise UsageError(
            f"--cpus is {cpus}, --gpus {gpus}: a task has at least 1 core, and 0 or 1 GPU"
        )
    from hemoco.features.plan import (
        EmbedConfig,
        finished_files,
        fixed_url,
        plan_embedding,
        usual_size,
    )
    from pipeline.embed import embed_steps  # torch takes seconds to import, errors should not

    shards, dest = absolute_url(shards), absolute_url(dest)
    index = read_index(shards)
    chosen = index.shards if split is None else index.split(split)
    url = fixed_url(backbone)
    size = usual_size(url) if size is None else size
    resize = size if resize is None else resize
    config = EmbedConfig(size=size, resize=resize, precision=precision, batch_size=batch_size)
    plan = plan_embedding(shards, index, url, dest, config)
    check_writable(plan.dest)
    finished_files(plan)  # errors before Ray starts; to look twice is cheap
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
