"""`python -m jobs preflight`: it runs all checks, prints a line for each, and names each fault."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
import s3fs

from cluster.preflight.checks import (
    Group,
    check_cluster,
    check_room,
    check_storage,
    check_token,
    check_tracking,
)
from cluster.preflight.node import (
    Finding,
    NodeTask,
    check_node,
    clock_check,
    disk_check,
    judge_clock,
    shm_check,
)
from cluster.preflight.survey import compare_versions, over_nodes
from hemoco.config import FineTuneConfig, PretrainConfig, Recipe, StreamConfig, ViewsConfig
from hemoco.data.stream import loader
from hemoco.errors import StorageError
from hemoco.storage.objects import list_names, read_bytes, remove
from hemoco.tracking.client import ask, connect
from jobs.cli import main
from jobs.verbs import preflight
from tests.helpers.preflight_recipe import RECIPE
from tests.helpers.shard_folders import write_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "tiny.py").write_text(RECIPE)
    return str(tmp_path / "tiny.py")


@pytest.fixture(scope="module")
def shards(s3: str) -> str:
    return write_shards(f"{s3}/preflight-shards", [40, 40])


@pytest.fixture
def forget() -> Iterator[None]:
    """Clears fsspec's cache of clients, whose arguments do not contain the keys."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def web_server(status: int, body: bytes = b"", **headers: str) -> Iterator[str]:
    """Runs a server with the same answer to every request; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
            self.close_connection = True

        do_HEAD = do_PUT = do_DELETE = do_GET

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def lines(capsys: pytest.CaptureFixture[str], level: str) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(level)]


def test_all_checks_run_and_say_what_they_found(recipe, shards, bucket, tracking, capsys):
    words = [
        "preflight",
        recipe,
        "--data.shards",
        shards,
        "--storage",
        bucket,
        "--transfers.cells.metric",
        "voc",
    ]
    assert main(words) == 1
    shown = capsys.readouterr()
    found = [line[:22].split(maxsplit=1) for line in shown.out.splitlines()]
    names = [name.strip() for level, name in found if level == "ok"]
    storage = ["storage list", "storage write", "storage read", "storage remove"]
    assert names[:4] == ["shards", "fit pretrain", "fit knn", "storage list"]
    assert names[3:] == [
        *storage,
        "clock",
        "MLflow",
        "Ray",
        "room pretrain",
        "room knn",
        "room cells",
        "disk",
        "shm",
    ]
    assert [name.strip() for level, name in found if level == "FAIL"] == ["fit cells"]
    assert shown.err == f"error: 1 of {len(found)} checks failed\n"


def test_what_is_written_into_the_storage_is_removed(bucket):
    found = {each.name: each.level for each in check_storage(bucket)}
    assert found == dict.fromkeys(
        ("storage list", "storage write", "storage read", "storage remove"), "ok"
    )
    assert list_names(bucket) == []


def test_doubts_of_the_recipe_are_warnings(recipe, shards, tracking, tmp_path, capsys):
    main(["preflight", recipe, "--data.shards", shards, "--storage", str(tmp_path)])
    warned = lines(capsys, "warn  fit pretrain")
    assert any("pretrain.moco.queue_length is 64 for 80 images" in line for line in warned)


def test_a_wrong_bucket_of_the_shards_leaves_the_other_checks_to_run(
    recipe, bucket, tracking, capsys
):
    assert main(["preflight", recipe, "--data.shards", "s3://nowhere/x", "--storage", bucket]) == 1
    out = capsys.readouterr().out
    assert (
        "FAIL  shards           s3://nowhere/x/unfinished: bucket 'nowhere' does not exist" in out
    )
    assert "ok    storage write" in out and "ok    MLflow" in out


def test_missing_shards_are_a_failed_check_and_no_wrong_usage(recipe, tmp_path, tracking, capsys):
    assert main(["preflight", recipe, "--storage", str(tmp_path)]) == 1
    assert any("--data.shards is missing" in line for line in lines(capsys, "FAIL  fit pretrain"))


def test_a_storage_that_cannot_be_is_one_line(recipe, shards, tracking, capsys):
    assert main(["preflight", recipe, "--data.shards", shards, "--storage", "ftp://host/x"]) == 1
    assert "error: ftp://host/x: scheme ftp:// is not supported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        (
            "AWS_SECRET_ACCESS_KEY",
            "wrong",
            r"SignatureDoesNotMatch\); .* not the secret of the key",
        ),
        ("AWS_ACCESS_KEY_ID", "NOBODY", r"InvalidAccessKeyId\); .* does not know this key"),
        ("AWS_ENDPOINT_URL", "127.0.0.1:9000", "must look like https://host:port"),
        (
            "AWS_ENDPOINT_URL",
            "http://127.0.0.1:9",
            r"check that http://127\.0\.0\.1:9 can be reached",
        ),
    ],
)
def test_faults_of_the_access_are_told_apart(bucket, forget, monkeypatch, variable, value, advice):
    monkeypatch.setenv(variable, value)
    with pytest.raises(StorageError, match=advice):
        list_names(bucket)


@pytest.mark.parametrize("status", [404, 403, 405, 501])
def test_a_server_that_is_not_s3_is_named(s3, forget, monkeypatch, status):
    with web_server(status, b"<html>") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(
            StorageError,
            match=f"{endpoint} answers {status} without a reason, as no S3 server does",
        ):
            list_names(s3)


@pytest.mark.parametrize(
    ("status", "code"), [(301, "PermanentRedirect"), (400, "AuthorizationHeaderMalformed")]
)
@pytest.mark.parametrize("touch", [read_bytes, list_names])
def test_a_wrong_region_names_the_right_one(s3, forget, monkeypatch, status, code, touch):
    body = f"<Error><Code>{code}</Code><Message>?</Message></Error>".encode()
    with web_server(status, body, **{"x-amz-bucket-region": "eu-west-1"}) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(
            StorageError, match=rf"region us-east-1 \({code}\); set AWS_DEFAULT_REGION to eu-west-1"
        ):
            touch(f"{s3}/k")


def test_a_storage_that_cannot_be_written_is_listed_all_the_same(tmp_path):
    (tmp_path / "file").write_text("")
    found = {
        each.name: each.level for each in check_storage((tmp_path / "file" / "below").as_uri())
    }
    assert found == {"storage list": "ok", "storage write": "FAIL"}


def test_the_run_that_tests_mlflow_is_deleted(tracking):
    assert check_tracking(tracking).level == "ok"
    left = ask(
        tracking,
        lambda client: client.search_runs([connect(tracking)], "tags.`hemoco.phase` = 'preflight'"),
    )
    assert list(left) == []


def test_an_mlflow_that_does_not_answer_is_named():
    found = check_tracking("http://127.0.0.1:9")
    assert found.level == "FAIL" and "it does not answer; start the server" in found.text


ROOMS = [
    (Group("a", 2, 1, 1, 0), [{"CPU": 2.0}], "ok"),
    (Group("a", 2, 1, 3, 0), [{"CPU": 4.0}, {"CPU": 4.0}], "ok"),
    (
        Group("a", 2, 1, 3, 0),
        [{"CPU": 5.0}, {"CPU": 2.0}],
        "warn",
    ),  # 7 cores, but no second node with 3
    (Group("a", 2, 2, 3, 0), [{"CPU": 5.0}, {"CPU": 2.0}], "FAIL"),
    (Group("a", 1, 1, 3, 0), [{"CPU": 2.0}, {"CPU": 2.0}], "FAIL"),
    (Group("a", 2, 2, 1, 1), [{"CPU": 64.0}, {"CPU": 1.0, "GPU": 8.0}], "FAIL"),
    (Group("a", 8, 8, 1, 1), [{"CPU": 64.0}, {"CPU": 8.0, "GPU": 8.0}], "ok"),
    (Group("a", 1, 1, 1, 0), [], "FAIL"),
]


@pytest.mark.parametrize(("group", "nodes", "level"), ROOMS)
def test_a_process_must_find_room_on_one_node(group, nodes, level):
    assert [found.level for found in check_room(nodes, [group])] == [level]


def test_one_line_stands_for_all_nodes_and_names_the_worst():
    found = {
        f"node{i}": [Finding("ok", "disk", "fine"), Finding("ok", "shm", "fine")] for i in range(6)
    }
    for number in range(5):
        found[f"node{number}"][0] = Finding("FAIL", "disk", f"full {number}")
    assert list(over_nodes(found)) == [
        Finding(
            "FAIL", "nodes disk", "node0: full 0; node1: full 1; node2: full 2; and 2 more nodes"
        ),
        Finding("ok", "nodes shm", "6 of 6: fine"),
    ]


@pytest.mark.parametrize(
    ("package", "level"), [("python", "FAIL"), ("ray", "FAIL"), ("torch", "warn")]
)
def test_other_versions_on_a_node_are_named(package, level):
    ours = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"}
    found = compare_versions(ours, {"a": ours, "b": ours | {package: "0.1"}})
    assert (found.level, f"{package} 0.1 (here {ours[package]}) on b" in found.text) == (
        level,
        True,
    )
    assert compare_versions(ours, {"a": ours}).level == "ok"


@pytest.mark.parametrize(
    ("seconds", "level"), [(0.4, "ok"), (-29, "ok"), (40, "warn"), (-700, "FAIL")]
)
def test_a_clock_is_judged_by_what_s3_allows(seconds, level):
    assert judge_clock(seconds, "the S3 server's").level == level


def test_the_clock_is_read_off_the_s3_server(bucket, forget, monkeypatch):
    assert clock_check((bucket,)).level == "ok"
    listing = b"<ListBucketResult></ListBucketResult>"
    with web_server(200, listing, Date="Tue, 01 Jan 2030 00:00:00 GMT") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        found = clock_check((bucket,))
    assert found.level == "FAIL" and "behind the S3 server's" in found.text
    assert clock_check(("file:///x",)) is None


def test_a_shard_cache_larger_than_the_disk_is_refused():
    assert disk_check(0).level == disk_check(10**6).level == "ok"
    found = disk_check(10**18)
    assert (
        found.level == "FAIL"
        and "stream.disk_cache_bytes is 1000000000.0 GB: lower it" in found.text
    )


def test_shared_memory_is_compared_with_that_of_one_process_and_of_all():
    levels = [shm_check(*need).level for need in ((0, 0), (0, 10**18), (10**18, 10**18))]
    assert levels == ["ok", "warn", "FAIL"]


def test_shared_memory_is_that_of_the_loaders_buffers():
    assert preflight._BUFFERS == loader._BUFFERS
    pretrain = PretrainConfig(views=ViewsConfig(size=8), stream=StreamConfig(workers=1))
    transfers = {name: FineTuneConfig(size=16, workers=2, global_batch_size=64) for name in "ab"}
    one, every = preflight._shared_memory(Recipe(name="r", pretrain=pretrain, transfers=transfers))
    assert one == 2 * 4 * 256 * 3 * 8**2
    assert every == 2 * 4 * 64 * 3 * 16**2


def test_a_node_without_a_dependency_is_told_what_to_install(tracking, bucket):
    task = NodeTask(
        "n", (), f"{bucket}/p", "", tracking, 0, (0, 0), False, ("no_such_module", "json")
    )
    found = {name: (level, text) for level, name, text in check_node(task)["findings"]}
    assert found["software"][0] == "FAIL"
    assert "cannot import no_such_module (No module named" in found["software"][1]
    assert found["storage"][0] == found["MLflow"][0] == "ok"
    remove(bucket)


def test_a_storage_that_is_another_place_on_a_node_is_found(tmp_path):
    task = NodeTask("n", (), (tmp_path / "p").as_uri(), "hello", "", 0, (0, 0), False, ())
    found = {name: text for _, name, text in check_node(task)["findings"]}
    assert "is not the same folder as here: name an s3:// URL" in found["storage"]


def test_a_cluster_that_does_not_answer_is_one_failed_check(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    (found,) = check_cluster("127.0.0.1:9", [], None)
    assert found.level == "FAIL" and "nothing answers there; start the cluster" in found.text


def test_the_address_of_a_dashboard_says_where_to_run_it():
    (found,) = check_cluster("http://head:8265", [], None)
    assert found.level == "FAIL" and "from inside the cluster" in found.text


def test_a_cluster_that_takes_everybody_is_warned_of():
    method = grpc.unary_unary_rpc_method_handler(lambda request, context: b"")
    server = grpc.server(ThreadPoolExecutor(1))
    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": method}
    )
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    found = check_token(f"127.0.0.1:{port}")
    server.stop(None).wait()
    assert found.level == "warn" and "whoever reaches it can run code there" in found.text


def test_a_recipe_that_would_not_travel_is_named(
    recipe, shards, tmp_path, tracking, monkeypatch, capsys
):
    words = ["preflight", recipe, "--data.shards", shards, "--storage", str(tmp_path)]
    main(words)
    assert "lies outside the checkout" in lines(capsys, "warn  upload")[0]
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    main(words)
    assert "lies outside the checkout" in lines(capsys, "FAIL  upload")[0]


def test_the_checks_of_a_node_need_only_the_standard_library_to_be_read():
    # without site-packages: ray pickles the checks by reference, and they must be importable on a
    # node whose dependencies are not known to be there
    read = (
        f"import sys; sys.path.append({str(ROOT)!r}); import cluster.preflight.node; "
        "print('hemoco' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", read], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\n", "")
