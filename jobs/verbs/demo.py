"""`python -m jobs demo`: the whole pipeline on built-in data; each call is a new run."""

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

from cluster.local.ray import embedded_stack
from hemoco.config import DataConfig, Recipe
from hemoco.data.shards.index import ShardIndexes
from hemoco.errors import TrainingError
from hemoco.results.records import Pretraining, run_results
from hemoco.storage.objects import home, join_url, read_bytes, write_bytes
from hemoco.tracking import client
from hemoco.tracking import runs as tracking
from hemoco.tracking.tags import Tag
from jobs.arguments import Folder, read_arguments
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

Estimated from CPU seconds measured with AVX2 instructions; a core with AVX-512 is faster.
"""


def main(argv: list[str]) -> None:
    """Runs the demo."""
    read_arguments(demo, argv, command="demo")


def demo(*, out: Folder = "", seed: int = 0) -> None:
    """Runs the whole pipeline on 1,797 handwritten digits: about 6 minutes on two cores.

    Packs the digits as shards on S3, pretrains MoCo v2, measures four transfers, writes a report.

    Starts and stops its own Ray and S3 server on this machine; MLflow is a SQLite file.

    The results are kept.

    Args:
        out: folder for the results; default: a new one in $HEMOCO_HOME/demo.
        seed: seed of the data, the pretraining and the transfers.
    """
    # imported late: Ray Train takes seconds, and wrong usage is reported at once
    from pipeline.run import pretrain_then_transfer

    run = f"demo-{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"
    folder = Path(out).expanduser().resolve() if out else home() / "demo" / run
    folder.mkdir(parents=True, exist_ok=True)
    _use_embedded_defaults()
    _announce_stages()
    with tempfile.TemporaryDirectory(prefix="hemoco-demo-") as work, ExitStack() as stack:
        with _stage("start S3, Ray and MLflow"):
            bucket = stack.enter_context(embedded_stack(Path(work) / "s3"))
            take_sigterm_as_ctrl_c()
            client.connect(client.tracking_uri())
        recipe = _pack_data(load_recipe("demo"), bucket, Path(work), seed)
        tags = run_tags("demo", "demo")
        indexes = ShardIndexes()
        display = live_display(run, pretrain=recipe, transfers=recipe.transfers, indexes=indexes)
        with _stage("pretrain, then transfer"), display:
            pretrain_then_transfer(
                recipe, indexes=indexes, run=run, storage=f"{bucket}/runs", fresh=False, tags=tags
            )
        with _stage("keep the backbone"):
            _keep_backbone(run, folder)
    with _stage("write the table and the report"):
        comparison = show_results(run, str(folder))
    print(f"MLflow UI   uv run mlflow ui --backend-store-uri {client.tracking_uri()}")
    check_learned(comparison.runs[0].results.pretraining)


def check_learned(pretraining: Pretraining) -> None:
    """Checks that the pretraining has learned something.

    A collapsed pretraining can still beat random initialisation on some transfers, so the table
    alone does not show it.

    Raises:
        TrainingError: the loss is not well below chance, ln(K + 1), or the embeddings have
            collapsed.
    """
    # imported late: torch takes seconds, and wrong usage is reported at once
    from hemoco.report.training import health_checks

    checks = health_checks(pretraining)
    findings = [f"{check.name}: {check.finding}" for check in checks if not check.passed]
    if findings:
        raise TrainingError(
            f"{pretraining.run}: pretraining learned nothing: {'; '.join(findings)}"
        )


def _use_embedded_defaults() -> None:
    """Keeps the demo off a cluster or tracking server that the environment happens to name."""
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        if os.environ.pop(name, None):
            print(f"{name} is set; the demo does not use it")


def _pack_data(recipe: Recipe, bucket: str, work: Path, seed: int) -> Recipe:
    """Draws digits and scenes and packs them to S3; returns the recipe with their URLs and seed."""
    # imported late: torch takes seconds, and wrong usage is reported at once
    from jobs.demo_data import write_digits, write_scenes

    with _stage("draw digits and scenes"):
        write_digits(work / "digits", seed)
        write_scenes(work / "scenes", seed)
    with _stage("pack them into shards on S3"):
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
    """Copies the backbone out of the S3 server, which ends with the demo, and updates its tag."""
    uri = client.tracking_uri()
    pretraining = run_results(uri, run).pretraining
    copy_url = join_url(folder.as_uri(), "backbone.safetensors")
    write_bytes(copy_url, read_bytes(pretraining.backbone_url))
    tracking.set_tags(uri, pretraining.run_id, {Tag.BACKBONE_URL: copy_url})


def _announce_stages() -> None:
    print(f"{len(_STAGES)} stages, about {sum(_STAGES.values()) / 60:.0f} min on two cores:")
    for title, seconds in _STAGES.items():
        print(f"  {title:<32}{seconds:>4} s", flush=True)


@contextmanager
def _stage(title: str) -> Iterator[None]:
    """Prints the estimated time left when a stage begins, and the time it took when it ends."""
    titles = list(_STAGES)
    left_s = sum(_STAGES[later] for later in titles[titles.index(title) :])
    print(f"[{title}]  {left_text(left_s)}", flush=True)
    start = time.perf_counter()
    yield
    print(f"[{title}] {time.perf_counter() - start:.0f} s", flush=True)
