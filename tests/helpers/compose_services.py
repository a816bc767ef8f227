r"""Runs services of compose.yaml without containers, in their own namespaces, under their names.

    unshare --net --mount --pid --fork --kill-child --mount-proc \
        python -m tests.helpers.compose_services FOLDER IMAGE POSTGRES

FOLDER is empty, IMAGE is an environment with the image's packages, and POSTGRES has the server's
programs. Prints the results as JSON. Commands, environment and health checks are those of the file;
PostgreSQL itself is the machine's.
"""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.helpers.deploy_files import COMPOSE, DEPLOY, ROOT, image_variables

_DEADLINE_S = 240
_AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
_SUBMIT = (
    "ray",
    "job",
    "submit",
    "--address",
    "http://head:8265",
    "--",
    "python",
    "-m",
    "jobs",
    "recipes",
)
_LOG_TO_MLFLOW = """
from mlflow import MlflowClient
client = MlflowClient()
run = client.create_run(client.create_experiment("deploy")).info.run_id
client.log_metric(run, "top1", 0.5)
client.log_text(run, "hello", "hello.txt")
print(client.get_run(run).data.metrics["top1"], [file.path for file in client.list_artifacts(run)])
"""


class Stack:
    """The running services, with new secrets."""

    def __init__(self, folder: Path, image: Path, postgres: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        asked = set(re.findall(r"\$\{(\w+):\?", (DEPLOY / "compose.yaml").read_text()))
        self.secrets = {name: secrets.token_hex(16) for name in asked}
        path = f"{image / 'bin'}:{postgres}:/usr/bin:/bin"
        places = {
            "PATH": path,
            "HOME": str(folder),
            "HEMOCO_HOME": str(folder / "cache"),
            "RAY_TMPDIR": "/run/ray",
        }
        self.environment = image_variables() | places

    def filled(self, text: str) -> str:
        """Fills variables into a text of the file, as compose does."""
        given = re.sub(
            r"\$\{(\w+)(?::[?-][^}]*)?\}", lambda found: self.secrets.get(found[1], ""), text
        )
        return given.replace("/objects", str(self.folder / "objects"))

    def variables(self, service: str) -> dict[str, str]:
        given = COMPOSE["services"][service]["environment"]
        return self.environment | {name: self.filled(str(value)) for name, value in given.items()}

    def start_database(self) -> None:
        """Starts PostgreSQL with the user, password and database that its image would make."""
        data, password = self.folder / "data", self.folder / "password"
        variables = self.variables("database")
        data.mkdir()
        password.write_text(variables["POSTGRES_PASSWORD"])
        for path in (data, password):
            shutil.chown(path, "postgres", "postgres")
        user = ("--username", variables["POSTGRES_USER"])
        init = ("initdb", "--pgdata", data, *user, "--pwfile", password, "--auth", "scram-sha-256")
        init += ("--encoding", "UTF8", "--locale", "C.UTF-8")  # as its image does
        subprocess.run(
            [*_AS_POSTGRES, *init], env=self.environment, check=True, stdout=subprocess.DEVNULL
        )
        self._background(
            "database",
            [*_AS_POSTGRES, "postgres", "-D", str(data), "-k", str(data)],
            self.environment,
        )
        self.wait("database")
        known = self.environment | {"PGPASSWORD": variables["POSTGRES_PASSWORD"]}
        subprocess.run(
            ["createdb", "--host=127.0.0.1", *user, variables["POSTGRES_DB"]], env=known, check=True
        )

    def start(self, service: str) -> None:
        command = [self.filled(word) for word in COMPOSE["services"][service]["command"]]
        self._background(service, command, self.variables(service))
        self.wait(service)

    def wait(self, service: str) -> None:
        """Waits until the service's own health check succeeds."""
        check, variables = (
            COMPOSE["services"][service]["healthcheck"]["test"][1:],
            self.variables(service),
        )
        deadline = time.monotonic() + _DEADLINE_S
        while subprocess.run(check, env=variables, capture_output=True, check=False).returncode:
            if self.processes[service].poll() is not None or time.monotonic() > deadline:
                log = (self.folder / f"{service}.log").read_text(errors="replace")
                sys.exit(f"{service} did not become healthy: {log[-2000:]}")
            time.sleep(0.5)

    def ask(self, *command: str) -> str:
        """Runs a command as the driver and returns its output, with errors if it fails."""
        done = subprocess.run(
            command, env=self.variables("driver"), cwd=ROOT, capture_output=True, text=True
        )
        return done.stdout + (done.stderr if done.returncode else "")

    def _background(self, service: str, command: list[str], variables: dict[str, str]) -> None:
        with (self.folder / f"{service}.log").open("w") as log:
            self.processes[service] = subprocess.Popen(
                command, env=variables, cwd=ROOT, stdout=log, stderr=log
            )


def own_network(folder: Path) -> None:
    """Sets up loopback, on which every service has its name, and a separate /run."""
    names = [*COMPOSE["services"], os.uname().nodename, "localhost"]
    (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
    for command in (
        "ip link set lo up",
        f"mount --bind {folder / 'hosts'} /etc/hosts",
        "mount -t tmpfs tmpfs /run",
    ):
        subprocess.run(command.split(), check=True)


def status(url: str) -> int:
    try:
        return int(urllib.request.urlopen(url, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


def main(folder: Path, image: Path, postgres: Path) -> None:
    own_network(folder)
    stack = Stack(folder, image, postgres)
    stack.start_database()
    config = COMPOSE["services"]["mlflow"]["configs"][0]
    Path(config["target"]).parent.mkdir()
    Path(config["target"]).write_text(stack.filled(COMPOSE["configs"][config["source"]]["content"]))
    for service in ("s3", "mlflow", "head"):
        stack.start(service)
    found = {
        "mlflow without a password": status(
            "http://mlflow:5000/api/2.0/mlflow/experiments/search?max_results=1"
        ),
        "ray without a token": status("http://head:8265/api/jobs/"),
        "mlflow": stack.ask("python", "-c", _LOG_TO_MLFLOW),
        "artifacts": [
            path.name for path in (folder / "objects" / "hemoco" / "mlflow").rglob("*.txt")
        ],
        "job": stack.ask(*_SUBMIT),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
