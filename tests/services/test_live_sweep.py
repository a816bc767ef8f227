"""The live display of a sweep, of trials as the pipeline records them."""

import dataclasses
import io
import re
import time

import pytest
from rich.console import Console

from hemoco.config import LogUniform, PretrainConfig, SweepConfig
from hemoco.tracking.client import ask, connect
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import open_run, set_tags
from hemoco.tracking.unsent import MetricPoint
from jobs.display.sweep_view import SweepFacts, SweepPicture, read_sweep

LR = "pretrain.optimizer.lr"
CONFIG = SweepConfig(space={LR: LogUniform(0.01, 1.0)}, objective="knn", trials=6, max_concurrent=2)
EPOCHS = PretrainConfig().epochs


def trial(uri: str, sweep: str, number: int, status: str, **tags: str) -> str:
    own = {"hemoco.sweep": sweep, "hemoco.phase": "trial", "hemoco.trial": str(number), "hemoco.steps_per_epoch": "10"}
    name, experiment = f"trial_{number:04d}", connect(uri)
    run_id = open_run(uri, experiment, name=name, parent=None, tags=own | tags, params={LR: f"0.{number}"})
    ask(uri, lambda client: client.update_run(run_id, status=status))
    return run_id


def pretraining(uri: str, run: str, step: int, status: str = "RUNNING") -> None:
    tags = {"hemoco.run": run, "hemoco.phase": "pretrain"}
    run_id = open_run(uri, connect(uri), name="pretrain", parent=None, tags=tags, params={})
    measure(uri, run_id, loss=4.1, knn_top1=0.42, step=step)
    ask(uri, lambda client: client.update_run(run_id, status=status))


def measure(uri: str, run_id: str, *, step: int, **values: float) -> None:
    points = [MetricPoint(key=key, value=value, timestamp=0, step=step) for key, value in values.items()]
    send_points(uri, run_id, points, patience_s=30.0)


@pytest.fixture(scope="module")
def half_done(tracking: str) -> tuple[str, SweepFacts]:
    """Of six trials one has finished, one was stopped, one failed, two run, one was never opened."""
    sweep = f"live_sweep-{time.time_ns()}"
    finished = trial(tracking, sweep, 0, "FINISHED")
    measure(tracking, finished, step=0, objective=0.6123)
    trial(tracking, sweep, 1, "KILLED", **{"hemoco.stopped": "true"})
    trial(tracking, sweep, 2, "FAILED")
    trial(tracking, sweep, 3, "RUNNING")
    pretraining(tracking, f"{sweep}/trial_0003", 34)
    pretraining(tracking, f"{sweep.replace('_', '-')}/trial_0004", 99)  # of another sweep, by a name that is like it
    trial(tracking, sweep, 4, "RUNNING")
    return sweep, read_sweep(tracking, connect(tracking), sweep)


def drawn(sweep: str, facts: SweepFacts, *, width: int = 100, **changes) -> list[str]:
    values = {"config": CONFIG, "epochs": EPOCHS, "elapsed_s": 271.0, "silence_s": 1.0, "problem": ""} | changes
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, no_color=True, _environ={})
    console.print(SweepPicture(sweep=sweep, facts=facts, **values))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()


def test_each_running_trial_says_where_it_is_and_what_is_special_of_it(half_done):
    lines = [" ".join(line.split()) for line in drawn(*half_done)]
    assert lines == [
        "",
        f"trial 3 epoch 4/{EPOCHS} loss 4.100 kNN 0.420 optimizer.lr 0.3",
        "trial 4 starting optimizer.lr 0.4",
        "best knn 0.612 trial 0 optimizer.lr 0.0",
        "trials 2 running 1 finished 1 stopped 1 failed 1 waiting",
        f"elapsed 4:31 {half_done[0]}",
    ]


def test_a_trial_whose_pretraining_is_done_is_being_measured(tracking):
    sweep = f"measured-{time.time_ns()}"
    trial(tracking, sweep, 0, "RUNNING")
    pretraining(tracking, f"{sweep}/trial_0000", 80, status="FINISHED")
    found = read_sweep(tracking, connect(tracking), sweep)
    assert "measuring knn  loss 4.100" in drawn(sweep, found)[1]


@pytest.mark.parametrize("width", [12, 30, 60, 200])
def test_every_line_fits_and_their_number_stays(half_done, width):
    sweep, found = half_done
    ended = dataclasses.replace(found, trials=tuple(facts for facts in found.trials if facts.status != "RUNNING"))
    for facts in (SweepFacts(), found, ended):
        lines = drawn(sweep, facts, width=width)
        assert len(lines) == 6
        assert max(map(len, lines)) < width


def test_before_mlflow_knows_anything_all_wait():
    lines = [" ".join(line.split()) for line in drawn("s", SweepFacts(), silence_s=12.0, problem="gone")]
    assert lines[3:] == [
        "best none has ended yet",
        "trials 6 waiting",
        "elapsed 4:31 MLflow does not answer, 0:12 gone",
    ]


def test_a_superseded_trial_is_left_out(tracking):
    sweep = f"again-{time.time_ns()}"
    old = trial(tracking, sweep, 0, "FAILED")
    set_tags(tracking, old, {"hemoco.sweep": f"{sweep} (superseded)"})
    trial(tracking, sweep, 0, "SCHEDULED")
    found = read_sweep(tracking, connect(tracking), sweep)
    assert [facts.status for facts in found.trials] == ["SCHEDULED"]
