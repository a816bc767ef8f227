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
from jobs.display.facts import SweepFacts, read_sweep
from jobs.display.rows import clock
from jobs.display.sweep_view import SweepView

LR = "pretrain.optimizer.lr"
CONFIG = SweepConfig(space={LR: LogUniform(0.01, 1.0)}, objective="knn", trials=6, max_concurrent=2)
EPOCHS = PretrainConfig().epochs


def trial(uri: str, sweep: str, number: int, status: str, **tags: str) -> str:
    own = {
        "hemoco.sweep": sweep,
        "hemoco.phase": "trial",
        "hemoco.trial": str(number),
        "hemoco.steps_per_epoch": "10",
    }
    name, experiment = f"trial_{number:04d}", connect(uri)
    run_id = open_run(
        uri, experiment, name=name, parent=None, tags=own | tags, params={LR: f"0.{number}"}
    )
    ask(uri, lambda client: client.update_run(run_id, status=status))
    return run_id


def pretraining(uri: str, run: str, step: int, status: str = "RUNNING") -> None:
    tags = {"hemoco.run": run, "hemoco.phase": "pretrain"}
    run_id = open_run(uri, connect(uri), name="pretrain", parent=None, tags=tags, params={})
    measure(uri, run_id, loss=4.1, knn_top1=0.42, step=step)
    ask(uri, lambda client: client.update_run(run_id, status=status))


def measure(uri: str, run_id: str, *, step: int, **values: float) -> None:
    points = [
        MetricPoint(key=key, value=value, timestamp=0, step=step) for key, value in values.items()
    ]
    send_points(uri, run_id, points, patience_s=30.0)


@pytest.fixture(scope="module")
def half_done(tracking: str) -> tuple[str, SweepFacts]:
    """Six trials: one finished, one stopped, one failed, two running, one never opened."""
    sweep = f"live_sweep-{time.time_ns()}"
    finished = trial(tracking, sweep, 0, "FINISHED")
    measure(tracking, finished, step=0, objective=0.6123)
    trial(tracking, sweep, 1, "KILLED", **{"hemoco.stopped": "true"})
    trial(tracking, sweep, 2, "FAILED")
    trial(tracking, sweep, 3, "RUNNING")
    pretraining(tracking, f"{sweep}/trial_0003", 34)
    pretraining(
        tracking, f"{sweep.replace('_', '-')}/trial_0004", 99
    )  # of another sweep, by a name that is like it
    trial(tracking, sweep, 4, "RUNNING")
    return sweep, read_sweep(tracking, connect(tracking), sweep)


def drawn(view: SweepView, width: int = 100) -> list[str]:
    """Returns the rows without their bars, with single spaces."""
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=width, no_color=True, _environ={}).print(view)
    text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
    assert max(map(len, text.splitlines())) <= width
    return [" ".join(line.split()) for line in re.sub("[━╸╺]", " ", text).splitlines()]


def test_each_running_trial_shows_how_far_it_is_and_its_settings(half_done):
    view = SweepView("s", CONFIG, EPOCHS)
    view.show(half_done[1])
    assert drawn(view) == [
        "trials 3/6 running 2 running 1 finished 1 stopped 1 failed 1 waiting",
        f"trial 3 34/{EPOCHS * 10} running epoch 4/{EPOCHS} loss 4.100 kNN 0.420 optimizer.lr 0.3",
        f"trial 4 0/{EPOCHS * 10} starting optimizer.lr 0.4",
        "best knn 0.612 trial 0 optimizer.lr 0.0",
    ]


def test_trials_and_their_pretrainings_show_the_time_left(half_done):
    now = [0.0]
    view = SweepView("s", CONFIG, EPOCHS, lambda: now[0])
    found = half_done[1]
    view.show(found)
    now[0] = 100.0
    phase = found.pretrainings[3]
    later = dataclasses.replace(phase, steps={"loss": 54})
    stopped = dataclasses.replace(found.trials[4], status="KILLED", tags=found.trials[1].tags)
    view.show(SweepFacts({**found.trials, 4: stopped}, {3: later}))
    everything, trial_3 = drawn(view)[:2]
    assert everything == "trials 4/6 3:20 left 1 running 1 finished 2 stopped 1 failed 1 waiting"
    seconds = 5 * (EPOCHS * 10 - 54)
    assert f"{clock(seconds)} left epoch 6/{EPOCHS}" in trial_3


def test_a_trial_whose_pretraining_is_done_is_being_measured(tracking):
    sweep = f"measured-{time.time_ns()}"
    trial(tracking, sweep, 0, "RUNNING")
    pretraining(tracking, f"{sweep}/trial_0000", 80, status="FINISHED")
    view = SweepView(sweep, CONFIG, EPOCHS)
    view.show(read_sweep(tracking, connect(tracking), sweep))
    assert "measuring knn epoch 9" in drawn(view)[1] and "loss 4.100" in drawn(view)[1]


@pytest.mark.parametrize("width", [12, 30, 60, 200])
def test_every_line_fits_whatever_runs(half_done, width):
    view = SweepView("s", CONFIG, EPOCHS)
    assert drawn(view, width)  # which compares the widths
    view.show(half_done[1])
    assert drawn(view, width)


def test_a_trial_that_has_ended_leaves_the_rows(half_done):
    view = SweepView("s", CONFIG, EPOCHS)
    view.show(half_done[1])
    view.show(SweepFacts({number: half_done[1].trials[number] for number in (0, 1, 2)}))
    assert [row.split()[0] for row in drawn(view)] == ["trials", "best"]


def test_before_mlflow_knows_anything_all_wait():
    assert drawn(SweepView("s", CONFIG, EPOCHS)) == [
        "trials 0/6 waiting 6 waiting",
        "best no trial has finished yet",
    ]


def test_a_superseded_trial_is_left_out(tracking):
    sweep = f"again-{time.time_ns()}"
    old = trial(tracking, sweep, 0, "FAILED")
    set_tags(tracking, old, {"hemoco.sweep": f"{sweep} (superseded)"})
    trial(tracking, sweep, 0, "SCHEDULED")
    found = read_sweep(tracking, connect(tracking), sweep)
    assert [facts.status for facts in found.trials.values()] == ["SCHEDULED"]
