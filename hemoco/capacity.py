"""The number of processes that fit the nodes of a cluster."""

from collections.abc import Iterable, Mapping


def fitting_processes(nodes: Iterable[Mapping[str, float]], *, cpus: int, gpus: int) -> int:
    """Counts the equal processes that fit the nodes; a process never spans two nodes.

    Args:
        nodes: resources of each node under Ray's names `CPU` and `GPU`; either its free
            resources or all of them, whichever the caller wants to fill.
        cpus: cores per process.
        gpus: GPUs per process.
    """
    needs = {kind: need for kind, need in (("CPU", cpus), ("GPU", gpus)) if need}
    processes = 0
    for node in nodes:
        processes += int(min(node.get(kind, 0.0) // need for kind, need in needs.items()))
    return processes
