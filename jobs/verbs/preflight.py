"""`python -m jobs preflight RECIPE`: checks everything that could fail later, one line each."""

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

# Batches that a loader process holds in shared memory. A copy of the number in
# hemoco.data.stream.loader, whose import takes seconds; a test compares the two.
_BUFFERS = 4
_MODULES = (
    "torch",
    "torchvision",
    "timm",
    "mlflow",
    "webdataset",
    "s3fs",
    "pyarrow.fs",
    "safetensors",
    "google_crc32c",
    "simplejpeg",
    "faster_coco_eval",
    "sklearn",
    "scipy",
    "ray.train",
    "hemoco.train.pretrain",
    "pipeline.checks",
)
"""Modules that every node must be able to import."""


def main(argv: list[str]) -> None:
    """Checks storage, data, MLflow, Ray and its nodes against what a recipe needs.

    Nothing is trained.

    Raises:
        HemocoError: a check has failed; the others have run and are printed.
    """
    options = parse_options("preflight", argv, RunOptions)
    recipe_file = Path(argv[0]) if argv[0].endswith(".py") else None
    levels = []
    for finding in _findings(options, recipe_file):
        print(f"{finding.level:<5} {finding.name:<16} {finding.text}", flush=True)
        levels.append(finding.level)
    failures = levels.count("FAIL")
    if failures:
        raise HemocoError(f"{failures} of {len(levels)} checks failed")
    warnings = levels.count("warn")
    print(f"{len(levels)} checks, none failed" + (f", {warnings} warned" if warnings else ""))


def _findings(options: RunOptions, recipe_file: Path | None) -> Iterator[Finding]:
    recipe = options.recipe
    address = os.environ.get("RAY_ADDRESS", "")
    yield _check_upload(recipe_file, needed=address.startswith(("http://", "https://")))
    storage = options.storage
    shards = tuple(dict.fromkeys(_shard_folders(recipe)))  # each once, in order
    yield from _check_data(recipe, shards)
    yield from check_storage(storage)
    clock = clock_check((storage, *shards))
    if clock is not None:
        yield clock
    yield check_tracking(tracking_uri())
    groups = _groups(recipe)
    needs = Needs(
        shards=shards,
        storage=storage,
        tracking=tracking_uri(),
        cache_bytes=max(stream.disk_cache_bytes for stream in _streams(recipe)),
        shm_bytes=_shared_memory(recipe),
        cuda=any(group.gpus for group in groups),
        modules=_MODULES,
    )
    if address:
        yield from check_cluster(address, groups, needs)
    else:
        yield from check_machine(groups, needs)


def _check_upload(recipe_file: Path | None, *, needed: bool) -> Finding:
    """Checks that `submit` would upload all that a cluster needs of this checkout.

    Args:
        recipe_file: a recipe given by its path.
        needed: whether the run will be submitted, so that a problem is a failure.
    """
    problems = upload_problems(CHECKOUT, recipe_file)
    if problems:
        text = f"for `submit`: {'; '.join(problems)}"
        return Finding("FAIL" if needed else "warn", "upload", text)
    return Finding("ok", "upload", f"{CHECKOUT}: all that a cluster needs of it would be uploaded")


def _check_data(recipe: Recipe, shards: tuple[str, ...]) -> Iterator[Finding]:
    """Checks the shards, and that pretraining and transfers fit them."""
    # imported late: torch takes seconds, and wrong usage is reported at once
    from pipeline.checks import check_pretraining, check_transfers

    indexes = ShardIndexes()
    for name, url in numbered("shards", shards):
        yield check_shards(url, indexes)._replace(name=name)
    yield from _check_fit("pretrain", partial(check_pretraining, recipe, indexes))
    for name, config in recipe.transfers.items():
        alone = replace(recipe, transfers={name: config}, curve=())
        yield from _check_fit(name, partial(check_transfers, alone, indexes))


def _check_fit(name: str, check: Callable[[], None]) -> Iterator[Finding]:
    """Runs a check of pipeline.checks; yields its finding, and one for each warning it logs."""

    def fits() -> str:
        check()
        return "the recipe fits its data"

    with _captured_log("pipeline.checks") as records:
        finding = checked(f"fit {name}", fits)
    notes = [record.getMessage() for record in records if record.levelno < logging.WARNING]
    if finding.level == "ok" and notes:
        finding = finding._replace(text=f"{finding.text}; {'; '.join(notes)}")
    yield finding
    for record in records:
        if record.levelno >= logging.WARNING:
            yield Finding("warn", f"fit {name}", record.getMessage())


@contextlib.contextmanager
def _captured_log(name: str) -> Iterator[list[logging.LogRecord]]:
    """Collects what a logger is given in the block, instead of printing it."""
    logger = logging.getLogger(name)
    handler = _Recorder()
    propagated = logger.propagate
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


class _Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def _shard_folders(recipe: Recipe) -> list[str]:
    """Lists the shard folders that the recipe names; `check_pretraining` reports if it has none."""
    urls = [recipe.data.shards, *(config.data.shards for config in recipe.transfers.values())]
    return [url for url in urls if url]


def _groups(recipe: Recipe) -> list[Group]:
    """Lists the processes of the pretraining and of each transfer."""
    resources = recipe.pretrain.resources
    pretraining = Group(
        name="pretrain",
        processes=resources.workers,
        fewest=min(world_sizes(recipe.pretrain)),
        cpus=resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
    )
    groups = [pretraining]
    for name, config in recipe.transfers.items():
        workers = config.workers if isinstance(config, TrainedConfig) else 1
        groups.append(Group(name, workers, 1, config.cpus, config.gpus))
    return groups


def _streams(recipe: Recipe) -> list[StreamConfig]:
    streams = [recipe.pretrain.stream]
    for config in recipe.transfers.values():
        if isinstance(config, ClassifierConfig):
            streams.append(config.stream)
    return streams


def _shared_memory(recipe: Recipe) -> tuple[int, int]:
    """Computes the bytes of crops in shared memory.

    Returns:
        Those of the largest training process, and of all processes that run at the same time.
    """
    pretrain = recipe.pretrain
    views = 2 * _crop_bytes(pretrain.global_batch_size, pretrain.views.size, pretrain.stream)
    per_process = [views // pretrain.resources.workers]
    transfers = 0  # they run side by side
    for config in recipe.transfers.values():
        if isinstance(config, ClassifierConfig):
            crops = _crop_bytes(config.global_batch_size, config.size, config.stream)
            transfers += crops
            per_process.append(crops // config.workers)
    return max(per_process), max(views, transfers)


def _crop_bytes(images: int, side: int, stream: StreamConfig) -> int:
    return _BUFFERS * images * 3 * side**2 if stream.workers else 0
