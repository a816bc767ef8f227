"""Jobs on a real Ray head: their environment, and how they are followed, joined and stopped."""

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from cluster.local.processes import child_process, last_line, wait_until
from cluster.submit.checkout import CHECKOUT
from hemoco.data.shards.index import read_index
from tests.helpers.shard_folders import write_shards
from tests.helpers.tcp_relay import relay
from tests.helpers.waiting import within

CANARIES = {
    name: f"canary-{name.lower()}-{secrets.token_hex(8)}"
    for name in (
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_PASSWORD",
        "MLFLOW_TRACKING_TOKEN",
    )
}
# a command that ends at once with a long log, run as a job and followed with little patience
FOLLOW = """
import sys
from cluster.submit import log as job_log
from cluster.submit.checkout import CHECKOUT
from cluster.submit.environment import job_spec
from cluster.submit.client import Cluster
address, seen_at, job_log._QUIET_S = *sys.argv[1:3], float(sys.argv[3])
jobs = Cluster(address).jobs("help")
if not jobs:
    spec = job_spec(address, "help", ["run", "demo", "--help"], CHECKOUT)
    jobs = [Cluster(address).submit(spec)[0]]
show = lambda text: print(text, end="", flush=True)
done = job_log.follow(Cluster(seen_at), jobs[0].id, show, patience_s=1.0)
print(f"\\n== {done.status} {done.exit_status}")
"""


def start_jobs(*words: str, **environment: str) -> "subprocess.Popen[str]":
    """Starts `python -m jobs` in a process of its own: Ray reads its token once in a process."""
    command = [sys.executable, "-u", "-m", "jobs", *words]
    return subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_jobs(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Runs `python -m jobs` to its end."""
    return finished(start_jobs(*words, **environment))


def finished(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    with process:
        try:
            out, err = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()  # else leaving the block would wait for it
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def api(head: str, path: str) -> requests.Response:
    """The answer of the head to a request with its token."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    return requests.get(f"{head}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30)


def jobs_of(head: str, run: str) -> list[dict[str, str]]:
    return [
        job
        for job in api(head, "/api/jobs/").json()
        if (job["metadata"] or {}).get("hemoco.run") == run
    ]


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code == 401
    except requests.ConnectionError:
        return False


def free_ports(count: int) -> list[int]:
    """Free ports, all different: each is held until the last one is known."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def head(s3: str, tracking: str) -> Iterator[str]:
    """A Ray head with a job server on loopback and a token of its own; nodes know the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="hh"))  # short: it holds sockets
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    tools = Path(sys.executable).parent
    port, *others = free_ports(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        command = [
            *(
                tools / "ray",
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
                "--temp-dir",
                folder,
            ),
            *(
                "--port=0",
                "--min-worker-port=0",
                "--max-worker-port=0",
                "--node-ip-address=127.0.0.1",
            ),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
            *(
                f"--dashboard-agent-listen-port={others[0]}",
                f"--ray-client-server-port={others[1]}",
            ),
            *("--num-cpus=2", f"--object-store-memory={256 * 1024**2}"),
        ]
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        with child_process(
            list(map(str, command)), log=folder / "log", environment=environment
        ) as process:
            address = f"http://127.0.0.1:{port}"
            assert wait_until(lambda: answers(address), process, timeout_s=120), last_line(
                folder / "log"
            )
            yield address
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def two_jobs(
    head: str, s3: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The results of two jobs that were submitted at the same time.

    One packs images, with canaries for secrets. The recipe of the other does not fit its data, and
    only the nodes have the secret key of that data.
    """
    folder = tmp_path_factory.mktemp("images")
    for name in ("train/a/1", "train/a/2", "test/b/3"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    dest = f"{s3}/{secrets.token_hex(8)}"
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [8])
    words = [
        "submit",
        "run",
        "demo",
        "--data.shards",
        shards,
        "--storage",
        f"{s3}/runs",
        "--address",
        head,
    ]
    wrong = start_jobs(*words, AWS_SECRET_ACCESS_KEY="not-that-of-the-nodes")
    pack = start_jobs("submit", "pack", str(folder), dest, "--address", head, **CANARIES)
    yield {"dest": dest, "pack": finished(pack), "wrong": finished(wrong)}


@pytest.fixture
def packed(two_jobs: dict[str, Any]) -> tuple[str, str]:
    """The URL to which a job packed images, and its output."""
    assert two_jobs["pack"].returncode == 0, two_jobs["pack"].stderr
    return two_jobs["dest"], two_jobs["pack"].stdout + two_jobs["pack"].stderr


@pytest.fixture(scope="module")
def training(head: str, s3: str, two_jobs: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """A job that pretrains for hours, begun with --fresh: its run, and the command that follows it.

    It begins after the two jobs: it takes both cores, and they would wait for one.
    """
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [128])
    words = [
        "pretrain",
        "demo",
        "--data.shards",
        shards,
        "--pretrain.epochs",
        "100000",
        "--storage",
        f"{s3}/runs",
    ]
    words = [
        "submit",
        *words,
        "--pretrain.knn_every_epochs",
        "0",
        "--run",
        "long",
        "--address",
        head,
    ]
    done = run_jobs(*words, "--fresh", "--detach")
    assert done.returncode == 0, done.stderr
    (follow,) = [line for line in done.stdout.splitlines() if line.startswith("follow ")]
    yield "long", shlex.split(follow)[4:]  # without `follow python -m jobs`
    run_jobs("stop", "long", "--address", head)


@pytest.mark.parametrize(
    ("token", "reason"), [("", "(401) and none was sent"), ("0" * 64, "(403)")]
)
def test_a_missing_and_a_wrong_token_are_told_apart(head, tmp_path, token, reason):
    (tmp_path / "token").write_text(token)
    run = ("run", "demo", "--storage", "s3://b/runs", "--data.shards", "s3://b/shards")
    mode = "token" if token else "disabled"
    path = str(tmp_path / "token")
    done = run_jobs("submit", *run, "--address", head, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH=path)
    assert done.returncode == 1
    assert reason in done.stderr and "Traceback" not in done.stderr


def test_a_job_does_what_the_command_does_here(packed):
    dest, printed = packed
    assert read_index(dest).splits == ("test", "train")
    assert f"{dest}: 2 shards" in printed and "done after" in printed


def test_no_secret_of_here_or_of_the_nodes_is_kept_by_the_cluster(head, packed):
    secret = [
        *CANARIES.values(),
        os.environ["AWS_SECRET_ACCESS_KEY"],
        Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text(),
    ]
    jobs = api(head, "/api/jobs/").text
    assert packed[0] in jobs and "env_vars" in jobs  # it is the listing with all that was given
    session = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent / "session_latest"
    logs = [
        file.read_bytes().decode(errors="replace")
        for file in (session / "logs").rglob("*")
        if file.is_file()
    ]
    assert any(packed[0] in log for log in logs)
    assert not [word for word in secret for text in (jobs, packed[1], *logs) if word in text]


def test_a_job_is_told_the_commit_and_where_things_are(head, packed):
    (job,) = [
        job
        for job in api(head, "/api/jobs/").json()
        if packed[0] in job["entrypoint"] and job["submission_id"]
    ]
    given = job["runtime_env"]["env_vars"]
    assert given["AWS_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]
    assert (
        job["metadata"]["hemoco.commit"].removesuffix("-dirty") == given["HEMOCO_GIT_COMMIT"][:12]
    )
    assert "AWS_ACCESS_KEY_ID" not in given


def test_wrong_usage_on_the_cluster_is_wrong_usage_here(two_jobs):
    done = two_jobs["wrong"]
    assert done.returncode == 2
    assert "unchecked   whether the recipe fits its data" in done.stdout
    assert "error: global_batch_size is" in done.stdout  # the job's log
    assert "failed with exit status 2: the log above shows why" in done.stderr


def follow(head: str, seen_at: str, quiet_s: float = 10.0) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", FOLLOW, head, seen_at, str(quiet_s)]
    return subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_broken_connection_loses_and_repeats_no_line(head):
    with relay(head) as between:
        between.cuts = [(b"/logs/tail", 9000), (b"/logs/tail", 20000)]
        done = follow(head, between.address)
        assert between.cuts == []
    log = api(head, "/api/jobs/help-1/logs").json()["logs"]
    assert len(log) > 20000
    assert done.stdout == f"{log}\n== SUCCEEDED 0\n"


def test_a_job_that_ends_in_silence_loses_no_line(head):
    done = follow(head, head, quiet_s=0.05)  # Ray looks for new lines once a second
    log = api(head, "/api/jobs/help-1/logs").json()["logs"]
    assert done.stdout == f"{log}\n== SUCCEEDED 0\n"


def test_a_head_that_has_gone_is_one_clear_error(head):
    with relay(head) as between:
        between.cuts = [(b"/logs/tail", 9000)]
        between.lost_after_cut = True
        done = follow(head, between.address)
    assert done.stderr.splitlines()[0].endswith("trying again for 1 s")
    assert f"HeadLost: {between.address}: the connection has broken" in done.stderr


def test_the_same_command_joins_and_ctrl_c_leaves_the_job_running(head, training):
    run, words = training
    with start_jobs(*words) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Running entrypoint" in line:  # the first line of the log
                process.send_signal(signal.SIGINT)
    assert process.returncode == 1
    assert "joined " in "".join(lines) and "detached    the job is still running" in "".join(lines)
    assert [job["status"] for job in jobs_of(head, run)] == ["RUNNING"]


def test_another_command_under_a_running_name_is_refused(training):
    done = run_jobs(*training[1], "--pretrain.seed", "7")
    assert done.returncode == 2
    assert "job long-1 works on run 'long' with another command" in done.stderr


def test_a_preflight_from_inside_the_cluster_sees_its_nodes(head, s3, bucket):
    shards = write_shards(f"{bucket}/shards", [128])
    words = [
        "preflight",
        "demo",
        "--data.shards",
        shards,
        "--storage",
        f"{bucket}/runs",
        "--run",
        "long",
    ]
    done = run_jobs("submit", *words, "--address", head)
    assert "nodes software" in done.stdout and "ok    nodes shards" in done.stdout, (
        done.stdout + done.stderr
    )
    assert (
        "job preflight-" in done.stderr and done.returncode == 1
    )  # no test split for the transfers
    assert "FAIL  upload" not in done.stdout


def test_status_tells_of_jobs_that_mlflow_does_not_know(head, packed):
    shown = run_jobs("status", "--address", head).stdout
    assert "pack-" in shown and "SUCCEEDED" in shown


def test_stopping_an_unknown_run_names_those_that_run(head, tracking, training):
    done = run_jobs("stop", "nobody", "--address", head)
    assert done.returncode == 2
    assert f"run 'nobody' has no job on {head}; runs with an active job: long" in done.stderr


def test_stop_ends_the_job_and_says_how_to_resume(head, training):
    done = run_jobs("stop", "long", "--address", head)
    assert done.returncode == 0, done.stderr
    assert (
        "long-1: STOPPED" in done.stdout
        and "resume      python -m jobs submit pretrain demo" in done.stdout
    )
    assert "--fresh" in jobs_of(head, "long")[0]["entrypoint"] and "--fresh" not in done.stdout
    assert [job["status"] for job in jobs_of(head, "long")] == ["STOPPED"]


def test_a_stopped_training_is_killed_in_mlflow_and_resumes_in_a_new_job(head, s3):
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [128])
    words = [
        "pretrain",
        "demo",
        "--data.shards",
        shards,
        "--pretrain.epochs",
        "100000",
        "--storage",
        f"{s3}/runs",
    ]
    words = [
        *words,
        "--pretrain.knn_every_epochs",
        "0",
        "--pretrain.checkpoint_every_steps",
        "10",
        "--run",
        "again",
    ]
    run_jobs("submit", *words, "--address", head, "--detach")
    assert within(200, lambda: "step_0000" in run_jobs("status", "again").stdout)
    assert run_jobs("stop", "again", "--address", head).returncode == 0
    assert "status      KILLED" in run_jobs("status", "again").stdout
    run_jobs("submit", *words, "--address", head, "--detach")
    assert within(
        200, lambda: "resumed from step" in api(head, "/api/jobs/again-2/logs").json()["logs"]
    )
    assert run_jobs("stop", "again", "--address", head).returncode == 0
