"""Number of processes that fit the cluster, counted by node: a process runs on a single one."""

import logging
import time
from collections.abc import Sequence

import ray
from ray._private.state import available_resources_per_node, state
from ray.util.placement_group import placement_group, remove_placement_group

from hemoco.capacity import fitting_processes
from hemoco.config import ResourcesConfig

logger = logging.getLogger(__name__)

_REPLACEMENT_S = 20.0
"""Seconds that the cluster has to replace what it lost, before a training starts smaller."""
_POLL_S = 0.5


def fitting_workers(resources: ResourcesConfig) -> int:
    """Returns how many processes fit the free resources of the nodes that are not draining."""
    draining = state.get_draining_nodes()
    by_node = available_resources_per_node()
    free = [node_resources for node, node_resources in by_node.items() if node not in draining]
    return fitting_processes(free, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def possible_workers(resources: ResourcesConfig) -> int:
    """Returns how many processes would fit the nodes that are not draining if nothing else ran."""
    draining = state.get_draining_nodes()
    total = [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]
    return fitting_processes(total, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def wait_for_capacity(resources: ResourcesConfig, sizes: Sequence[int], *, lost: bool) -> int:
    """Waits until the requested processes fit the cluster, or fewer have to do.

    A first start waits as long as other work occupies the cluster. It is smaller than requested
    only if the cluster itself is too small. A restart after a loss is smaller also if other work
    has taken the resources. In both cases the cluster has `_REPLACEMENT_S` to recover first.

    Args:
        resources: resources of one process, and the requested number of processes.
        sizes: allowed numbers of processes.
        lost: whether this is a restart.

    Returns:
        The number of processes to start.
    """
    requested = resources.workers
    bundle: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        bundle["GPU"] = resources.gpus_per_worker
    deadline = time.monotonic() + _REPLACEMENT_S
    # One placement group for all processes, so that an autoscaler sees everything that is missing.
    group = placement_group([bundle] * requested)
    try:
        while not group.wait(timeout_seconds=_POLL_S):
            most = fitting_workers(resources) if lost else possible_workers(resources)
            size = max((size for size in sizes if size <= most), default=requested)
            if size < requested and time.monotonic() > deadline:
                logger.warning("event=world_size from=%d to=%d fitting=%d", requested, size, most)
                return size
        return requested
    finally:
        remove_placement_group(group)
