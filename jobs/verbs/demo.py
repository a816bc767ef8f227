"""`python -m jobs demo`: the whole pipeline on embedded defaults, always a fresh run."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import tyro

from cluster.local.ray import embedded_stack
from hemoco.config import DataConfig, Recipe
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import TrainingError
from hemoco.results.records import Pretraining, run_results
from hemoco.storage.objects import home, join_url, read_bytes, write_bytes
from hemoco.tracking import client
from hemoco.tracking import runs as tracking
from hemoco.tracking.tags import Tag
from jobs.display.live import live_display
from jobs.options import load_recipe
from jobs.session import run_tags, show_results, take_sigterm_as_ctrl_c
from jobs.verbs.pack import pack_with_progress
from pipeline.time_left import left_text

_STAGES = {
    "start S3, Ray and MLflow": 20,
    "draw digits and scenes": 15,
    "pack them into shards on S3": 15,
    "pretrain, then transfer": 280,
    "keep the backbone": 1,
    "write the table and the report": 15,
}
"""The demo's stages in their order, and the seconds that each takes on two idle cores.

Estimates, from the CPU seconds measured with AVX2 instructions; a core with AVX-512 is faster.
"""


def main(argv: list[str]) -> None:
    """Runs the demo."""
    tyro.cli(demo, args=argv, prog="python -m jobs demo")


def demo(*, out: str = "", seed: int = 0) -> None:
    """Handwritten digits -> shards on S3 -> MoCo v2 on 2 workers -> four transfers -> table and report.

    Nothing is needed but this machine: a local Ray, an S3 server on loopback and MLflow on SQLite are started and
    stopped again. What it writes stays.

    Args:
        out: folder for the results; default: a new one in $HEMOCO_HOME/demo.
        seed: of data, pretraining and transfers.
    """
    from pipeline.run import (
        pretrain_then_transfer,
    )  # Ray Train takes seconds to import, errors should not

    run = f"demo-{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"
    folder = Path(out).expanduser().resolve() if out else home() / "demo" / run
    folder.mkdir(parents=True, exist_ok=True)
    _use_embedded_defaults()
    _announce_stages()
    with tempfile.TemporaryDirectory(prefix="hemoco-demo-") as work, ExitStack() as stack:
        with _phase("start S3, Ray and MLflow"):
            bucket = stack.enter_context(embedded_stack(Path(work) / "s3"))
            take_sigterm_as_ctrl_c()
            client.connect(client.tracking_uri())
        recipe = _data(load_recipe("demo"), bucket, Path(work), seed)
        tags = run_tags("demo", "demo")
        indexes = ShardIndexes()
        display = live_display(run, pretrain=recipe, transfers=recipe.transfers, indexes=indexes)
        with _phase("pretrain, then transfer"), display:
            pretrain_then_transfer(
                recipe, indexes=indexes, run=run, storage=f"{bucket}/runs", fresh=False, tags=tags
            )
        with _phase("keep the backbone"):
            _keep_backbone(run, folder)
    with _phase("write the table and the report"):
        many = show_results(run, str(folder))
    print(f"MLflow UI   uv run mlflow ui --backend-store-uri {client.tracking_uri()}")
    check_learned(many.runs[0].results.pretraining)


def check_learned(pretraining: Pretraining) -> None:
    """A collapsed pretraining can still beat random initialisation on some transfers, so the demo looks itself.

    Raises:
        TrainingError: the loss is not well below chance, ln(K + 1), or the embeddings have collapsed.
    """
    from hemoco.report.training import (
        health_checks,
    )  # torch takes seconds to import, errors should not

    checks = health_checks(pretraining)
    findings = [f"{check.name}: {check.finding}" for check in checks if not check.passed]
    if findings:
        raise TrainingError(
            f"{pretraining.run}: pretraining learned nothing: {'; '.join(findings)}"
        )


def _use_embedded_defaults() -> None:
    """The demo must not write into a cluster or tracking server that the environment happens to name."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        if os.environ.pop(name, None):
            print(f"{name} is set; the demo does not use it")


def _data(recipe: Recipe, bucket: str, work: Path, seed: int) -> Recipe:
    """Draws digits and scenes, packs both to S3, and puts their URLs and the seed into the recipe."""
    from jobs.demo_data import write_digits, write_scenes

    with _phase("draw digits and scenes"):
        write_digits(work / "digits", seed)
        write_scenes(work / "scenes", seed)
    with _phase("pack them into shards on S3"):
        for name, samples in (("digits", 500), ("scenes", 100)):
            pack_with_progress(
                (str(work / name),),
                f"{bucket}/{name}",
                split="train",
                samples_per_shard=samples,
                seed=seed,
            )
    transfers = {
        name: dataclasses.replace(config, seeds=(seed,))
        for name, config in recipe.transfers.items()
    }
    scenes = DataConfig(shards=f"{bucket}/scenes")
    transfers["mask_rcnn"] = dataclasses.replace(transfers["mask_rcnn"], data=scenes)
    return dataclasses.replace(
        recipe,
        data=DataConfig(shards=f"{bucket}/digits"),
        pretrain=dataclasses.replace(recipe.pretrain, seed=seed),
        transfers=transfers,
    )


def _keep_backbone(run: str, folder: Path) -> None:
    """Copies the backbone out of the S3 server that is about to end, and says so in MLflow."""
    uri = client.tracking_uri()
    pretraining = run_results(uri, run).pretraining
    kept = join_url(folder.as_uri(), "backbone.safetensors")
    write_bytes(kept, read_bytes(pretraining.backbone_url))
    tracking.set_tags(uri, pretraining.run_id, {Tag.BACKBONE_URL: kept})


def _announce_stages() -> None:
    """Prints which stages come and how long each takes."""
    print(f"{len(_STAGES)} stages, about {sum(_STAGES.values()) / 60:.0f} min on two cores:")
    for title, seconds in _STAGES.items():
        print(f"  {title:<32}{seconds:>4} s", flush=True)


@contextmanager
def _phase(title: str) -> Iterator[None]:
    """Prints how long is left on two cores when a stage begins, and what it took when it has ended."""
    order = list(_STAGES)
    left_s = sum(_STAGES[later] for later in order[order.index(title) :])
    print(f"[{title}]  {left_text(left_s)}", flush=True)
    start = time.perf_counter()
    yield
    print(f"[{title}] {time.perf_counter() - start:.0f} s", flush=True)
