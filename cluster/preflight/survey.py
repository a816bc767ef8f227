"""Checks of all nodes of the cluster at once, and the findings over all nodes."""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cluster.preflight import node as node_checks
from cluster.preflight.node import Finding, NodeTask, checked, judge_clock
from hemoco.errors import StorageError, last_line
from hemoco.storage.objects import join_url, list_names, remove, write_bytes
from hemoco.tracking.client import shown

_NODE_S = 180.0  # a node imports torch and mlflow first
_SHOWN = 3  # nodes in one line
_SEVERITY = {"ok": 0, "warn": 1, "FAIL": 2}


class Node(NamedTuple):
    """A node that is alive."""

    id: str
    name: str
    """Name for messages."""
    resources: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """The needs of a run: services, and resources of each node."""

    shards: tuple[str, ...]
    """URLs of shard folders."""
    storage: str
    """URL of the folder for results."""
    tracking: str
    """URI of MLflow."""
    cache_bytes: int
    """Size of the shard cache of a node."""
    shm_bytes: tuple[int, int]
    """Shared memory of one training process, and of all."""
    cuda: bool
    """True if nodes with GPUs need a torch that can use them."""
    modules: tuple[str, ...]
    """Python modules that every node must be able to import."""


def survey(nodes: Sequence[Node], needs: Needs) -> Iterator[Finding]:
    """Lets every node check itself and the services that it must reach."""
    folder = join_url(needs.storage, f".hemoco_preflight_{secrets.token_hex(4)}")
    greeting = secrets.token_hex(8)
    tracking = needs.tracking
    if tracking.startswith("sqlite:") and len(nodes) > 1:
        tracking = ""  # the nodes would each create a file of their own
        yield Finding(
            "FAIL",
            "nodes MLflow",
            f"{shown(needs.tracking)} is a file of one machine and the cluster has {len(nodes)} "
            "nodes; start `mlflow server` where all reach it and set MLFLOW_TRACKING_URI",
        )
    try:
        write_bytes(join_url(folder, "driver"), greeting.encode())
    except StorageError:  # `check_storage` reports it
        greeting = ""
    try:
        answers = _check_nodes(nodes, needs, folder=folder, greeting=greeting, tracking=tracking)
        yield from _judge(nodes, answers)
        if greeting:
            yield _one_storage(nodes, answers, folder)
    finally:
        # if nothing may be removed there, `check_storage` reports it
        with contextlib.suppress(StorageError):
            remove(folder)


def over_nodes(findings: dict[str, list[Finding]]) -> Iterator[Finding]:
    """Joins the findings of many nodes to one for each check: the worst, with its nodes.

    Args:
        findings: findings of each node, by its name.
    """
    by_check: dict[str, list[tuple[str, Finding]]] = {}
    for node, of_node in findings.items():
        for finding in of_node:
            by_check.setdefault(finding.name, []).append((node, finding))
    for name, of_check in by_check.items():
        level = max((finding.level for _, finding in of_check), key=_SEVERITY.__getitem__)
        worst = [(node, finding.text) for node, finding in of_check if finding.level == level]
        if level == "ok":
            text = f"{len(worst)} of {len(findings)}: {worst[0][1]}"
        else:
            text = "; ".join(f"{node}: {line}" for node, line in worst[:_SHOWN])
            if len(worst) > _SHOWN:
                text += f"; and {len(worst) - _SHOWN} more nodes"
        yield Finding(level, f"nodes {name}", text)


def compare_versions(ours: dict[str, str], theirs: dict[str, dict[str, str]]) -> Finding:
    """Compares the versions on the nodes with the driver's.

    Python and Ray must be the same, the others should be.

    Args:
        ours: version of each package here.
        theirs: the same of each node, by its name.
    """
    different: dict[str, list[str]] = {}  # difference -> nodes
    for node, versions in theirs.items():
        for package, version in ours.items():
            there = versions.get(package, "none")
            if there != version:
                different.setdefault(f"{package} {there} (here {version})", []).append(node)
    if not different:
        main = [f"{name} {ours[name]}" for name in ("python", "ray", "torch") if name in ours]
        return Finding("ok", "nodes versions", f"as here: {', '.join(main)}")
    text = "; ".join(f"{what} on {', '.join(nodes[:_SHOWN])}" for what, nodes in different.items())
    grave = any(what.startswith(("python ", "ray ")) for what in different)
    advice = "give the nodes the versions of pyproject.toml"
    return Finding("FAIL" if grave else "warn", "nodes versions", f"{text}; {advice}")


def _judge(nodes: Sequence[Node], answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """Turns the answers of the nodes into findings."""
    silent = [node.name for node in nodes if "findings" not in answers[node.id]]
    if silent:
        reasons = {answers[node.id]["error"] for node in nodes if "error" in answers[node.id]}
        which = ", ".join(silent[:_SHOWN])
        yield Finding("FAIL", "nodes", f"{which} cannot be checked: {'; '.join(sorted(reasons))}")
    answered = {node.name: answers[node.id] for node in nodes if "findings" in answers[node.id]}
    if not answered:
        return
    theirs = {node: answer["versions"] for node, answer in answered.items()}
    yield compare_versions(node_checks.versions(), theirs)
    findings: dict[str, list[Finding]] = {}
    for node, answer in answered.items():
        clock = judge_clock(answer["ahead"], "this machine's")
        findings[node] = [Finding(*fields) for fields in answer["findings"]]
        findings[node].append(clock._replace(name="clock here"))
    yield from over_nodes(findings)


def _one_storage(nodes: Sequence[Node], answers: dict[str, dict[str, Any]], folder: str) -> Finding:
    """Checks that the driver finds what the nodes wrote: storage may be a folder of each node."""

    def check() -> str:
        names = set(list_names(folder))
        wrote = [node for node in nodes if ("ok", "storage") in _levels(answers[node.id])]
        lost = [node.name for node in wrote if node.id not in names]
        if lost:
            raise StorageError(
                f"{folder.rpartition('/')[0]}: what {', '.join(lost[:_SHOWN])} wrote is not there; "
                "name an s3:// URL or a folder that all nodes share"
            )
        return f"{len(wrote)} of {len(nodes)}: what they wrote is read here"

    return checked("nodes results", check)


def _levels(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns level and name of a node's findings; none if it did not answer."""
    return [(level, name) for level, name, _ in answer.get("findings", [])]


def _check_nodes(
    nodes: Sequence[Node], needs: Needs, *, folder: str, greeting: str, tracking: str
) -> dict[str, dict[str, Any]]:
    """Runs `check_node` on every node at the same time.

    Returns:
        For each node by its id: the answer of `check_node` with `ahead`, the seconds that its clock
        is ahead of ours; or `error`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # a node without this checkout could not import the module
    ray.cloudpickle.register_pickle_by_value(node_checks)
    began = time.time()
    running: dict[Any, str] = {}  # reference of the task -> id of its node
    for node in nodes:
        task = NodeTask(
            name=node.id,
            shards=needs.shards,
            folder=folder,
            greeting=greeting,
            tracking=tracking,
            cache_bytes=needs.cache_bytes,
            shm_bytes=needs.shm_bytes,
            needs_cuda=node.resources.get("GPU", 0) > 0 and needs.cuda,
            modules=needs.modules,
        )
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        # num_cpus=0: it must also run on a node that is full
        options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": pinned}
        remote = ray.remote(**options)(node_checks.check_node)
        running[remote.remote(task)] = node.id
    answers: dict[str, dict[str, Any]] = {}
    while running:
        left_s = max(0.0, began + _NODE_S - time.time())
        ready, _ = ray.wait(list(running), timeout=left_s)
        if not ready:
            break
        received = time.time()
        node_id = running.pop(ready[0])
        answers[node_id] = _answer(ready[0], began, received)
    for reference, node_id in running.items():
        ray.cancel(reference, force=True)
        answers[node_id] = {
            "error": f"no answer within {_NODE_S:.0f} s; is it too busy, or blocked by a firewall?"
        }
    ray.cloudpickle.unregister_pickle_by_value(node_checks)
    return answers


def _answer(reference: Any, began: float, received: float) -> dict[str, Any]:
    import ray

    try:
        answer: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": last_line(error)}
    # The node read its clock between `began` and `received` of ours. The clocks differ for sure
    # only by what lies outside of that.
    node_time = answer["time"]
    ahead = node_time - received if node_time > received else min(0.0, node_time - began)
    return answer | {"ahead": ahead}
