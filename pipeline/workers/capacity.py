"""How many processes fit the cluster, counted node by node: a process cannot be spread over two."""

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
_POLL_S = 0.5


def fitting_workers(resources: ResourcesConfig) -> int:
    """Processes for which there is room now, on nodes that are to stay."""
    draining = state.get_draining_nodes()
    free = [free for node, free in available_resources_per_node().items() if node not in draining]
    return fitting_processes(free, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def possible_workers(resources: ResourcesConfig) -> int:
    """Processes for which there would be room if nothing else ran, on nodes that are to stay."""
    draining = state.get_draining_nodes()
    whole = [
        node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    ]
    return fitting_processes(whole, cpus=resources.cpus_per_worker, gpus=resources.gpus_per_worker)


def wait_for_room(resources: ResourcesConfig, sizes: Sequence[int], *, lost: bool) -> int:
    """How many processes to start, once they fit: those wished for, or fewer.

    A cluster that is only busy is waited for. Fewer are started where it has become too small, and after a loss, when
    others may have taken the place: the cluster gets some time to be whole again.

    Args:
        resources: of one process, and how many are wished for.
        sizes: numbers of processes that are allowed.
        lost: whether the training was running already.
    """
    wanted, needs = (
        resources.workers,
        {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker},
    )
    deadline = time.monotonic() + _REPLACEMENT_S
    # asked for as a whole, so that an autoscaler sees what is missing
    group = placement_group([{kind: need for kind, need in needs.items() if need}] * wanted)
    try:
        while not group.wait(timeout_seconds=_POLL_S):
            most = fitting_workers(resources) if lost else possible_workers(resources)
            size = max((size for size in sizes if size <= most), default=wanted)
            if size < wanted and time.monotonic() > deadline:
                logger.warning("event=world_size from=%d to=%d fitting=%d", wanted, size, most)
                return size
        return wanted
    finally:
        remove_placement_group(group)
