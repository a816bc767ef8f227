"""Secrets of the environment appear in no file, message or log, and not in MLflow."""

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import pytest
from mlflow import MlflowClient

from cluster.local.servers import S3Server, s3_environment, s3_server
from tests.helpers.canary import places_with

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
ROOT = Path(__file__).parents[2]
CANARIES = {
    "AWS_SESSION_TOKEN": "canary-of-the-session+token/1==",
    "WRONG_SECRET": "canary-of-a-wrong+secret/2",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-the-password:@/3",
    "URI_PASSWORD": "canary-of-a-password-in-a-uri",
}
RAY_TOKEN = "canary-of-the-token-of-ray"


class _Refusing(http.server.BaseHTTPRequestHandler):
    """Answers like an MLflow server with basic-auth that received a wrong password."""

    asked: list[str]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Authorization", ""))
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b"You are not authenticated. Please see https://www.mlflow.org/docs/latest/auth/index.html"
        self.send_response(401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET


class Walk(NamedTuple):
    """Result of tests/helpers/secrets_walk.py."""

    output: str
    folder: Path
    """Folder of all written files: S3 server and its log, MLflow, $HEMOCO_HOME, temporary files."""
    server: S3Server
    asked: list[str]
    """Authorization headers of the requests to the MLflow server that refuses."""


@pytest.fixture(scope="module")
def refusing() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Refusing,), {"asked": asked})
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory, refusing: tuple[str, list[str]]) -> Walk:
    folder, (uri, asked) = tmp_path_factory.mktemp("walk"), refusing
    (folder / "tmp").mkdir()
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(RAY_TOKEN)
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments(max_results=1)
    with s3_server(folder) as server:
        own = {
            "HEMOCO_HOME": str(folder / "home"),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(ROOT),
        }
        own |= {
            "MLFLOW_TRACKING_USERNAME": "someone",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
        }
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.helpers.secrets_walk",
                "s3://hemoco/a",
                uri,
                f"sqlite:///{folder}/mlflow.db",
            ],
            env=os.environ | s3_environment(server) | CANARIES | own,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "WALKED" in output, output[-3000:]
    return Walk(output, folder, server, asked)


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SESSION_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "WRONG_SECRET",
        "MLFLOW_TRACKING_PASSWORD",
        "URI_PASSWORD",
        "RAY_TOKEN",
    ],
)
def test_a_secret_is_in_nothing_that_was_written_or_printed(walk: Walk, name: str):
    secrets = CANARIES | {"RAY_TOKEN": RAY_TOKEN, "AWS_SECRET_ACCESS_KEY": walk.server.secret_key}
    assert places_with(secrets[name], walk.folder, walk.output) == []


def test_the_walk_used_the_secrets_and_met_the_errors(walk: Walk):
    password = f"someone:{CANARIES['MLFLOW_TRACKING_PASSWORD']}".encode()
    assert f"Basic {base64.b64encode(password).decode()}" in walk.asked
    assert walk.output.count("access refused") >= 4 and "MLFLOW_TRACKING_PASSWORD" in walk.output


def test_no_signature_that_opens_an_object_is_printed_or_written(walk: Walk):
    assert places_with("X-Amz-Signature=", walk.folder, walk.output) == []


def test_a_server_shows_its_secret_key_in_no_repr(walk: Walk):
    assert places_with(walk.server.secret_key, repr(walk.server), str(walk.server)) == []


SECRET = "a+secret/of some=30 characters"


@pytest.mark.parametrize("before", ["", "x", "xy", "xyz"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, bytes.hex, bytes])
def test_a_search_finds_a_secret_in_every_encoding(before, encode):
    encoded = encode(f"{before}{SECRET}{before}".encode())
    assert places_with(SECRET, encoded)


@pytest.mark.parametrize(
    "text", [quote(SECRET, safe=""), quote(SECRET), json.dumps({"a": SECRET}), f"<{SECRET}>"]
)
def test_a_search_finds_a_secret_in_urls_and_json(text):
    assert places_with(SECRET, text) and not places_with(SECRET + "x", text)


def test_a_search_looks_into_folders_and_archives(tmp_path):
    (tmp_path / "a").mkdir()
    with zipfile.ZipFile(tmp_path / "a" / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c.txt", SECRET * 100)
    (found,) = places_with(SECRET, tmp_path)
    assert "b.zip:c.txt (plain)" in found


def test_a_search_that_would_prove_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file"):
        places_with(SECRET, tmp_path)
    with pytest.raises(ValueError, match="12 or more"):
        places_with("short", b"short")
