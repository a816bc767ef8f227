"""Everything of machines and services that can fail later, checked now: storage, MLflow, Ray and each of its nodes.

Works on plain facts, URLs and numbers. Every check is a `Finding`; one that fails leaves the others to run.
"""

import os
import secrets
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from cluster.local.ray import local_ray
from cluster.preflight.node import Finding, checked, disk_check, shm_check, size
from cluster.preflight.survey import Needs, Node, survey
from hemoco.capacity import fitting_processes
from hemoco.data.shards.index import ShardIndexes, shard_url
from hemoco.errors import HemocoError, ShardError, StorageError
from hemoco.storage.fetch import FetchCounts, fetch_range
from hemoco.storage.objects import join_url, list_names, read_bytes, remove, write_bytes
from hemoco.tracking.client import ask, connect, shown
from hemoco.tracking.runs import log_artifact_bytes, open_run
from hemoco.tracking.tags import Tag

_READ_S = 10.0


class Group(NamedTuple):
    """Processes that must run at the same time."""

    name: str
    processes: int
    fewest: int
    """With which it starts where there is no room for all."""
    cpus: int
    """Of each, on one node; as `gpus`."""
    gpus: int


def check_shards(url: str, indexes: ShardIndexes) -> Finding:
    """Whether index and first shard of a folder can be read, the shard as the stream will read it."""

    def check() -> str:
        index = indexes.at(url)
        if not index.shards:
            raise ShardError(f"{url}: its index names no shards; pack the data again")
        first = shard_url(url, index.shards[0])
        fetch_range(first, 0, min(512, index.shards[0].bytes), FetchCounts(), budget_s=_READ_S)
        images, total = (
            sum(s.samples for s in index.shards),
            size(sum(s.bytes for s in index.shards)),
        )
        splits = ", ".join(index.splits)
        return f"{url}: {len(index.shards)} shards, {images} images, {total}, {splits}; index sha {index.digest[:12]}"

    return checked("shards", check)


def check_storage(url: str) -> Iterator[Finding]:
    """Whether the storage can be listed, written, read and cleaned up; each needs a right of its own."""
    probe = join_url(url, f".hemoco_preflight_{secrets.token_hex(4)}")

    def say(action: Any, text: str) -> str:
        action()
        return f"{url}: {text}"

    def read() -> None:
        if read_bytes(probe) != b"preflight":
            raise StorageError(f"{probe}: what was written does not come back")

    yield checked("storage list", lambda: say(lambda: list_names(url), "listed"))
    written = checked(
        "storage write", lambda: say(lambda: write_bytes(probe, b"preflight"), "written")
    )
    yield written
    if written.level == "ok":
        yield checked("storage read", lambda: say(read, "read"))
        yield checked("storage remove", lambda: say(lambda: remove(probe), "removed"))


def check_tracking(uri: str) -> Finding:
    """Whether MLflow takes a run and an artifact; the run is deleted again, which leaves it in MLflow's trash."""

    def check() -> str:
        run_id = open_run(
            uri,
            connect(uri),
            name="preflight",
            parent=None,
            tags={Tag.PHASE: "preflight"},
            params={},
        )
        try:
            log_artifact_bytes(uri, run_id, "preflight.txt", b"preflight")
        finally:
            ask(uri, lambda client: client.delete_run(run_id))
        return (
            f"{shown(uri)}{_server_version(uri)}: a run was made, got an artifact, and was deleted"
        )

    return checked("MLflow", check)


def check_machine(groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    """Where RAY_ADDRESS is not set: this machine, on which a command would start its own Ray; none is started now."""
    cores = max(2, len(os.sched_getaffinity(0)))
    yield Finding(
        "ok",
        "Ray",
        f"RAY_ADDRESS is not set: the command will start a Ray on this machine, with {cores} cores",
    )
    yield from check_room(
        [{"CPU": float(cores), "GPU": float(_local_gpus() if needs.cuda else 0)}], groups
    )
    yield disk_check(needs.cache_bytes)
    if (shm := shm_check(*needs.shm_bytes)) is not None:
        yield shm


def check_cluster(address: str, groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    """The cluster at RAY_ADDRESS, and what its nodes find when they are asked."""
    if address.startswith(("http://", "https://")):
        yield Finding(
            "FAIL",
            "Ray",
            f"RAY_ADDRESS is {address}, a dashboard: nodes can only be looked at from inside the cluster; run "
            "preflight on its head, with RAY_ADDRESS=HOST:PORT",
        )
        return
    try:
        with local_ray():
            yield from _inside(address, groups, needs)
    except HemocoError as error:
        yield Finding("FAIL", "Ray", str(error))


def check_room(nodes: Sequence[dict[str, float]], groups: Iterable[Group]) -> Iterator[Finding]:
    """Whether each group fits nodes with these resources if nothing else runs; no process is spread over two nodes."""
    largest = {
        kind: max((node.get(kind, 0.0) for node in nodes), default=0.0) for kind in ("CPU", "GPU")
    }
    for group in groups:
        asked = f"{group.processes} x {_amount(group.cpus, group.gpus)}"
        room = fitting_processes(nodes, cpus=group.cpus, gpus=group.gpus)
        name = f"room {group.name}"
        if room >= group.processes:
            yield Finding("ok", name, f"{asked}: the nodes have room for {room}")
        elif room >= group.fewest:
            yield Finding(
                "warn",
                name,
                f"{asked}: the nodes have room for {room} only; it would run with fewer",
            )
        else:
            best = _amount(int(largest["CPU"]), int(largest["GPU"]))
            yield Finding(
                "FAIL",
                name,
                f"{asked}: the nodes have room for {room} (the largest have {best}); ask for less of "
                f"{group.name}'s workers, cpus or gpus, or start more nodes",
            )


def check_token(address: str) -> Finding:
    """Whether the cluster turns away who has no token, found by asking it without one."""
    import grpc  # type: ignore[import-untyped]  # with Ray; a second to import

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_READ_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return Finding("ok", "Ray token", "who has no token is turned away")
            return Finding(
                "warn",
                "Ray token",
                f"whether {address} asks for a token is unknown: {error.code().name}",
            )
    return Finding(
        "warn",
        "Ray token",
        f"{address} answers without a token: whoever reaches it can run code there; start all nodes with "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


def _inside(address: str, groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    import ray

    nodes = [
        Node(
            node["NodeID"], f"{node['NodeManagerAddress']} {node['NodeID'][:6]}", node["Resources"]
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    total = _amount(
        *(int(sum(node.resources.get(kind, 0.0) for node in nodes)) for kind in ("CPU", "GPU"))
    )
    free = ray.available_resources()
    idle = _amount(int(free.get("CPU", 0)), int(free.get("GPU", 0)))
    yield Finding(
        "ok",
        "Ray",
        f"{address}: {len(nodes)} node{'s' if len(nodes) > 1 else ''} alive, {total}; idle now: {idle}",
    )
    yield check_token(str(ray.get_runtime_context().gcs_address))
    yield from check_room([node.resources for node in nodes], groups)
    yield from survey(nodes, needs)


def _local_gpus() -> int:
    """GPUs that a Ray started here would find."""
    import torch

    return torch.cuda.device_count()


def _amount(cpus: int, gpus: int) -> str:
    return f"{cpus} CPU and {gpus} GPU" if gpus else f"{cpus} CPU"


def _server_version(uri: str) -> str:
    """The version that an MLflow server tells, in words; empty where none is told."""
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_READ_S) as answer:
            return f" (MLflow {answer.read(20).decode(errors='replace').strip()})"
    except OSError:  # it may ask for a password there
        return ""
