"""All nodes of the cluster asked at once, and what their answers come to."""

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cluster.preflight import node as node_checks
from cluster.preflight.node import Finding, NodeTask, checked, judge_clock
from hemoco.errors import StorageError
from hemoco.storage.objects import join_url, list_names, remove, write_bytes
from hemoco.tracking.client import shown

_NODE_S = 180.0  # a node imports torch and mlflow first
_SHOWN = 3  # nodes in one line
_SEVERITY = {"ok": 0, "warn": 1, "FAIL": 2}


class Node(NamedTuple):
    """A node that is alive."""

    id: str
    name: str
    """For people."""
    resources: dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What a run asks of services and of each node."""

    shards: tuple[str, ...]
    """URLs of shard folders."""
    storage: str
    """URL of the folder for results."""
    tracking: str
    """URI of MLflow."""
    cache_bytes: int
    """Of the shard cache of a node."""
    shm_bytes: tuple[int, int]
    """Shared memory of one training process, and of all."""
    cuda: bool
    """Whether nodes with GPUs need a torch that can use them."""
    modules: tuple[str, ...]
    """Python modules that every node must be able to import."""


def survey(nodes: Sequence[Node], needs: Needs) -> Iterator[Finding]:
    """Has every node look at itself and at all that it must reach."""
    folder, greeting = (
        join_url(needs.storage, f".hemoco_preflight_{secrets.token_hex(4)}"),
        secrets.token_hex(8),
    )
    alone = needs.tracking.startswith("sqlite:") and len(nodes) > 1
    if alone:
        yield Finding(
            "FAIL",
            "nodes MLflow",
            f"{shown(needs.tracking)} is a file of one machine and the cluster has {len(nodes)} nodes; start "
            "`mlflow server` where all reach it and set MLFLOW_TRACKING_URI",
        )
    try:
        write_bytes(join_url(folder, "driver"), greeting.encode())
    except StorageError:  # `check_storage` has said so
        greeting = ""
    try:
        answers = _ask_nodes(
            nodes, needs, folder=folder, greeting=greeting, tracking="" if alone else needs.tracking
        )
        yield from _judge(nodes, answers)
        if greeting:
            yield _one_storage(nodes, answers, folder)
    finally:
        with contextlib.suppress(
            StorageError
        ):  # where nothing may be removed, `check_storage` has said so
            remove(folder)


def over_nodes(found: dict[str, list[Finding]]) -> Iterator[Finding]:
    """The findings of many nodes as one for each check: the worst, with the nodes that it was met at."""
    names = dict.fromkeys(each.name for findings in found.values() for each in findings)
    for name in names:
        same = [
            (node, each)
            for node, findings in found.items()
            for each in findings
            if each.name == name
        ]
        level = max((each.level for _, each in same), key=_SEVERITY.__getitem__)
        worst = [(node, each) for node, each in same if each.level == level]
        if level == "ok":
            text = f"{len(worst)} of {len(found)}: {worst[0][1].text}"
        else:
            text = "; ".join(f"{node}: {each.text}" for node, each in worst[:_SHOWN])
            text += f"; and {len(worst) - _SHOWN} more nodes" if len(worst) > _SHOWN else ""
        yield Finding(level, f"nodes {name}", text)


def compare_versions(ours: dict[str, str], theirs: dict[str, dict[str, str]]) -> Finding:
    """Versions on the nodes against the driver's; Python and Ray must be the same, others should be."""
    different: dict[str, list[str]] = {}
    for node, versions in theirs.items():
        for package, version in ours.items():
            if (there := versions.get(package, "none")) != version:
                different.setdefault(f"{package} {there} (here {version})", []).append(node)
    if not different:
        main = ", ".join(
            f"{package} {ours[package]}"
            for package in ("python", "ray", "torch")
            if package in ours
        )
        return Finding("ok", "nodes versions", f"as here: {main}")
    text = "; ".join(f"{what} on {', '.join(nodes[:_SHOWN])}" for what, nodes in different.items())
    grave = any(what.startswith(("python ", "ray ")) for what in different)
    advice = "give the nodes the versions of pyproject.toml"
    return Finding("FAIL" if grave else "warn", "nodes versions", f"{text}; {advice}")


def _judge(nodes: Sequence[Node], answers: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What the nodes' answers come to."""
    silent = [node.name for node in nodes if "findings" not in answers[node.id]]
    if silent:
        reasons = {answers[node.id]["error"] for node in nodes if "error" in answers[node.id]}
        which = ", ".join(silent[:_SHOWN])
        yield Finding("FAIL", "nodes", f"{which} cannot be looked at: {'; '.join(sorted(reasons))}")
    heard = {node.name: answers[node.id] for node in nodes if "findings" in answers[node.id]}
    if not heard:
        return
    yield compare_versions(
        node_checks.versions(), {node: answer["versions"] for node, answer in heard.items()}
    )
    found = {
        node: [Finding(*finding) for finding in answer["findings"]]
        for node, answer in heard.items()
    }
    for node, answer in heard.items():
        found[node].append(
            judge_clock(answer["ahead"], "this machine's")._replace(name="clock here")
        )
    yield from over_nodes(found)


def _one_storage(nodes: Sequence[Node], answers: dict[str, dict[str, Any]], folder: str) -> Finding:
    """Whether what the nodes wrote has come to the place that the driver reads."""

    def check() -> str:
        there = set(list_names(folder))
        wrote = [node for node in nodes if ("ok", "storage") in _levels(answers[node.id])]
        lost = [node.name for node in wrote if node.id not in there]
        if lost:
            raise StorageError(
                f"{folder.rpartition('/')[0]}: what {', '.join(lost[:_SHOWN])} wrote is not there; name an s3:// URL "
                "or a folder that all nodes share"
            )
        return f"{len(wrote)} of {len(nodes)}: what they wrote is read here"

    return checked("nodes results", check)


def _levels(answer: dict[str, Any]) -> list[tuple[str, str]]:
    """Level and name of a node's findings; none where it did not answer."""
    return [(level, name) for level, name, _ in answer.get("findings", [])]


def _ask_nodes(
    nodes: Sequence[Node], needs: Needs, *, folder: str, greeting: str, tracking: str
) -> dict[str, dict[str, Any]]:
    """What `look_at_node` says on each node, or `error`; `ahead` is how far its clock is ahead of ours in seconds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.cloudpickle.register_pickle_by_value(node_checks)
    begun, running, answers = time.time(), {}, dict[str, dict[str, Any]]()
    for node in nodes:
        task = NodeTask(
            node.id,
            needs.shards,
            folder,
            greeting,
            tracking,
            needs.cache_bytes,
            needs.shm_bytes,
            node.resources.get("GPU", 0) > 0 and needs.cuda,
            needs.modules,
        )
        pinned = NodeAffinitySchedulingStrategy(node.id, soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=pinned)(
            node_checks.look_at_node
        )
        running[remote.remote(task)] = node.id
    while running:
        ready, _ = ray.wait(list(running), timeout=max(0.0, begun + _NODE_S - time.time()))
        if not ready:
            break
        received = time.time()
        answers[running.pop(ready[0])] = _answer(ready[0], begun, received)
    for reference, node_id in running.items():
        ray.cancel(reference, force=True)
        answers[node_id] = {
            "error": f"no answer within {_NODE_S:.0f} s; is it too busy, or blocked by a firewall?"
        }
    ray.cloudpickle.unregister_pickle_by_value(node_checks)
    return answers


def _answer(reference: Any, begun: float, received: float) -> dict[str, Any]:
    import ray

    try:
        answer: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        return {"error": (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]}
    # it was told between `begun` and `received`: outside of them one of the clocks is off
    told = answer["time"]
    return answer | {"ahead": told - received if told > received else min(0.0, told - begun)}
