"""Private APIs of Ray that need a cluster; tests/unit/test_private_apis.py lists them."""

from pathlib import Path

import ray

from cluster.local.ray import ray_logs


def test_what_is_free(ray_cluster):
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    assert free.keys() == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert all(
        0 <= resources.get("CPU", 0) <= ray.cluster_resources()["CPU"]
        for resources in free.values()
    )


def test_draining(ray_cluster):
    from ray._private.state import state

    assert ray.nodes()[0]["NodeID"] not in state.get_draining_nodes()


def test_temp_dir(ray_cluster):
    logs = ray_logs().removeprefix("/")
    assert list(Path("/").glob(logs)), (
        "Ray keeps sockets and logs in the folder that `init` was given"
    )
