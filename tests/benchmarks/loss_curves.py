"""Draws the curves of docs/is-my-loss-normal.md: small pretrainings, healthy ones and broken ones.

    uv run python tests/benchmarks/loss_curves.py --pictures docs

All of them train on the demo's images, which are drawn from scikit-learn's digits
(`jobs/demo_data.py`, 5,032 images of 32 x 32 pixels), with the demo's network, timm's
`test_resnet`, for 10 epochs of 78 steps in one process. The values are those that a pretraining
records in MLflow, at every fifth step; kNN (k 200, T 0.1) is that of the last backbone on the test
digits.

The whole takes about 12 minutes of one core. `--values FILE` keeps the values, and draws from
those that it holds.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hemoco.config import MoCoConfig, MoCoV3Config, OptimizerConfig, PretrainConfig, ResourcesConfig
from hemoco.data.shards.index import Shard, ShardIndex, read_index, write_index, write_table
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, pretraining_plan, steps_per_epoch
from hemoco.errors import TrainingError
from hemoco.features.extract import extract_features
from hemoco.models.resnet import Backbone
from hemoco.storage.objects import join_url, write_bytes
from hemoco.train.pretrain import TrainState, build_state, train_steps
from hemoco.transfer.classification.knn import knn_accuracy
from jobs.demo_data import write_digits
from jobs.recipes.demo import recipe

EPOCHS = 10
LOG_EVERY_STEPS = 5
SAMPLES_PER_SHARD = 500
CPU = torch.device("cpu")
PANELS = {
    "loss": ("loss",),
    "pretext_top1": ("pretext_top1",),
    "embedding_std": ("embedding_std",),
    "cosine of queries and keys": ("positive_similarity", "negative_similarity"),
}
ALONE = ("healthy v2", "healthy v3", "first steps")
"""Runs that are drawn without the healthy v2 behind them."""
SMOOTHED = 5
STYLES = (("#0072B2", "-"), ("#D55E00", "--"))
"""Colours of Okabe and Ito, for colour-blind readers."""

STOPPED_AT = {
    "first steps": 160,
    "rate too high": 390,
    "collapsed": 390,
}
"""Steps after which a run is stopped that shows no more; its schedules are those of all."""

Result = dict[str, Any]

V2 = dataclasses.replace(
    recipe.pretrain,
    epochs=EPOCHS,
    log_every_steps=LOG_EVERY_STEPS,
    resources=ResourcesConfig(workers=1),
)
assert isinstance(V2.moco, MoCoConfig)
V3 = dataclasses.replace(
    V2,
    moco=MoCoV3Config(embedding_size=64, hidden_size=256, temperature=0.2, momentum=0.95),
    optimizer=OptimizerConfig(
        kind="lars", lr=1.0, weight_decay=1e-6, schedule="cosine_per_step", warmup_epochs=1
    ),
)
RUNS: dict[str, PretrainConfig] = {
    "healthy v2": V2,
    "healthy v3": V3,
    "rate too high": dataclasses.replace(V2, optimizer=dataclasses.replace(V2.optimizer, lr=1.0)),
    "collapsed": dataclasses.replace(
        V2,
        moco=dataclasses.replace(V2.moco, head="mlp"),
        optimizer=dataclasses.replace(V2.optimizer, lr=3.0),
    ),
    "queue too long": dataclasses.replace(V2, moco=dataclasses.replace(V2.moco, queue_length=4096)),
    "key encoder too slow": dataclasses.replace(
        V2, moco=dataclasses.replace(V2.moco, momentum=0.9995)
    ),
    "first steps": dataclasses.replace(
        V2, log_every_steps=1, moco=dataclasses.replace(V2.moco, queue_length=4096)
    ),
}


class Digits:
    """The demo's images: shards for the stream, and tensors for kNN."""

    def __init__(self, folder: Path) -> None:
        write_digits(folder / "digits", seed=0)
        self.url = (folder / "shards").as_uri()
        self.bank, self.bank_labels = _read_images(folder / "digits" / "train")
        self.queries, self.query_labels = _read_images(folder / "digits" / "test")
        _write_shards(self.url, folder / "digits" / "train")
        self.index = read_index(self.url)

    def knn(self, config: PretrainConfig, state: TrainState) -> float:
        encoder = state.model.query_encoder.encoder
        backbone = Backbone(encoder, config.encoder, config.views.mean, config.views.std)
        bank, queries = (extract_features(backbone, each) for each in (self.bank, self.queries))
        return knn_accuracy(
            bank, self.bank_labels, queries, self.query_labels, neighbours=200, temperature=0.1
        )


def train(name: str, digits: Digits) -> Result:
    """The recorded values of a pretraining, lists over its steps by name, and its kNN accuracy."""
    config = RUNS[name]
    plan = pretraining_plan(config)
    steps = steps_per_epoch(digits.index, "train", plan)
    state = build_state(config, CPU, data_digest=digits.index.digest)
    bad_samples = BadSampleFile(join_url(digits.url, "bad_samples.jsonl"))
    stream = batches(
        digits.url,
        digits.index,
        "train",
        plan,
        rank=0,
        world_size=1,
        start=None,
        device=CPU,
        bad_samples=bad_samples,
    )
    logged: list[dict[str, float]] = []
    ended = ""
    try:
        for metrics in train_steps(state, stream, steps):
            if metrics.values:
                logged.append({"step": metrics.step} | metrics.values)
            if metrics.step == STOPPED_AT.get(name):
                break
    except TrainingError as error:
        ended = str(error)
    values = {name: [each[name] for each in logged] for name in logged[0]}
    return {"values": values, "knn": digits.knn(config, state), "ended": ended}


def _read_images(folder: Path) -> tuple[Tensor, Tensor]:
    """Pixels uint8 (M, 3, S, S) and labels (M,)."""
    paths = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    labels = torch.tensor([int(path.parent.name) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def _write_shards(url: str, folder: Path) -> None:
    paths = sorted(folder.glob("*/*.png"))
    np.random.default_rng(0).shuffle(paths)
    shards = []
    for number, first in enumerate(range(0, len(paths), SAMPLES_PER_SHARD)):
        part = paths[first : first + SAMPLES_PER_SHARD]
        data = encode_shard(
            [Sample(f"{p.parent.name}_{p.stem}", p.read_bytes(), None, suffix="png") for p in part]
        )
        name = f"train-{number:06d}.tar"
        shard = Shard(name, "train", len(part), len(data), hashlib.sha256(data).hexdigest())
        write_bytes(join_url(url, name), data)
        write_table(url, shard, parse_tar(data, name).table)
        shards.append(shard)
    write_index(url, ShardIndex(tuple(shards), (), ()))


def draw(name: str, results: dict[str, Result], picture: Path) -> None:
    """One run in four panels; behind a broken run the healthy one in grey."""
    config = RUNS[name]
    figure = Figure(figsize=(11, 2.5), layout="constrained", dpi=90)
    panels: list[Axes] = list(figure.subplots(1, 4))
    for (title, metrics), axes in zip(PANELS.items(), panels, strict=True):
        for metric, (colour, dash) in zip(metrics, STYLES, strict=False):
            if name not in ALONE:
                axes.plot(*_smooth(results["healthy v2"], metric), color="#B8B8B8", linestyle=dash)
            label = metric.partition("_")[0]
            axes.plot(*_smooth(results[name], metric), color=colour, linestyle=dash, label=label)
        if len(metrics) > 1:
            axes.legend(frameon=False, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3", linewidth=0.8)
        if isinstance(config.moco, MoCoConfig):
            full = config.moco.queue_length // config.global_batch_size
            axes.axvspan(0, full, color="#EEEEEE", zorder=0)
    limit, text = chance(config)
    panels[0].axhline(limit, color="black", linewidth=0.8, linestyle=":")
    panels[0].text(0, limit, f" chance: {text} = {limit:.2f}", va="bottom", fontsize=8)
    panels[0].margins(y=0.12)
    for axes in panels[1:]:
        axes.set_ylim(-0.03, 1.05)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    # a palette of 64 colours: a third of the bytes, and lines and text have no more
    Image.open(drawn).convert("RGB").quantize(64).save(picture, optimize=True)


def _smooth(result: Result, metric: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values, each the mean of `SMOOTHED` records; of a short run every record."""
    steps, values = (np.asarray(result["values"][key], float) for key in ("step", metric))
    if len(values) < 2 * SMOOTHED or steps[0] == 1:
        return steps, values
    window = np.full(SMOOTHED, 1 / SMOOTHED)
    return np.convolve(steps, window, "valid"), np.convolve(values, window, "valid")


def chance(config: PretrainConfig) -> tuple[float, str]:
    """The loss of constant embeddings, and its formula."""
    moco = config.moco
    if isinstance(moco, MoCoConfig):
        return math.log(moco.queue_length + 1), "ln(K+1)"
    return 4 * moco.temperature * math.log(config.global_batch_size), "4T ln(G)"


def main() -> None:
    """Trains what the file of values lacks, prints a table and draws the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, metavar="DIR", help="for the PNGs")
    parser.add_argument("--values", type=Path, metavar="FILE", help="JSON of the runs' values")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(describe_machine(("torch", "timm"), f"{EPOCHS} epochs, 1 thread"))
    results: dict[str, Result] = {}
    if options.values and options.values.exists():
        results = json.loads(options.values.read_text())
    with tempfile.TemporaryDirectory() as folder:
        digits = None
        for name in (each for each in RUNS if each not in results):
            digits = digits or Digits(Path(folder))
            began = time.process_time()
            results[name] = train(name, digits)
            print(f"{name}: {time.process_time() - began:.0f} s of CPU", flush=True)
            if options.values:
                options.values.write_text(json.dumps(results))
    rows = [(name, *_summary(name, results[name])) for name in RUNS]
    print(table("at the end", ("run", "loss / chance", "top-1", "std", "kNN", "ended"), rows))
    for name in RUNS:
        picture = options.pictures / f"loss-{name.replace(' ', '-')}.png"
        draw(name, results, picture)
        print(f"picture: {picture}")


def _summary(name: str, result: Result) -> tuple[object, ...]:
    last = {metric: values[-1] for metric, values in result["values"].items()}
    share = last["loss"] / chance(RUNS[name])[0]
    ended = result["ended"] or "at its end"
    return share, last["pretext_top1"], last["embedding_std"], result["knn"], ended


if __name__ == "__main__":
    main()
