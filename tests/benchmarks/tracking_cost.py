"""The cost that recording in MLflow adds to a training, beside that of the usual way of logging.

Measures steps per second with recording and without.

    uv run python tests/benchmarks/tracking_cost.py [--rounds 5] [--seconds 20] [--quick]

The training loop of the demo's pretraining runs in this process, in one thread, on crops made
beforehand; its short steps make the cost look large. The MLflow server is a process of its own, on
loopback and SQLite. The listeners to the steps are:

- nobody: no step's values are measured. It runs twice a round: the difference between the two shows
  the noise.
- nobody, values measured: at every step; from here on it is MLflow that costs, not the values.
- Tracker, every step.
- as shipped: Tracker and SystemMetrics, values every 10 steps, as the worker of `pipeline.pretrain`
  has them.
- Tracker, server stopped: every step, and after a quarter of the time the server's processes get
  SIGSTOP.
- log_metric: every step, each value by a synchronous call of MlflowClient.

They take turns, and figures are medians over the rounds. `ratio` is steps per second beside
nobody's of the same round: wall time, so the server's computing counts where it takes the cores
from the training, and so does everything else on the machine. `wait ms` is how long a step waits
for the listener, `end s` how long a training waits at its end. `CPU ms` is what recording costs
this process: all CPU time until the last point is delivered, except that of the training's thread
between two calls of the listener; `share %` is that beside the training's own. The first seconds of
a turn do not count: the machine's facts are recorded then, once a run. After each turn a check
confirms that every point has arrived.
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe_machine, table
from step_case import Case, made_crops
from step_ours import NEVER
from step_rounds import Found, Goal, print_goals

from cluster.local.servers import MlflowServer, mlflow_server
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.tracking.client import connect
from hemoco.tracking.metric_queue import Tracker, check_delivered
from hemoco.tracking.runs import metric_history, open_run
from hemoco.tracking.system_metrics import SystemMetrics
from hemoco.train.pretrain import StepMetrics, build_state, train_steps
from jobs.recipes.demo import recipe

Listener = Callable[[StepMetrics], None]
NOBODY, AGAIN, MEASURED = "nobody", "nobody, again", "nobody, values measured"
TRACKED, SHIPPED, STOPPED, NAIVE = (
    "Tracker, every step",
    "as shipped",
    "Tracker, server stopped",
    "log_metric",
)
LEAD_IN_S = 3.0
CONFIG = dataclasses.replace(recipe.pretrain, epochs=NEVER)
EVERY = {NOBODY: NEVER, AGAIN: NEVER, SHIPPED: CONFIG.log_every_steps}
"""Steps between two whose values are measured; 1 in the other ways."""


class Cost(NamedTuple):
    """Cost of one turn; `_ms` is per step, and CPU time except for `wait_ms`."""

    rate: float
    """Steps per second."""
    training_ms: float
    wait_ms: float
    """Wall time of the listener's calls."""
    recording_ms: float
    """CPU time of everything in this process except training."""
    server_ms: float
    end_s: float
    """From the last step until all is delivered."""

    @property
    def share(self) -> float:
        """CPU time of recording beside that of training, in per cent."""
        return 100 * self.recording_ms / self.training_ms


@dataclasses.dataclass
class Trained:
    """Some steps."""

    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """CPU time of this thread, without listening."""
    listening_s: float = 0.0
    logged: set[int] = dataclasses.field(default_factory=set)


class Lab:
    """The server, whose processes are a group, and where undelivered metrics go."""

    def __init__(self, server: MlflowServer, folder: Path) -> None:
        self.uri, self.group, self._folder = server.uri, server.process.pid, folder

    def new_run(self) -> str:
        """The id of a run in MLflow."""
        return open_run(
            self.uri, connect(self.uri), name="tracking_cost", parent=None, tags={}, params={}
        )

    @contextlib.contextmanager
    def tracker(self, run_id: str) -> Iterator[Tracker]:
        """The tracker of a run.

        Raises:
            TrackingError: the server has not taken all points.
        """
        with Tracker(self.uri, run_id, (self._folder / uuid.uuid4().hex).as_uri()) as tracker:
            yield tracker
        check_delivered(tracker)

    def cpu_s(self) -> float:
        """CPU time of all processes of the server."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fields = (
                    stat.read_text().rpartition(")")[2].split()
                )  # from the third on, which is the state
                ticks += (int(fields[11]) + int(fields[12])) * (int(fields[2]) == self.group)
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def nobody(lab: Lab, run_id: str, seconds: float) -> Iterator[Listener]:
    """Listens to nothing."""
    yield lambda metrics: None


@contextlib.contextmanager
def tracked(lab: Lab, run_id: str, seconds: float) -> Iterator[Listener]:
    """Treats a step like the worker of `pipeline.pretrain`, but stores no checkpoints."""
    with lab.tracker(run_id) as tracker:
        yield lambda metrics: _track(tracker, metrics)


@contextlib.contextmanager
def as_shipped(lab: Lab, run_id: str, seconds: float) -> Iterator[Listener]:
    """The same, and the machine is sampled."""
    with lab.tracker(run_id) as tracker, SystemMetrics(lab.uri, run_id, tracker):
        yield lambda metrics: _track(tracker, metrics)


@contextlib.contextmanager
def server_stopped(lab: Lab, run_id: str, seconds: float) -> Iterator[Listener]:
    """Like `tracked`, but the server does not answer in the last three quarters of the time."""
    with lab.tracker(run_id) as tracker:
        stop_at = time.perf_counter() + LEAD_IN_S + seconds / 4

        def listen(metrics: StepMetrics) -> None:
            nonlocal stop_at
            _track(tracker, metrics)
            if time.perf_counter() > stop_at:
                stop_at = float("inf")
                os.killpg(lab.group, signal.SIGSTOP)

        try:
            yield listen
        finally:
            os.killpg(lab.group, signal.SIGCONT)


@contextlib.contextmanager
def naive(lab: Lab, run_id: str, seconds: float) -> Iterator[Listener]:
    """A call per value, and training waits for the answer."""
    from mlflow import MlflowClient

    client = MlflowClient(lab.uri)

    def listen(metrics: StepMetrics) -> None:
        for name, value in metrics.values.items():
            client.log_metric(run_id, name, value, step=metrics.step)

    yield listen


WAYS = {
    NOBODY: nobody,
    MEASURED: nobody,
    TRACKED: tracked,
    SHIPPED: as_shipped,
    STOPPED: server_stopped,
}
WAYS |= {NAIVE: naive, AGAIN: nobody}


def steps_of(way: str) -> Iterator[StepMetrics]:
    """A training without end, the same for every way."""
    config = dataclasses.replace(CONFIG, log_every_steps=EVERY.get(way, 1))
    size, count = config.views.size, config.global_batch_size
    case = Case(
        architecture="resnet18", size=size, stem="imagenet", batch=count, queue=0, group=0
    )  # for its crops
    batch = Batch(made_crops(case, "cpu"), [str(row) for row in range(count)], StreamPosition(0, 0))
    state = build_state(config, torch.device("cpu"), data_digest="")
    return train_steps(state, iter(lambda: batch, None), steps_per_epoch=NEVER)


def train(steps: Iterator[StepMetrics], listen: Listener, seconds: float) -> Trained:
    """Trains for some seconds."""
    done, began = Trained(), time.perf_counter()
    while time.perf_counter() < began + seconds:
        cpu_s = time.thread_time()
        metrics = next(steps)
        done.cpu_s += time.thread_time() - cpu_s
        called = time.perf_counter()
        listen(metrics)
        done.listening_s += time.perf_counter() - called
        done.steps += 1
        done.logged |= {metrics.step} if metrics.values else set()
    done.wall_s = time.perf_counter() - began
    return done


def take_turn(lab: Lab, way: str, steps: Iterator[StepMetrics], seconds: float) -> Cost:
    """One turn.

    Raises:
        SystemExit: points are missing in MLflow.
    """
    run_id = lab.new_run()
    with WAYS[way](lab, run_id, seconds) as listen:
        before = train(steps, listen, LEAD_IN_S)
        cpu_s, server_s = time.process_time(), lab.cpu_s()
        done = train(steps, listen, seconds)
        ended = time.perf_counter()
    end_s = time.perf_counter() - ended
    cpu_s, server_s = time.process_time() - cpu_s, lab.cpu_s() - server_s
    if WAYS[way] is not nobody:
        arrived = {step for step, _ in metric_history(lab.uri, run_id, "loss")}
        if arrived != before.logged | done.logged:
            raise SystemExit(
                f"{way}: steps were logged that MLflow does not have, or the other way round"
            )
    by_step = (
        1e3 * s / done.steps for s in (done.cpu_s, done.listening_s, cpu_s - done.cpu_s, server_s)
    )
    return Cost._make((done.steps / done.wall_s, *by_step, end_s))


def measure(lab: Lab, rounds: int, seconds: float) -> list[dict[str, Cost]]:
    """Each way once a round; each round begins elsewhere."""
    trainings, ways, found = {way: steps_of(way) for way in WAYS}, list(WAYS), []
    for turn in range(rounds):
        order = ways[turn % len(ways) :] + ways[: turn % len(ways)]
        found.append({way: take_turn(lab, way, trainings[way], seconds) for way in order})
    return found


def report(found: list[dict[str, Cost]]) -> None:
    """Prints times and goals."""
    rows = []
    for way in WAYS:
        middle = Cost(*map(statistics.median, zip(*(costs[way] for costs in found), strict=True)))
        rate, share = _rates(found, way, NOBODY), _found([costs[way].share for costs in found])
        wall = (f"{middle.rate:.2f}", f"{rate.median:.3f}", _range(rate), f"{middle.wait_ms:.2f}")
        cpu = (
            f"{middle.training_ms:.1f}",
            f"{middle.recording_ms:.2f}",
            f"{share.median:.2f}",
            _range(share),
        )
        rows.append((way, *wall, *cpu, f"{middle.server_ms:.1f}", f"{middle.end_s:.1f}"))
    of_wall = ("steps/s", "ratio", "range", "wait ms")
    names = (
        "who listens",
        *of_wall,
        "training's",
        "CPU ms",
        "share %",
        "range ",
        "server's",
        "end s",
    )
    print(
        table(
            f"{CONFIG.encoder.architecture}, {CONFIG.global_batch_size} images a step", names, rows
        )
    )
    goals = [
        Goal("steps/s: as shipped / nobody", _rates(found, SHIPPED, NOBODY), 0.99),
        Goal(
            "CPU: recording as shipped, % of training",
            _found([c[SHIPPED].share for c in found]),
            1.0,
            at_least=False,
        ),
        Goal("steps/s: server stopped / server answers", _rates(found, STOPPED, TRACKED), 0.99),
    ]
    print_goals("Tracking: goals", goals)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way in each round")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it runs")
    options = parser.parse_args()
    rounds, seconds = (1, 4.0) if options.quick else (options.rounds, options.seconds)
    torch.set_num_threads(1)
    runs = f"one thread; {rounds} rounds of {seconds:g} s{'; QUICK' if options.quick else ''}"
    print(describe_machine(("torch", "mlflow"), runs), flush=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["HEMOCO_HOME"] = f"{name}/home"  # whose disk SystemMetrics looks at
        with mlflow_server(Path(name) / "mlflow") as server:
            report(measure(Lab(server, Path(name) / "unsent"), rounds, seconds))
    print(describe_machine(("torch",), "at the end"))


def _track(tracker: Tracker, metrics: StepMetrics) -> None:
    if metrics.values:
        tracker.log(metrics.step, metrics.values)
    if metrics.step % CONFIG.checkpoint_every_steps == 0:
        tracker.keep()


def _rates(found: list[dict[str, Cost]], way: str, to: str) -> Found:
    return _found([costs[way].rate / costs[to].rate for costs in found])


def _found(values: list[float]) -> Found:
    return Found(statistics.median(values), min(values), max(values))


def _range(found: Found) -> str:
    return f"{found.low:.2f} to {found.high:.2f}"


if __name__ == "__main__":
    main()
