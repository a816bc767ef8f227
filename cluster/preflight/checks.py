"""Checks of everything that could fail later: storage, MLflow, Ray and each of its nodes.

The checks take URLs and numbers, never configs. Each returns a `Finding`; one that fails does not
stop the others.
"""

import os
import secrets
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

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
    """Processes with which it starts if there is no room for all."""
    cpus: int
    """Cores of each process, all on one node."""
    gpus: int
    """GPUs of each process, on the same node."""


def check_shards(url: str, indexes: ShardIndexes) -> Finding:
    """Checks that the index and the first shard of a folder can be read, as the stream reads it."""

    def check() -> str:
        index = indexes.at(url)
        if not index.shards:
            raise ShardError(f"{url}: its index names no shards; pack the data again")
        first = shard_url(url, index.shards[0])
        fetch_range(first, 0, min(512, index.shards[0].bytes), FetchCounts(), budget_s=_READ_S)
        images = sum(shard.samples for shard in index.shards)
        total = size(sum(shard.bytes for shard in index.shards))
        return (
            f"{url}: {len(index.shards)} shards, {images} images, {total}, "
            f"{', '.join(index.splits)}; index sha {index.digest[:12]}"
        )

    return checked("shards", check)


def check_storage(url: str) -> Iterator[Finding]:
    """Checks that the storage can be listed, written, read and cleaned up.

    Object stores have a separate permission for each.
    """
    probe = join_url(url, f".hemoco_preflight_{secrets.token_hex(4)}")

    def list_folder() -> str:
        list_names(url)
        return f"{url}: listed"

    def write() -> str:
        write_bytes(probe, b"preflight")
        return f"{url}: written"

    def read() -> str:
        if read_bytes(probe) != b"preflight":
            raise StorageError(f"{probe}: other bytes are read than were written")
        return f"{url}: read"

    def remove_probe() -> str:
        remove(probe)
        return f"{url}: removed"

    yield checked("storage list", list_folder)
    written = checked("storage write", write)
    yield written
    if written.level == "ok":
        yield checked("storage read", read)
        yield checked("storage remove", remove_probe)


def check_tracking(uri: str) -> Finding:
    """Checks that MLflow accepts a run and an artifact.

    The run is deleted again; MLflow keeps it among the deleted runs.
    """

    def check() -> str:
        experiment_id = connect(uri)
        tags = {Tag.PHASE: "preflight"}
        run_id = open_run(uri, experiment_id, name="preflight", parent=None, tags=tags, params={})
        try:
            log_artifact_bytes(uri, run_id, "preflight.txt", b"preflight")
        finally:
            ask(uri, lambda client: client.delete_run(run_id))
        version = _server_version(uri)
        return f"{shown(uri)}{version}: a run was created, got an artifact, and was deleted"

    return checked("MLflow", check)


def check_machine(groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    """Checks this machine, on which a command starts its own Ray if RAY_ADDRESS is not set.

    No Ray is started now.
    """
    cores = max(2, len(os.sched_getaffinity(0)))
    yield Finding(
        "ok",
        "Ray",
        f"RAY_ADDRESS is not set: the command will start a Ray on this machine, with {cores} cores",
    )
    gpus = _local_gpus() if needs.cuda else 0
    yield from check_room([{"CPU": float(cores), "GPU": float(gpus)}], groups)
    yield disk_check(needs.cache_bytes)
    shm = shm_check(*needs.shm_bytes)
    if shm is not None:
        yield shm


def check_cluster(address: str, groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    """Checks the cluster at RAY_ADDRESS, and each of its nodes from inside."""
    if address.startswith(("http://", "https://")):
        yield Finding(
            "FAIL",
            "Ray",
            f"RAY_ADDRESS is {address}, a dashboard: nodes can only be checked from inside the "
            "cluster; run preflight on its head, with RAY_ADDRESS=HOST:PORT",
        )
        return
    try:
        with local_ray():
            yield from _inside(address, groups, needs)
    except HemocoError as error:
        yield Finding("FAIL", "Ray", str(error))


def check_room(nodes: Sequence[dict[str, float]], groups: Iterable[Group]) -> Iterator[Finding]:
    """Checks that each group fits nodes with these resources if nothing else runs.

    A process never uses two nodes.
    """
    largest_cpu = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
    largest_gpu = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    for group in groups:
        requested = f"{group.processes} x {_amount(group.cpus, group.gpus)}"
        capacity = fitting_processes(nodes, cpus=group.cpus, gpus=group.gpus)
        name = f"room {group.name}"
        if capacity >= group.processes:
            yield Finding("ok", name, f"{requested}: the nodes have room for {capacity}")
        elif capacity >= group.fewest:
            yield Finding(
                "warn",
                name,
                f"{requested}: the nodes have room for {capacity} only; it would run with fewer",
            )
        else:
            largest = _amount(int(largest_cpu), int(largest_gpu))
            yield Finding(
                "FAIL",
                name,
                f"{requested}: the nodes have room for {capacity} (the largest have {largest}); "
                f"lower the workers, cpus or gpus of {group.name}, or start more nodes",
            )


def check_token(address: str) -> Finding:
    """Checks that the cluster refuses a request without a token."""
    # imported late: it takes a second; it is a dependency of Ray
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")(b"", timeout=_READ_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return Finding("ok", "Ray token", "requests without the token are refused")
            return Finding(
                "warn",
                "Ray token",
                f"it is not known whether {address} requires a token: {error.code().name}",
            )
    return Finding(
        "warn",
        "Ray token",
        f"{address} answers without a token: whoever reaches it can run code there; start all "
        "nodes with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH",
    )


def _inside(address: str, groups: Sequence[Group], needs: Needs) -> Iterator[Finding]:
    import ray

    nodes = []
    for node in ray.nodes():
        if node["Alive"]:
            name = f"{node['NodeManagerAddress']} {node['NodeID'][:6]}"
            nodes.append(Node(node["NodeID"], name, node["Resources"]))
    cpus = sum(node.resources.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.resources.get("GPU", 0.0) for node in nodes)
    total = _amount(int(cpus), int(gpus))
    free = ray.available_resources()
    idle = _amount(int(free.get("CPU", 0)), int(free.get("GPU", 0)))
    alive = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} alive"
    yield Finding("ok", "Ray", f"{address}: {alive}, {total}; idle now: {idle}")
    yield check_token(str(ray.get_runtime_context().gcs_address))
    yield from check_room([node.resources for node in nodes], groups)
    yield from survey(nodes, needs)


def _local_gpus() -> int:
    """Counts the GPUs that a Ray started here would find."""
    import torch

    return torch.cuda.device_count()


def _amount(cpus: int, gpus: int) -> str:
    return f"{cpus} CPU and {gpus} GPU" if gpus else f"{cpus} CPU"


def _server_version(uri: str) -> str:
    """Returns " (MLflow VERSION)"; empty if the server does not report its version."""
    if not uri.startswith(("http://", "https://")):
        return ""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/version", timeout=_READ_S) as answer:
            return f" (MLflow {answer.read(20).decode(errors='replace').strip()})"
    except OSError:  # servers with passwords may refuse this request
        return ""
