"""A night on a cluster of three hosts: everything that can go wrong with a submitted run.

Network namespaces stand for the hosts, each with one Ray node (a head without cores, two workers
with one core each). A fourth one is the laptop that submits, a fifth one has S3 and MLflow. One run
goes through all events, `night`; each test checks one of them.
"""

import dataclasses
import os
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric

from cluster.local.servers import BUCKET, _rclone
from hemoco.results.records import run_results
from hemoco.storage.objects import list_names
from hemoco.tracking.client import connect
from hemoco.tracking.runs import RunFacts, find_run, search
from jobs.demo_data import write_digits
from jobs.options import load_recipe
from tests.helpers.canary import places_with
from tests.helpers.expected_batches import fingerprints
from tests.helpers.hosts import Host, hosts, lose_packets
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.timeout(1800)

ROOT = Path(__file__).parents[2]
SHARDS, RUNS = f"s3://{BUCKET}/digits", f"s3://{BUCKET}/runs"
CHECKPOINTS = f"{RUNS}/night/pretrain/checkpoints"
EVERY = 5
CANARY = "canary" + secrets.token_hex(16)


@dataclasses.dataclass
class Cluster:
    """The hosts, what runs on them, and what the events cost."""

    head: Host
    workers: tuple[Host, Host]
    laptop: Host
    services: Host
    folder: Path
    environment: dict[str, str]
    seen: dict[str, float] = dataclasses.field(default_factory=dict)
    """Seconds until the run continued, by the name of the event."""
    preempted_at: int = 0
    """Step of the checkpoint that the preempted host had saved."""

    def start_head(self) -> None:
        """Starts the head and waits until its job server answers."""
        self._start(
            self.head,
            *("--head", "--port", "6379", "--num-cpus", "0", "--dashboard-host", self.head.address),
            *("--temp-dir", str(self.head.shared / "ray")),
            # Ray gives up a silent node after five failed checks, 3 s apart; each waits 3 s for its
            # answer instead of 10 s, so a host that is cut off is noticed after half a minute
            RAY_health_check_timeout_ms="3000",
        )
        wait_until(lambda: self.status("/api/version") == 200, 120)

    def start_worker(self, host: Host) -> None:
        """One core of the two that this machine has."""
        self._start(host, "--address", f"{self.head.address}:6379", "--num-cpus", "1")

    def _start(self, host: Host, *words: str, **environment: str) -> None:
        ray = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--block",
            "--node-ip-address",
            host.address,
        ]
        ray += ["--object-store-memory", "100000000", "--disable-usage-stats"]
        home = {"HEMOCO_HOME": str(host.folder / "home")}
        host.start(
            *ray,
            *words,
            log=self.folder / f"{host.name}.log",
            environment=self.environment | home | environment,
        )

    def jobs(self, *words: str, log: str) -> "subprocess.Popen[bytes]":
        """Runs `python -m jobs` on the laptop."""
        home = {"HEMOCO_HOME": str(self.laptop.folder / "home")}
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                self.laptop.command(sys.executable, "-m", "jobs", *words),
                cwd=ROOT,
                env=self.environment | home,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def submit(self, *words: str, log: str) -> "subprocess.Popen[bytes]":
        """Submits a job from the laptop and follows it."""
        return self.jobs("submit", *words, "--address", f"http://{self.head.address}:8265", log=log)

    def submit_night(self, log: str) -> "subprocess.Popen[bytes]":
        """Submits the run, with the same command each time."""
        recipe = str(ROOT / "tests" / "helpers" / "night_recipe.py")
        return self.submit(
            "run", recipe, "--run", "night", "--data.shards", SHARDS, "--storage", RUNS, log=log
        )

    def status(self, path: str, token: str | None = None) -> int:
        """HTTP status of the head's answer, 0 without one.

        A token of None is the right one, an empty one is not sent.
        """
        if token is None:
            token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        return self.head.answer(8265, path, token)[0]

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")


def places() -> list[tuple[int, int]]:
    """(attempt, step) of the checkpoints that are complete."""
    complete = [
        name
        for name in list_names(CHECKPOINTS)
        if "manifest.json" in list_names(f"{CHECKPOINTS}/{name}")
    ]
    found = (re.fullmatch(r"step_(\d+)_a(\d+)", name) for name in complete)
    return sorted((int(match[2]), int(match[1])) for match in found if match)


def newest_step() -> int:
    return max((step for _, step in places()), default=0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("night")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with (
        hosts(folder, 5) as (head, first, second, laptop, services),
        pytest.MonkeyPatch.context() as patch,
    ):
        environment = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "AWS_ENDPOINT_URL": f"http://{services.address}:9000",
            "AWS_ACCESS_KEY_ID": "night",
            "AWS_SECRET_ACCESS_KEY": CANARY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_TRACKING_URI": f"http://{services.address}:5000",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for name in (
            "AWS_ENDPOINT_URL",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "MLFLOW_TRACKING_URI",
        ):
            patch.setenv(name, environment[name])
        made = Cluster(head, (first, second), laptop, services, folder, environment)
        _serve(made)
        made.start_head()
        for worker in made.workers:
            made.start_worker(worker)
        yield made


def _serve(cluster: Cluster) -> None:
    """S3 and MLflow on the fifth host; they end with it."""
    folder, address = cluster.folder / "services", cluster.services.address
    (folder / "buckets" / BUCKET).mkdir(parents=True)
    keys = {"RCLONE_AUTH_KEY": f'"night,{CANARY}"', "RCLONE_CONFIG": os.devnull}
    s3 = [_rclone(), "serve", "s3", "--addr", f"{address}:9000", str(folder / "buckets")]
    mlflow = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        address,
        "--port",
        "5000",
        "--workers",
        "1",
    ]
    mlflow += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        f"file://{folder}/a",
    ]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name, words, more in (("s3", s3, keys), ("mlflow", mlflow, quiet)):
        log = cluster.folder / f"{name}.log"
        cluster.services.start(*words, log=log, environment=cluster.environment | more)
    wait_until(cluster.services.has_s3_and_mlflow, 120)


@pytest.fixture(scope="module")
def night(cluster: Cluster) -> Cluster:
    """The run, from its submission to its table."""
    digits = cluster.folder / "digits"
    write_digits(digits, 0)
    packing = cluster.submit(
        "pack", str(digits), SHARDS, "--samples_per_shard", "500", log="pack.log"
    )
    assert packing.wait(timeout=300) == 0, cluster.log("pack.log")

    first, second = cluster.workers
    submitted = time.time()
    following = cluster.submit_night("1.log")
    _goes_on(cluster, "submitted", attempt=0)

    _kill_driver(cluster)
    assert following.wait(timeout=120) == 1
    following = cluster.submit_night("2.log")
    _goes_on(cluster, "driver killed", attempt=1)

    second.kill()
    _goes_on(cluster, "host killed", attempt=2)

    cluster.start_worker(second)
    _goes_on(cluster, "host is back", attempt=3)

    _preempt(cluster, first)
    _goes_on(cluster, "host preempted", attempt=4)

    cluster.start_worker(first)
    _goes_on(cluster, "host is back again", attempt=5)

    second.cut()
    _goes_on(cluster, "host cut off", attempt=6)
    second.heal()

    cluster.head.kill()
    for host in cluster.workers:
        host.kill()
    # `submit` gives up as soon as a new head answers that it does not know the job; without a new
    # head it does so after two minutes (submit_jobs.test_a_head_that_has_gone_is_one_clear_error)
    cluster.start_head()
    assert following.wait(timeout=300) == 1
    for host in cluster.workers:
        cluster.start_worker(host)
    following = cluster.submit_night("3.log")
    _goes_on(cluster, "head lost", attempt=7)
    lose_packets(first, times=5, seconds=1.0)
    assert following.wait(timeout=600) == 0, cluster.log("3.log")
    points = MlflowClient(cluster.environment["MLFLOW_TRACKING_URI"]).get_metric_history(
        child("pretrain").run_id, "loss"
    )
    cluster.seen["first step after submit"] = (
        min(point.timestamp for point in points) / 1000 - submitted
    )
    print("seconds until it went on:", {what: round(took) for what, took in cluster.seen.items()})
    return cluster


def _goes_on(cluster: Cluster, what: str, *, attempt: int) -> None:
    """Waits for a checkpoint of an attempt, and notes how long it took."""
    began = time.monotonic()
    wait_until(lambda: any(found >= attempt for found, _ in places()), 400)
    cluster.seen[what] = time.monotonic() - began


def _kill_driver(cluster: Cluster) -> None:
    for pid in cluster.head.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"jobs", b"run"]:
            os.kill(pid, 9)


def _preempt(cluster: Cluster, host: Host) -> None:
    """Ends a host as Kubernetes ends a pod: its preStop hook, then SIGKILL."""
    inside = [
        "nsenter",
        "-t",
        str(host.pids()[0]),
        "-m",
        "-n",
        "-u",
        sys.executable,
        "-m",
        "cluster.drain",
    ]
    done = subprocess.run(
        inside, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    cluster.preempted_at = newest_step()
    host.kill()


def child(phase: str, **tags: str) -> RunFacts:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    wanted = {"hemoco.run": "night", "hemoco.phase": phase} | {
        f"hemoco.{name}": tag for name, tag in tags.items()
    }
    found = find_run(uri, connect(uri), wanted)
    assert found is not None
    return found


def points(metric: str) -> list[Metric]:
    """All points of a metric of the pretraining in MLflow."""
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    return list(client.get_metric_history(child("pretrain").run_id, metric))


def history(metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in points(metric)]


def test_every_fault_was_survived_without_a_hand(night):
    recipe = load_recipe(str(ROOT / "tests" / "helpers" / "night_recipe.py"))
    steps = recipe.pretrain.epochs * 39  # 5,032 digits in batches of 128
    assert {step for step, _ in history("loss")} == set(range(1, steps + 1))


def test_global_batches_of_all_attempts_are_those_of_an_unbroken_run(night):
    recipe = load_recipe(str(ROOT / "tests" / "helpers" / "night_recipe.py"))
    assert set(history("batch_fingerprint")) == set(
        fingerprints(SHARDS, "train", recipe.pretrain).items()
    )


def test_no_fault_cost_more_than_the_steps_since_the_last_checkpoint(night):
    counted = Counter(step for step, _ in history("loss"))
    faults = 5  # those without time to save a checkpoint
    assert sum(count - 1 for count in counted.values()) <= faults * 2 * EVERY


def test_preemption_costs_no_step(night):
    counted = Counter(step for step, _ in history("loss"))
    assert counted[night.preempted_at] == counted[night.preempted_at + 1] == 1


def test_run_shrank_to_one_host_and_grew_again(night):
    log = night.log("2.log")
    assert "event=world_size from=2 to=1" in log
    assert "reason=grow" in log
    assert "reason=preempted" in log


def test_link_that_loses_packets_for_a_second_at_a_time_costs_no_restart(night):
    assert max(attempt for attempt, _ in places()) == 7
    assert "event=restart" not in night.log("3.log")


def test_mlflow_has_one_run_of_each_kind_and_no_orphan(night):
    uri = os.environ["MLFLOW_TRACKING_URI"]
    found = search(uri, connect(uri), {"hemoco.run": "night"})
    names = ("hemoco.phase", "hemoco.transfer", "hemoco.epoch")
    kinds = Counter(tuple(run.tags.get(name, "") for name in names) for run in found)
    assert set(kinds.values()) == {1}
    assert {run.status for run in found} == {"FINISHED"}


def test_comparison_has_every_transfer(night):
    rows = run_results(os.environ["MLFLOW_TRACKING_URI"], "night").rows
    assert {row.transfer for row in rows} == {"knn", "probe", "fine_tune"}


def test_lost_head_is_named_with_what_to_do(night):
    assert "error: lost the cluster of job night-2" in night.log("2.log")
    assert "submit run" in night.log("2.log").splitlines()[-1]


@pytest.mark.parametrize(("token", "status"), [("", 401), ("wrong", 403)])
def test_request_without_the_token_is_refused(night, token, status):
    assert night.status("/api/jobs/", token) == status


def test_secret_is_nowhere(night):
    assert places_with(CANARY, night.folder) == []
