"""Cost of Ray in a pretraining run: steps and start-up under Ray Train and under plain torchrun.

    unshare --net sh -c 'ip link set lo up &&
        uv run python tests/benchmarks/overhead.py [--rounds 3]'

It runs in a network of its own, because torchrun cannot be told to listen on loopback alone. Both
ways run the same job: the training loop with two workers on digits from the local disk, one thread
each. Under torchrun the job runs without MLflow, and without checking at each step whether all
workers are to stop. The two take turns, and figures are medians over the rounds. A step is the
median of the times between two steps after the first few; the start is the time from the command
to the first step, with Ray's cluster (10 s, once) already running. `submit` adds a cost of its
own: uploading the checkout and starting a driver.

This file is also what torchrun runs.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist
from machine import describe_machine, table

from hemoco.config import (
    DataConfig,
    EncoderConfig,
    MoCoConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.shards.index import (
    Shard,
    ShardIndex,
    ShardIndexes,
    read_index,
    write_index,
    write_table,
)
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, pretraining_plan, steps_per_epoch
from hemoco.distributed import rank, world_size
from hemoco.storage.objects import join_url, write_bytes
from hemoco.train.pretrain import build_state, train_steps
from jobs.demo_data import write_digits

_WARM = 5  # steps that are not counted
CONFIG = PretrainConfig(
    epochs=1,
    global_batch_size=128,
    log_every_steps=1,
    knn_every_epochs=0,
    views=ViewsConfig(size=32),
    encoder=EncoderConfig(architecture="resnet18", stem="small"),
    moco=MoCoConfig(queue_length=512, bn_group_size=32),
    stream=StreamConfig(workers=0, lanes=8),
    resources=ResourcesConfig(workers=2),
)


class Times(NamedTuple):
    """Times of one run, in seconds."""

    start: float
    """From the command to the end of the first step."""
    step: float
    """Median."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    packages = ("torch", "ray")
    print(describe_machine(packages, f"two workers, one thread each; {rounds} rounds"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HEMOCO_HOME"] = str(folder / "home")
        shards = _shards(folder)
        found = _measure({"torchrun": _by_torchrun, "Ray Train": _by_ray}, shards, folder, rounds)
    rows = [
        (way, *_spread([t.start for t in times]), *_spread([t.step * 1000 for t in times]))
        for way, times in found.items()
    ]
    names = ("way", "start s", "range", "step ms", "range ")
    print(table("A pretraining of two workers", names, rows))
    pairs = zip(found["torchrun"], found["Ray Train"], strict=True)
    ratio, spread = _spread([ours.step / plain.step for plain, ours in pairs])
    print(f"\na step under Ray Train takes {ratio:.3f} of one under torchrun ({spread})")
    print(describe_machine(packages, "at the end"))


def _measure(
    ways: dict[str, Callable[[str, Path], Times]], shards: str, folder: Path, rounds: int
) -> dict[str, list[Times]]:
    from cluster.local.ray import local_ray
    from hemoco.tracking.client import connect, tracking_uri

    connect(tracking_uri())
    found: dict[str, list[Times]] = {way: [] for way in ways}
    with local_ray(cpus=2):
        for _ in range(rounds):
            for way, measure in ways.items():
                found[way].append(measure(shards, folder))
    return found


def _shards(folder: Path) -> str:
    """Packs digits, in this process."""
    write_digits(folder / "digits", 0)
    files = sorted((folder / "digits").rglob("*.png"))
    url, shards = (folder / "shards").as_uri(), []
    for number, start in enumerate(range(0, len(files), 500)):
        some = files[start : start + 500]
        samples = [
            Sample(str(place), file.read_bytes(), 0, suffix="png")
            for place, file in enumerate(some, start)
        ]
        data = encode_shard(samples)
        shard = Shard(
            f"train-{number:06d}.tar",
            "train",
            len(samples),
            len(data),
            hashlib.sha256(data).hexdigest(),
        )
        write_bytes(join_url(url, shard.name), data)
        write_table(url, shard, parse_tar(data, shard.name).table)
        shards.append(shard)
    write_index(url, ShardIndex(tuple(shards), ("digit",), ()))
    return url


def _by_torchrun(shards: str, folder: Path) -> Times:
    out = folder / "times.json"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--local-addr",
        "127.0.0.1",
    ]
    words += ["--nproc-per-node", "2", __file__, "--as-rank", shards, str(out)]
    began = time.time()
    subprocess.run(words, check=True, capture_output=True)
    return _times(began, json.loads(out.read_text()))


def _by_ray(shards: str, folder: Path) -> Times:
    """Runs the job under Ray Train, the way `python -m jobs pretrain` does.

    A step ends at the time that MLflow recorded for its metrics.
    """
    from mlflow import MlflowClient

    from hemoco.tracking.client import tracking_uri
    from pipeline.run import pretrain_only

    recipe = Recipe(name="overhead", data=DataConfig(shards=shards), pretrain=CONFIG)
    began = time.time()
    done = pretrain_only(
        recipe,
        indexes=ShardIndexes(),
        run=f"overhead-{began}",
        storage=str(folder / "runs"),
        fresh=True,
        tags={},
    )
    points = MlflowClient(tracking_uri()).get_metric_history(done.run_id, "loss")
    return _times(began, sorted(point.timestamp / 1000 for point in points))


def _train_as_rank(shards: str, out: Path) -> None:
    """Runs the training loop alone; torchrun starts this in each process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    index, device = read_index(shards), torch.device("cpu")
    state, plan = build_state(CONFIG, device, data_digest=index.digest), pretraining_plan(CONFIG)
    ends = []
    with (
        closing(BadSampleFile("memory://unwritten")) as bad_samples,
        closing(
            batches(
                shards,
                read_index(shards),
                "train",
                plan,
                rank=rank(),
                world_size=world_size(),
                start=None,
                device=device,
                bad_samples=bad_samples,
            )
        ) as source,
    ):
        for _ in train_steps(state, source, steps_per_epoch(index, "train", plan)):
            ends.append(time.time())
    if rank() == 0:
        out.write_text(json.dumps(ends))
    dist.destroy_process_group()


def _spread(values: list[float]) -> tuple[float, str]:
    """Median, and from which to which."""
    return statistics.median(values), f"{min(values):.3g} to {max(values):.3g}"


def _times(began: float, ends: list[float]) -> Times:
    steps = [after - before for before, after in zip(ends[_WARM:], ends[_WARM + 1 :], strict=False)]
    return Times(ends[0] - began, statistics.median(steps))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-rank"]:
        _train_as_rank(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
