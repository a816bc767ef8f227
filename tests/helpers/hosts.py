"""Several hosts on one machine, made by root.

Each is a network namespace on a bridge, with its own address, name, folders and /dev/shm. They can
reach each other and the test process, but nothing else.

    with hosts(tmp_path, 3) as (head, first, second):
        first.run("python", "-c", "...")
        second.cut()  # disconnects it
        first.kill()  # ends all its processes
"""

import contextlib
import dataclasses
import http.client
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Host:
    """One host; `folder` is mounted over `shared`, a path that is the same on all hosts."""

    name: str
    address: str
    link: str
    folder: Path
    shared: Path
    started: "list[subprocess.Popen[bytes]]" = dataclasses.field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        """Wraps a command to run on the host, with its network, name and folders."""
        mount = (
            f"mount -t tmpfs -o size=1g tmpfs /dev/shm && mount --bind {self.folder} {self.shared} "
            f'&& hostname {self.name} && exec "$@"'
        )
        return ["ip", "netns", "exec", self.name, "unshare", "-mu", "sh", "-c", mount, "sh", *words]

    def start(
        self, *words: str, log: Path, environment: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        """Starts a process on the host, in the background."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self.command(*words),
                cwd=self.shared.parent,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def answer(self, port: int, path: str, token: str = "") -> tuple[int, str]:
        """Returns status and body of what a server on the host answers to a GET; else status 0."""
        connection = http.client.HTTPConnection(self.address, port, timeout=5)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return response.status, response.read().decode(errors="replace")
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def has_s3_and_mlflow(self) -> bool:
        """Returns whether S3 and MLflow answer at the ports 9000 and 5000."""
        return all(self.answer(port, path)[0] for port, path in ((9000, "/"), (5000, "/health")))

    def pids(self) -> list[int]:
        """Returns the ids of all processes on the host."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Kills all processes at once, as a power failure does."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        while self.started:
            self.started.pop().wait()

    def cut(self) -> None:
        """Disconnects the host from the network."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Connects the host again."""
        _ip("link", "set", self.link, "up")


def lose_packets(host: Host, *, times: int, seconds: float) -> None:
    """Drops all packets of a host for some time, repeatedly.

    netem could drop a share of them, but not every kernel has it.
    """
    for _ in range(times):
        host.cut()
        time.sleep(seconds)
        host.heal()
        time.sleep(seconds)


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[tuple[Host, ...]]:
    """Makes hosts; at the end of the block their processes are killed and they are removed."""
    token = secrets.token_hex(2)
    net, bridge = f"10.77.{int(token[:2], 16)}", f"hmb{token}"
    shared = Path(f"/tmp/hm{token}")  # short: a socket's path has at most 107 bytes
    shared.mkdir()
    made = []
    _ip("link", "add", bridge, "type", "bridge")
    try:
        _ip("addr", "add", f"{net}.254/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        for number in range(1, count + 1):
            own = folder / f"host{number}"
            own.mkdir()
            host = Host(f"hm{token}{number}", f"{net}.{number}", f"hmv{token}{number}", own, shared)
            _ip("netns", "add", host.name)
            made.append(host)
            _ip(
                "link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name
            )
            _ip("link", "set", host.link, "master", bridge, "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                _ip("-n", host.name, "link", "set", link, "up")
        yield tuple(made)
    finally:
        for host in made:
            host.kill()
            _ip("netns", "del", host.name)
        _ip("link", "del", bridge)
        shared.rmdir()


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout
