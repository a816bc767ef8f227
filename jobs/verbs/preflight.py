"""`python -m jobs preflight RECIPE`: everything that can fail later, checked now, one line each."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from cluster.preflight.checks import (
    Group,
    check_cluster,
    check_machine,
    check_shards,
    check_storage,
    check_tracking,
)
from cluster.preflight.node import Finding, checked, clock_check, numbered
from cluster.preflight.survey import Needs
from cluster.submit.checkout import CHECKOUT, upload_problems
from hemoco.config import ClassifierConfig, Recipe, StreamConfig, TrainedConfig, world_sizes
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import HemocoError
from hemoco.tracking.client import tracking_uri
from jobs.options import RunOptions, parse_options

_BUFFERS = 4  # batches that a loader process has in shared memory, as hemoco.data.stream.loader
_MODULES = (
    *(
        "torch",
        "torchvision",
        "timm",
        "mlflow",
        "webdataset",
        "s3fs",
        "pyarrow.fs",
        "safetensors",
        "google_crc32c",
    ),
    *(
        "simplejpeg",
        "faster_coco_eval",
        "sklearn",
        "scipy",
        "ray.train",
        "hemoco.train.pretrain",
        "pipeline.checks",
    ),
)


def main(argv: list[str]) -> None:
    """Checks storage, data, MLflow, Ray and its nodes against what a recipe needs; nothing is trained.

    Raises:
        HemocoError: a check has failed; all have been run and shown.
    """
    options = parse_options("preflight", argv, RunOptions)
    recipe_file = Path(argv[0]) if argv[0].endswith(".py") else None
    levels = []
    for finding in _findings(options, recipe_file):
        print(f"{finding.level:<5} {finding.name:<16} {finding.text}", flush=True)
        levels.append(finding.level)
    if failed := levels.count("FAIL"):
        raise HemocoError(f"{failed} of {len(levels)} checks failed")
    warned = levels.count("warn")
    print(f"{len(levels)} checks, none failed" + (f", {warned} warned" if warned else ""))


def _findings(options: RunOptions, recipe_file: Path | None) -> Iterator[Finding]:
    recipe, address = options.recipe, os.environ.get("RAY_ADDRESS", "")
    yield _upload(recipe_file, needed=address.startswith(("http://", "https://")))
    storage, shards = options.storage, tuple(dict.fromkeys(_shard_folders(recipe)))
    yield from _data(recipe, shards)
    yield from check_storage(storage)
    if (clock := clock_check((storage, *shards))) is not None:
        yield clock
    yield check_tracking(tracking_uri())
    groups, streams = _groups(recipe), _streams(recipe)
    needs = Needs(
        shards=shards,
        storage=storage,
        tracking=tracking_uri(),
        cache_bytes=max(stream.disk_cache_bytes for stream in streams),
        shm_bytes=_shared_memory(recipe),
        cuda=any(group.gpus for group in groups),
        modules=_MODULES,
    )
    yield from check_cluster(address, groups, needs) if address else check_machine(groups, needs)


def _upload(recipe_file: Path | None, *, needed: bool) -> Finding:
    """Whether all that a cluster needs of this checkout gets there; only `submit` needs it."""
    if problems := upload_problems(CHECKOUT, recipe_file):
        return Finding(
            "FAIL" if needed else "warn", "upload", f"for `submit`: {'; '.join(problems)}"
        )
    return Finding("ok", "upload", f"{CHECKOUT}: all that a cluster needs of it would be uploaded")


def _data(recipe: Recipe, shards: tuple[str, ...]) -> Iterator[Finding]:
    """The shards, and whether pretraining and transfers fit them."""
    from pipeline.checks import (
        check_pretraining,
        check_transfers,
    )  # torch takes seconds to import, errors should not

    indexes = ShardIndexes()
    for name, url in numbered("shards", shards):
        yield check_shards(url, indexes)._replace(name=name)
    yield from _fit("pretrain", partial(check_pretraining, recipe, indexes))
    for name, config in recipe.transfers.items():
        alone = replace(recipe, transfers={name: config}, curve=())
        yield from _fit(name, partial(check_transfers, alone, indexes))


def _fit(name: str, check: Callable[[], None]) -> Iterator[Finding]:
    """The finding of a check that logs what it doubts, and these doubts."""

    def fits() -> str:
        check()
        return "the recipe fits its data"

    with _records("pipeline.checks") as records:
        found = checked(f"fit {name}", fits)
    if found.level == "ok" and (
        said := [r.getMessage() for r in records if r.levelno < logging.WARNING]
    ):
        found = found._replace(text=f"{found.text}; {'; '.join(said)}")
    yield found
    for record in records:
        if record.levelno >= logging.WARNING:
            yield Finding("warn", f"fit {name}", record.getMessage())


@contextlib.contextmanager
def _records(name: str) -> Iterator[list[logging.LogRecord]]:
    """What is logged in the block, kept from the console."""
    logger, handler = logging.getLogger(name), _Recorder()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _shard_folders(recipe: Recipe) -> list[str]:
    """All that the recipe names; `check_pretraining` says so where it names none."""
    return [
        url
        for url in (
            recipe.data.shards,
            *(config.data.shards for config in recipe.transfers.values()),
        )
        if url
    ]


def _groups(recipe: Recipe) -> list[Group]:
    """The processes of pretraining and of each transfer."""
    own = recipe.pretrain.resources
    groups = [
        Group(
            "pretrain",
            own.workers,
            min(world_sizes(recipe.pretrain)),
            own.cpus_per_worker,
            own.gpus_per_worker,
        )
    ]
    for name, config in recipe.transfers.items():
        workers = config.workers if isinstance(config, TrainedConfig) else 1
        groups.append(Group(name, workers, 1, config.cpus, config.gpus))
    return groups


def _streams(recipe: Recipe) -> list[StreamConfig]:
    others = [
        config.stream
        for config in recipe.transfers.values()
        if isinstance(config, ClassifierConfig)
    ]
    return [recipe.pretrain.stream, *others]


def _shared_memory(recipe: Recipe) -> tuple[int, int]:
    """Bytes of crops that loader processes share, of one training process at most, and of all that run at once."""
    pretrain = recipe.pretrain
    own = 2 * _crops(pretrain.global_batch_size, pretrain.views.size, pretrain.stream)
    each, together = [own // pretrain.resources.workers], 0
    for config in recipe.transfers.values():
        if isinstance(config, ClassifierConfig):
            count = _crops(config.global_batch_size, config.size, config.stream)
            together += count
            each.append(count // config.workers)
    return max(each), max(own, together)


def _crops(images: int, side: int, stream: StreamConfig) -> int:
    return _BUFFERS * images * 3 * side**2 if stream.workers else 0
