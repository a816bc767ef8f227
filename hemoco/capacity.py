"""How many processes fit the nodes of a cluster."""

from collections.abc import Iterable, Mapping


def fitting_processes(nodes: Iterable[Mapping[str, float]], *, cpus: int, gpus: int) -> int:
    """The number of equal processes that nodes have room for; none is spread over two nodes.

    Args:
        nodes: resources of each node by Ray's names, `CPU` and `GPU`: its free ones, or all that it has.
        cpus: cores of a process.
        gpus: GPUs of a process.
    """
    needs = {kind: need for kind, need in (("CPU", cpus), ("GPU", gpus)) if need}
    return sum(
        int(min(node.get(kind, 0.0) // need for kind, need in needs.items())) for node in nodes
    )
