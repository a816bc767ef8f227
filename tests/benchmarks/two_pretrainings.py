"""Two pretrainings of three seeds each on CIFAR-10, with MLflow killed for a minute in mid-run.

Compares them side by side to find whether the colour augmentation of MoCo v2 helps these images:
six runs of `python -m jobs run` with the two recipes below, on 5,000 of CIFAR-10's training images,
their transfers measured on 2,000 test images. During the third run the MLflow server is killed with
SIGKILL and started again a minute later. The benchmark fails where a record is missing afterwards:
each optimiser step of each pretraining must have its loss.

    PYTHONPATH=. uv run python tests/benchmarks/two_pretrainings.py --data DIR --out /tmp/two

leaves the comparison with its report.html in the folder (some 15 minutes on 2 cores).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import psutil
from big_sets import add_data_option, cifar10_archives

from cluster.local.servers import MlflowServer, mlflow_server
from cluster.submit.checkout import CHECKOUT
from hemoco.tracking.client import connect
from hemoco.tracking.runs import metric_history, search

_OUTAGE_S = 60.0
_EPOCHS, _BATCH, _PER_CLASS = 8, 100, {"train": 500, "test": 200}
_RECIPE = '''"""ResNet-10-T on CIFAR-10, {words}."""

from hemoco.config import *

recipe = Recipe(
    name="{name}",
    pretrain=PretrainConfig(
        epochs={epochs},
        global_batch_size={batch},
        log_every_steps=1,
        checkpoint_every_steps=100,
        knn_every_epochs=2,
        views=ViewsConfig(size=32, blur=(0.0, 0.0), {views}),
        encoder=EncoderConfig(architecture="resnet10t"),
        moco=MoCoConfig(queue_length=2000, momentum=0.99, temperature=0.1, bn_group_size=25),
        optimizer=OptimizerConfig(lr=0.06, weight_decay=5e-4),
        stream=StreamConfig(workers=0, lanes=10),
        resources=ResourcesConfig(workers=2),
    ),
    transfers={{
        "knn": KnnConfig(neighbours=20),
        "labels_1_percent": LowShotConfig(fraction=0.01, seeds=(0, 1, 2)),
        "labels_10_percent": LowShotConfig(fraction=0.1, seeds=(0, 1, 2)),
        "linear_probe": LinearProbeConfig(epochs=20, seeds=(0, 1, 2)),
    }},
)
'''
_RECIPES = {
    "colour": ("with the colour augmentation of MoCo v2", ""),
    "crops": ("with crops and mirroring alone", "jitter=0.0, grayscale=0.0"),
}


def main() -> None:
    """Runs all, compares, checks that nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    add_data_option(parser)
    options = parser.parse_args()
    out: Path = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="two-") as folder:
        work = Path(folder)
        os.environ["HEMOCO_HOME"] = str(work / "home")
        _write_images(options.data, work / "images")
        _jobs("pack", str(work / "images"), str(work / "shards"))
        with ExitStack() as servers:
            server = servers.enter_context(mlflow_server(work / "mlflow"))
            os.environ["MLFLOW_TRACKING_URI"] = server.uri
            names = _run_all(work, server, servers)
            _jobs("compare", *names, "--out", str(out))
            for name in names:
                _check(server.uri, name)
    print(f"nothing is missing of {len(names)} runs; {out / 'report.html'}")


def _write_images(data: Path, folder: Path) -> None:
    for split in ("train", "test"):
        taken: Counter[str] = Counter()
        with zipfile.ZipFile(cifar10_archives(data, split)[0]) as images:
            for name in sorted(images.namelist()):
                if name.endswith(".jpg") and taken[name.split("/")[1]] < _PER_CLASS[split]:
                    taken[name.split("/")[1]] += 1
                    images.extract(name, folder)


def _run_all(work: Path, server: MlflowServer, servers: ExitStack) -> list[str]:
    names = []
    for name, (words, views) in _RECIPES.items():
        recipe = work / f"{name}.py"
        recipe.write_text(
            _RECIPE.format(name=name, words=words, views=views, epochs=_EPOCHS, batch=_BATCH)
        )
        for seed in range(3):
            run = f"{name}-{seed}"
            words_of_run = ["run", str(recipe), "--run", run, "--pretrain.seed", str(seed)]
            words_of_run += ["--data.shards", str(work / "shards"), "--storage", str(work / "runs")]
            with _started(*words_of_run) as process:
                if len(names) == 2:
                    _interrupt(work, server, servers, run, process)
                assert process.wait() == 0, f"{run} failed"
            names.append(run)
    return names


def _interrupt(
    work: Path,
    server: MlflowServer,
    servers: ExitStack,
    run: str,
    process: "subprocess.Popen[bytes]",
) -> None:
    """Kills MLflow once losses of the run have arrived, and restarts it after the outage.

    The new server has the same address.
    """
    while not (steps := _steps(server.uri, run)):
        assert process.poll() is None, f"{run} ended before MLflow could be killed"
        time.sleep(1)
    for process in psutil.Process(server.process.pid).children(recursive=True):
        process.kill()
    print(f"-- MLflow was killed at step {max(steps)}, for {_OUTAGE_S:.0f} s", flush=True)
    time.sleep(_OUTAGE_S)
    assert process.poll() is None, f"{run} did not outlast the outage"
    servers.enter_context(mlflow_server(work / "mlflow", port=int(server.uri.rpartition(":")[2])))
    print("-- MLflow is there again", flush=True)


def _steps(uri: str, run: str) -> set[int]:
    """Steps of the run's pretraining that have a loss in MLflow."""
    found = search(uri, connect(uri), {"hemoco.run": run, "hemoco.phase": "pretrain"})
    return {step for facts in found for step, _ in metric_history(uri, facts.run_id, "loss")}


def _check(uri: str, run: str) -> None:
    expected = set(range(1, _EPOCHS * (10 * _PER_CLASS["train"] // _BATCH) + 1))
    missing = expected - _steps(uri, run)
    assert not missing, f"{run}: no loss of steps {sorted(missing)[:10]}, {len(missing)} in all"


def _started(*words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "jobs", *words], cwd=CHECKOUT)


def _jobs(*words: str) -> None:
    with _started(*words) as process:
        assert process.wait() == 0, f"{words[0]} failed"


if __name__ == "__main__":
    main()
