"""Jobs on a cluster: what is refused before anything is sent, what a job is given, how it is followed and stopped."""

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
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image
from shard_folders import write_shards
from tcp_relay import relay
from waiting import within

from cluster.checkout import CHECKOUT
from cluster.job_environment import JobSpec, job_spec, words_again
from cluster.local import local_ray
from cluster.processes import child_process, last_line, wait_until
from cluster.submit import Job, _joined
from hemoco import checkpoint, run_status
from hemoco.config import flat_params
from hemoco.data.shards import read_index
from hemoco.errors import ConfigError, ShardError, UsageError
from hemoco.storage import join_url, write_bytes
from hemoco.tracking import connect, open_run
from jobs.cli import main
from jobs.options import RunOptions, load_recipe, parse_options
from jobs.status import settings_words
from jobs.submit import Request, _announce, _stop_words, check_here, parse_request

NOWHERE = ("--address", "http://127.0.0.1:9")
RUN = ("run", "demo", "--storage", "s3://b/runs", "--data.shards", "s3://b/shards")
CANARIES = {
    name: f"canary-{name.lower()}-{secrets.token_hex(8)}"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
}
# a verb that ends at once with a long log, run as a job and followed with little patience
FOLLOW = """
import sys
from cluster.checkout import CHECKOUT
from cluster.job_environment import JobSpec, job_spec, words_again
from cluster.job_log import follow
from cluster.submit import Cluster
address, seen_at = sys.argv[1:]
known = Cluster(address).jobs("help")
job = known[0] if known else Cluster(address).submit(job_spec(address, "help", ["run", "demo", "--help"], CHECKOUT))[0]
done = follow(Cluster(seen_at), job.id, lambda text: print(text, end="", flush=True), patience_s=1.0)
print(f"\\n== {done.status} {done.exit_status}")
"""


def start_jobs(*words: str, **environment: str) -> "subprocess.Popen[str]":
    """`python -m jobs` in a process of its own: Ray reads its token once in each."""
    command = [sys.executable, "-u", "-m", "jobs", *words]
    return subprocess.Popen(
        command, cwd=CHECKOUT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_jobs(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """`python -m jobs` and what came of it."""
    return finished(start_jobs(*words, **environment))


def finished(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    with process:
        out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def api(head: str, path: str) -> requests.Response:
    """What the head answers to somebody who has its token."""
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    return requests.get(f"{head}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=30)


def jobs_of(head: str, run: str) -> list[dict[str, str]]:
    return [job for job in api(head, "/api/jobs/").json() if (job["metadata"] or {}).get("hemoco.run") == run]


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code == 401
    except requests.ConnectionError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(s3: str, tracking: str) -> Iterator[str]:
    """A Ray head with its job server on loopback, the only one of its token; nodes know the S3 server."""
    folder = Path(tempfile.mkdtemp(prefix="hh"))  # short: it holds sockets
    (folder / "token").touch(mode=0o600)
    (folder / "token").write_text(secrets.token_hex(32))
    tools = Path(sys.executable).parent
    port, *others = (free_port() for _ in range(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        command = [
            *(tools / "ray", "start", "--head", "--block", "--disable-usage-stats", "--temp-dir", folder),
            *("--port=0", "--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"),
            *(f"--dashboard-agent-listen-port={others[0]}", f"--ray-client-server-port={others[1]}"),
            *("--num-cpus=2", f"--object-store-memory={256 * 1024**2}"),
        ]
        environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
        with child_process(list(map(str, command)), log=folder / "log", environment=environment) as process:
            address = f"http://127.0.0.1:{port}"
            assert wait_until(lambda: answers(address), process, timeout_s=120), last_line(folder / "log")
            yield address
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def two_jobs(head: str, s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of two jobs, submitted at the same time.

    One packs images, with canaries for secrets. The recipe of the other does not fit its data, which only the nodes
    have the secret key for.
    """
    folder = tmp_path_factory.mktemp("images")
    for name in ("train/a/1", "train/a/2", "test/b/3"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    dest = f"{s3}/{secrets.token_hex(8)}"
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [8])
    words = ["submit", "run", "demo", "--data.shards", shards, "--storage", f"{s3}/runs", "--address", head]
    wrong = start_jobs(*words, AWS_SECRET_ACCESS_KEY="not-that-of-the-nodes")
    pack = start_jobs("submit", "pack", str(folder), dest, "--address", head, **CANARIES)
    yield {"dest": dest, "pack": finished(pack), "wrong": finished(wrong)}


@pytest.fixture
def packed(two_jobs: dict[str, Any]) -> tuple[str, str]:
    """Where to images were packed by a job, and what was printed."""
    assert two_jobs["pack"].returncode == 0, two_jobs["pack"].stderr
    return two_jobs["dest"], two_jobs["pack"].stdout + two_jobs["pack"].stderr


@pytest.fixture(scope="module")
def training(head: str, s3: str) -> Iterator[tuple[str, list[str]]]:
    """A job that pretrains for hours, begun with --fresh; its run, and the words that follow it."""
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [128])
    words = ["pretrain", "demo", "--data.shards", shards, "--pretrain.epochs", "100000", "--storage", f"{s3}/runs"]
    words = ["submit", *words, "--pretrain.knn_every_epochs", "0", "--run", "long", "--address", head]
    done = run_jobs(*words, "--fresh", "--detach")
    assert done.returncode == 0, done.stderr
    (follow,) = [line for line in done.stdout.splitlines() if line.startswith("follow ")]
    yield "long", shlex.split(follow)[4:]  # without `follow python -m jobs`
    run_jobs("stop", "long", "--address", head)


def error_of(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    """The one line that `submit` ends with, and the exit status that belongs to it."""
    assert main(["submit", *words]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_misspelt_flag_never_leaves_this_machine(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["submit", *RUN, "--pretrain.optimiser.lr", "1", *NOWHERE])
    assert ended.value.code == 2
    assert "--pretrain.optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["demo"], "on a cluster run run, pretrain, transfer, pack, preflight"),
        (["run", "demo2"], "did you mean demo?"),
        (["run", "demo"], "--storage is missing"),
        (["run", "demo", "--storage", "runs"], "runs is a path below this folder"),
        (["pretrain", "demo", "--storage", "s3://b/runs"], "--data.shards is missing"),
        ([*RUN, "--data.shards", "../shards"], "../shards is a path below this folder"),
        ([*RUN, "--out", "/tmp/x"], "--out would be a folder of the cluster"),
        (["transfer", *RUN[1:]], "transfer needs --backbone URL"),
        (["pack", "s3://b/images"], "pack needs a SOURCE and a DEST"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_sent(capsys, words, reason):
    assert reason in error_of(capsys, 2, *words, *NOWHERE)


def test_a_recipe_outside_the_checkout_is_refused(capsys, tmp_path):
    shutil.copy(CHECKOUT / "jobs" / "recipes" / "demo.py", tmp_path / "mine.py")
    assert "lies outside the checkout" in error_of(capsys, 2, "run", str(tmp_path / "mine.py"), *RUN[2:], *NOWHERE)


@pytest.mark.parametrize(
    "url",
    [
        "s3://me:hidden@b/x",
        "https://ghp-hidden@h/x",
        "https://h/x?X-Amz-Signature=hidden",
        "s3://b/AKIAABCDEFGHIJKLMNOP",
        "s3://b/hidden-word",
    ],
)
def test_a_word_that_holds_a_secret_is_refused_and_not_repeated(capsys, monkeypatch, url):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden-word")
    line = error_of(capsys, 2, *RUN[:4], "--data.shards", url, *NOWHERE)
    assert "word 6 after `submit` holds" in line and "hidden" not in line and "AKIA" not in line


def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidden@mlflow")
    line = error_of(capsys, 2, *RUN, *NOWHERE)
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in line and "hidden" not in line


@pytest.mark.parametrize(
    ("name", "value"), [("MLFLOW_TRACKING_URI", "sqlite:////x.db"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")]
)
def test_what_only_this_machine_reaches_is_refused_for_another(monkeypatch, name, value):
    for of_this_session in ("AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(of_this_session, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} is {value}, which the nodes of http://head:8265 cannot reach"):
        job_spec("http://head:8265", "r", ["run"], CHECKOUT)


def test_a_recipe_that_does_not_fit_its_data_ends_here(bucket):
    shards = write_shards(bucket, [8])
    with pytest.raises(ConfigError, match="global_batch_size"):
        check_here(parse_request([*RUN[:4], "--data.shards", shards]))


def test_shards_that_are_not_there_end_it_here(bucket):
    with pytest.raises(ShardError):
        check_here(parse_request([*RUN[:4], "--data.shards", bucket]))


@pytest.mark.parametrize("folder", ["/nodes/share/this", "file:///nodes/share/this"])
def test_a_folder_that_only_the_nodes_have_is_said_to_be_unchecked(capsys, folder):
    check_here(parse_request([*RUN[:4], "--data.shards", folder]))
    shown = capsys.readouterr().out
    assert shown.startswith("unchecked ") and shown.endswith(f"{folder}: no such folder on this machine\n")


@pytest.mark.parametrize("verb", ["pretrain", "preflight"])
def test_a_verb_is_checked_for_what_it_does(bucket, capsys, verb):
    shards = write_shards(bucket, [128])  # no split `test`, which the demo's transfers would need
    check_here(parse_request([verb, *RUN[1:4], "--data.shards", shards, "--pretrain.knn_every_epochs", "0"]))
    assert capsys.readouterr().out == ""


def test_a_preflight_is_no_job_of_the_run_that_it_is_for():
    request = parse_request(["preflight", *RUN[1:], "--run", "first"])
    assert request.run.startswith("preflight-") and request.words == ["preflight", *RUN[1:], "--run", "first"]


def test_to_go_on_is_never_to_begin_anew():
    assert words_again(["run", "demo", "--fresh", "--run", "r"]) == ["run", "demo", "--run", "r"]


def a_job(words: str) -> Job:
    return Job(id="r-1", run="r", status="RUNNING", words=words, commit="", message="", exit_status=None, started=0.0)


@pytest.mark.parametrize("running", ["run demo", "run demo --fresh"])
@pytest.mark.parametrize("words", [("run", "demo"), ("run", "demo", "--fresh")])
def test_a_running_job_is_joined_with_fresh_and_without(running, words):
    job = a_job(running)
    assert _joined(job, JobSpec(NOWHERE[1], "r", words, CHECKOUT, {})) is job


def test_who_says_fresh_and_joins_is_told_that_nothing_begins_anew(capsys):
    job = a_job("run demo --fresh")
    _announce(job, False, NOWHERE[1], Request("r", ["run", "demo", "--fresh"], None, None))
    assert f"is not done to a job that runs; first say {_stop_words(job, NOWHERE[1])}" in capsys.readouterr().out


def test_a_running_job_is_not_joined_with_other_words():
    with pytest.raises(UsageError, match=r"worked on by job r-1 with other words \(run demo --fresh\)"):
        _joined(a_job("run demo --fresh"), JobSpec(NOWHERE[1], "r", ("run", "other", "--fresh"), CHECKOUT, {}))


def test_without_an_address_it_says_what_to_give(capsys):
    assert "--address http://head:8265" in error_of(capsys, 2, *RUN)


def test_a_dashboard_in_ray_address_is_the_default(capsys, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE[1])
    assert f"{NOWHERE[1]} does not answer" in error_of(capsys, 1, *RUN)


def test_a_verb_that_runs_here_says_what_to_do_with_a_dashboard(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", NOWHERE[1])
    with pytest.raises(UsageError, match="say `python -m jobs submit` before the verb"), local_ray():
        pass


def test_another_server_is_not_taken_for_a_dashboard(capsys, s3):
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    assert "is not the dashboard of a Ray cluster" in error_of(capsys, 1, *RUN, "--address", endpoint)


def test_the_run_has_the_name_that_it_has_here():
    words = [*RUN[1:], "--pretrain.epochs", "7"]
    name = parse_request(["pretrain", *words]).run
    assert name.startswith("demo-")
    assert parse_request(["run", *words]).run == name != parse_request(["run", *words[:-2]]).run


def test_a_recipe_file_is_sent_by_its_path_in_the_checkout(monkeypatch):
    monkeypatch.chdir(CHECKOUT / "jobs")
    request = parse_request(["run", "recipes/demo.py", *RUN[2:], "--run", "r"])
    assert request.words == ["run", "jobs/recipes/demo.py", *RUN[2:], "--run", "r"]


def test_settings_become_the_words_that_set_them():
    words = ["demo", "--pretrain.epochs", "7", "--transfers.knn.inits", "random", "pretrained", "--pretrain.compile"]
    changed = parse_options("run", words, RunOptions).recipe
    found = settings_words(flat_params(changed), load_recipe("demo"))
    assert parse_options("run", ["demo", *found], RunOptions).recipe == changed


@pytest.mark.parametrize("verb", ["run", "pretrain"])
def test_the_words_that_resume_are_of_the_verb_that_began(tracking, capsys, verb):
    tags = {"hemoco.run": f"my-{verb}", "hemoco.phase": "parent", "hemoco.recipe": "demo", "hemoco.verb": verb}
    params = flat_params(load_recipe("demo"))
    open_run(tracking, connect(tracking), name="r", parent=None, tags=tags, params=params)
    assert main(["status", f"my-{verb}"]) == 0
    assert f"resume      python -m jobs {verb} demo --run my-{verb}" in capsys.readouterr().out


def test_a_demo_is_not_resumed(tracking, capsys):
    tags = {"hemoco.run": "d", "hemoco.phase": "parent", "hemoco.recipe": "demo", "hemoco.verb": "demo"}
    open_run(tracking, connect(tracking), name="d", parent=None, tags=tags, params={})
    assert main(["status", "d"]) == 0
    assert "resume      cannot be" in capsys.readouterr().out


def test_the_newest_complete_checkpoint_is_told_by_names_alone(bucket):
    for name in ("step_00000009_a0/manifest.json", "step_00000009_a10/manifest.json", "step_00000012_a0/state.pt"):
        write_bytes(join_url(bucket, name), b"")
    assert run_status.newest_complete(bucket) == join_url(bucket, "step_00000009_a10")
    assert run_status.newest_complete(join_url(bucket, "none")) is None


def test_checkpoints_have_the_names_that_are_looked_for():
    found = (checkpoint._FOLDER.pattern, checkpoint._MANIFEST)
    assert (run_status._CHECKPOINT.pattern, run_status._MANIFEST) == found


@pytest.mark.parametrize(("token", "reason"), [("", "(401) and none was sent"), ("0" * 64, "(403)")])
def test_a_missing_and_a_wrong_token_are_told_apart(head, tmp_path, token, reason):
    (tmp_path / "token").write_text(token)
    mode = "token" if token else "disabled"
    path = str(tmp_path / "token")
    done = run_jobs("submit", *RUN, "--address", head, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN_PATH=path)
    assert done.returncode == 1
    assert reason in done.stderr and "Traceback" not in done.stderr


def test_a_job_does_what_the_words_do_here(packed):
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
    logs = [file.read_bytes().decode(errors="replace") for file in (session / "logs").rglob("*") if file.is_file()]
    assert any(packed[0] in log for log in logs)
    assert not [word for word in secret for text in (jobs, packed[1], *logs) if word in text]


def test_a_job_is_told_the_commit_and_where_things_are(head, packed):
    (job,) = [job for job in api(head, "/api/jobs/").json() if packed[0] in job["entrypoint"] and job["submission_id"]]
    given = job["runtime_env"]["env_vars"]
    assert given["AWS_ENDPOINT_URL"] == os.environ["AWS_ENDPOINT_URL"]
    assert job["metadata"]["hemoco.commit"].removesuffix("-dirty") == given["HEMOCO_GIT_COMMIT"][:12]
    assert "AWS_ACCESS_KEY_ID" not in given


def test_wrong_usage_on_the_cluster_is_wrong_usage_here(two_jobs):
    done = two_jobs["wrong"]
    assert done.returncode == 2
    assert "unchecked   whether the recipe fits its data" in done.stdout
    assert "error: global_batch_size is" in done.stdout  # the job's log
    assert "failed with exit status 2: the log above says why" in done.stderr


def follow(head: str, seen_at: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", FOLLOW, head, seen_at]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_a_broken_connection_loses_and_repeats_no_line(head):
    with relay(head) as between:
        between.cuts = [(b"/logs/tail", 9000), (b"/logs/tail", 20000)]
        done = follow(head, between.address)
        assert between.cuts == []
    log = api(head, "/api/jobs/help-1/logs").json()["logs"]
    assert len(log) > 20000
    assert done.stdout == f"{log}\n== SUCCEEDED 0\n"


@pytest.mark.slow
def test_a_head_that_has_gone_is_one_clear_error(head):
    with relay(head) as between:
        between.cuts = [(b"/logs/tail", 9000)]
        between.lost_after_cut = True
        done = follow(head, between.address)
    assert done.stderr.splitlines()[0].endswith("trying again for 1 s")
    assert f"HeadLost: {between.address}: the connection has broken" in done.stderr


@pytest.mark.slow
def test_the_same_words_join_and_ctrl_c_leaves_the_job_running(head, training):
    run, words = training
    with start_jobs(*words) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "Running entrypoint" in line:  # the first line of the log
                process.send_signal(signal.SIGINT)
    assert process.returncode == 1
    assert "joined " in "".join(lines) and "detached    the job goes on" in "".join(lines)
    assert [job["status"] for job in jobs_of(head, run)] == ["RUNNING"]


@pytest.mark.slow
def test_other_words_under_a_running_name_are_refused(training):
    done = run_jobs(*training[1], "--pretrain.seed", "7")
    assert done.returncode == 2
    assert "run 'long' is being worked on by job long-1 with other words" in done.stderr


@pytest.mark.slow
def test_a_preflight_from_inside_the_cluster_sees_its_nodes(head, s3, bucket):
    shards = write_shards(f"{bucket}/shards", [128])
    words = ["preflight", "demo", "--data.shards", shards, "--storage", f"{bucket}/runs", "--run", "long"]
    done = run_jobs("submit", *words, "--address", head)
    assert "nodes software" in done.stdout and "ok    nodes shards" in done.stdout, done.stdout + done.stderr
    assert "job preflight-" in done.stderr and done.returncode == 1  # no test split for the transfers
    assert "FAIL  upload" not in done.stdout


@pytest.mark.slow
def test_status_tells_of_jobs_that_mlflow_does_not_know(head, packed):
    shown = run_jobs("status", "--address", head).stdout
    assert "pack-" in shown and "SUCCEEDED" in shown


@pytest.mark.slow
def test_stopping_an_unknown_run_names_those_that_run(head, tracking, training):
    done = run_jobs("stop", "nobody", "--address", head)
    assert done.returncode == 2
    assert f"run 'nobody' has no job on {head}; runs with a job that is not ended: long" in done.stderr


@pytest.mark.slow
def test_stop_ends_the_job_and_says_how_to_resume(head, training):
    done = run_jobs("stop", "long", "--address", head)
    assert done.returncode == 0, done.stderr
    assert "long-1: STOPPED" in done.stdout and "resume      python -m jobs submit pretrain demo" in done.stdout
    assert "--fresh" in jobs_of(head, "long")[0]["entrypoint"] and "--fresh" not in done.stdout
    assert [job["status"] for job in jobs_of(head, "long")] == ["STOPPED"]


@pytest.mark.slow
def test_a_stopped_training_is_killed_in_mlflow_and_resumes_in_a_new_job(head, s3):
    shards = write_shards(f"{s3}/{secrets.token_hex(8)}", [128])
    words = ["pretrain", "demo", "--data.shards", shards, "--pretrain.epochs", "100000", "--storage", f"{s3}/runs"]
    words = [*words, "--pretrain.knn_every_epochs", "0", "--pretrain.checkpoint_every_steps", "10", "--run", "again"]
    run_jobs("submit", *words, "--address", head, "--detach")
    assert within(200, lambda: "step_0000" in run_jobs("status", "again").stdout)
    assert run_jobs("stop", "again", "--address", head).returncode == 0
    assert "status      KILLED" in run_jobs("status", "again").stdout
    run_jobs("submit", *words, "--address", head, "--detach")
    assert within(200, lambda: "resumed from step" in api(head, "/api/jobs/again-2/logs").json()["logs"])
    assert run_jobs("stop", "again", "--address", head).returncode == 0
