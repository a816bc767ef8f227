"""Several hosts on one machine, for root: network namespaces on a bridge, each with an address, a name, folders and
/dev/shm of its own. The test process reaches them all and they reach each other, but nothing else.

    with hosts(tmp_path, 3) as (head, first, second):
        first.run("python", "-c", "...")
        second.cut()  # from the network
        first.kill()  # all that runs there
"""

import contextlib
import dataclasses
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Host:
    """One of them; `folder` is bound over `shared`, which has the same name on all of them."""

    name: str
    address: str
    link: str
    folder: Path
    shared: Path
    started: "list[subprocess.Popen[bytes]]" = dataclasses.field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        """The words as a command of that host: its network, name and folders."""
        mount = (
            f"mount -t tmpfs -o size=1g tmpfs /dev/shm && mount --bind {self.folder} {self.shared} "
            f'&& hostname {self.name} && exec "$@"'
        )
        return ["ip", "netns", "exec", self.name, "unshare", "-mu", "sh", "-c", mount, "sh", *words]

    def start(
        self, *words: str, log: Path, environment: dict[str, str]
    ) -> "subprocess.Popen[bytes]":
        """A process of the host, that goes on in the background."""
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

    def pids(self) -> list[int]:
        """Of all its processes."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill(self) -> None:
        """The power goes off."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        while self.started:
            self.started.pop().wait()

    def cut(self) -> None:
        """Takes its cable out."""
        _ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Puts it back."""
        _ip("link", "set", self.link, "up")


def lose_packets(host: Host, *, times: int, seconds: float) -> None:
    """Loses all packets of a host for so long, so many times; netem, which loses some, is not in every kernel."""
    for _ in range(times):
        host.cut()
        time.sleep(seconds)
        host.heal()
        time.sleep(seconds)


@contextlib.contextmanager
def hosts(folder: Path, count: int) -> Iterator[tuple[Host, ...]]:
    """Makes that many; at the end of the block all that runs on them is killed, and they are gone."""
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
