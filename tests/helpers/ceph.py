"""Ceph's S3 server on loopback, a second S3 server that shares no code with the first.

It needs the Debian packages ceph-mon, ceph-osd and radosgw (16.2 was tried), and neither systemd
nor cephadm nor a manager. There is one process of each kind, and objects are in memory. It ends
with the block that started it, as the servers of `cluster.local.servers` do.
"""

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from cluster.local.processes import child_process, last_line, wait_until
from cluster.local.servers import S3Server

_START_S = 180
_CONFIG = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon initial members = a
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
osd objectstore = memstore
memstore device bytes = 2147483648
public network = 127.0.0.0/8
run dir = {folder}
admin socket =
log file =
log to stderr = true
mon data = {folder}/mon
osd data = {folder}/osd
keyring = {folder}/admin.key
[osd]
keyring = {folder}/osd.key
[client.rgw]
keyring = {folder}/rgw.key
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw run sync thread = false
"""


@contextlib.contextmanager
def ceph_server(folder: Path) -> Iterator[S3Server]:
    """Starts the server with a new random key and no bucket; `add_user` makes further keys.

    Raises:
        RuntimeError: a package is missing, or one of its processes does not start.
    """
    missing = [
        name for name in ("ceph", "ceph-mon", "ceph-osd", "radosgw") if shutil.which(name) is None
    ]
    if missing:
        raise RuntimeError(
            f"{missing[0]} is missing: "
            "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"
        )
    v2, v1, port = _free_ports(3)
    fsid = str(uuid.uuid4())
    config = _CONFIG.format(fsid=fsid, v2=v2, v1=v1, port=port, folder=folder)
    (folder / "ceph.conf").write_text(config)
    with contextlib.ExitStack() as stack:
        _make_monitor(folder, fsid, f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]")
        stack.enter_context(_daemon(folder, "ceph-mon", "-i", "a"))
        _make_store(folder)
        stack.enter_context(_daemon(folder, "ceph-osd", "-i", "0"))
        _ask(
            folder,
            "auth",
            "get-or-create",
            "client.rgw",
            "mon",
            "allow rwx",
            "osd",
            "allow rwx",
            "-o",
            "rgw.key",
        )
        gateway = stack.enter_context(_daemon(folder, "radosgw", "-n", "client.rgw"))
        log = folder / "radosgw.log"
        if not wait_until(lambda: _listens(port), gateway, timeout_s=_START_S):
            raise RuntimeError(f"radosgw did not start: {last_line(log)}; the logs are in {folder}")
        access_key, secret_key = add_user(folder, "owner")
        yield S3Server(f"http://127.0.0.1:{port}", access_key, secret_key, gateway, log)


def add_user(folder: Path, name: str) -> tuple[str, str]:
    """Returns access key and secret key of a new user, who has access to no bucket."""
    words = ("user", "create", "--uid", name, "--display-name", name)
    made = json.loads(_run(folder, "radosgw-admin", "-c", "ceph.conf", "-n", "client.rgw", *words))
    return made["keys"][0]["access_key"], made["keys"][0]["secret_key"]


def _make_monitor(folder: Path, fsid: str, address: str) -> None:
    """Makes the keys and the empty database of the monitor, which connects the other processes."""
    everything = ("--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *")
    _run(folder, "ceph-authtool", "-C", "mon.key", "-g", "-n", "mon.", "--cap", "mon", "allow *")
    _run(folder, "ceph-authtool", "-C", "admin.key", "-g", "-n", "client.admin", *everything)
    _run(folder, "ceph-authtool", "mon.key", "--import-keyring", "admin.key")
    _run(folder, "monmaptool", "--create", "--addv", "a", address, "--fsid", fsid, "monmap")
    _run(
        folder,
        "ceph-mon",
        "-c",
        "ceph.conf",
        "--mkfs",
        "-i",
        "a",
        "--monmap",
        "monmap",
        "--keyring",
        "mon.key",
    )


def _make_store(folder: Path) -> None:
    """Makes the key and the empty store of the process that has the objects."""
    name = str(uuid.uuid4())
    (folder / "osd").mkdir()
    _ask(folder, "osd", "new", name)  # waits for the monitor
    _run(folder, "ceph-authtool", "-C", "osd.key", "-g", "-n", "osd.0")
    _ask(
        folder,
        "auth",
        "add",
        "osd.0",
        "osd",
        "allow *",
        "mon",
        "allow profile osd",
        "-i",
        "osd.key",
    )
    _run(folder, "ceph-osd", "-c", "ceph.conf", "-i", "0", "--mkfs", "--osd-uuid", name)


def _daemon(
    folder: Path, program: str, *words: str
) -> contextlib.AbstractContextManager["subprocess.Popen[bytes]"]:
    command = [program, "-c", str(folder / "ceph.conf"), *words, "-f"]
    return child_process(command, log=folder / f"{program}.log", environment=dict(os.environ))


def _ask(folder: Path, *words: str) -> None:
    _run(folder, "ceph", "-c", "ceph.conf", "--connect-timeout", str(_START_S), *words)


def _run(folder: Path, *words: str) -> str:
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, timeout=_START_S, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(words[:3])}: {done.stderr.strip()[-500:]}; the logs are in {folder}"
        )
    return done.stdout


def _listens(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
