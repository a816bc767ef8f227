"""Private APIs of other packages that the code relies on.

Each lives in one module and has one test, which fails when a new version of ray, torch or
torchvision changes it. `test_the_list_is_complete` searches the code for private names, so none is
used without an entry here. Tests marked (services) are in
tests/services/test_private_apis_of_ray.py.

hemoco/foreach.py
    torch `_foreach_*`: test_foreach
hemoco/models/batch_norm.py
    torch `_BatchNorm`: test_batch_norm
    torch `_BatchNorm._check_input_dim`: test_check_input_dim
hemoco/data/transforms.py
    torch `aten._upsample_bilinear2d_aa`: test_upsample
hemoco/transfer/detection/detector.py
    torchvision `_skip_resize`: test_skip_resize
cluster/local/ray.py
    ray `init(_temp_dir=)`: test_temp_dir (services)
    ray, the name of a logger: test_cleaner_logger
cluster/submit/client.py
    ray `_do_request`: test_do_request
cluster/submit/checkout.py
    ray `_dir_travel`, `_get_excludes`: test_packaging
pipeline/workers/group.py
    ray `_register_sigint_handler`: test_sigint_handler
    ray `_base_exc`: test_base_exc
    ray, the name of an exception class: test_startup_timeout
pipeline/workers/capacity.py
    ray `available_resources_per_node`: test_what_is_free (services)
    ray `state.get_draining_nodes`: test_draining (services)
"""

import ast
import importlib
import inspect
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import torch
from torch import nn
from torch.nn import functional

from hemoco import foreach
from hemoco.models.batch_norm import BatchNorm, SplitBatchNorm

ROOT = Path(__file__).parents[2]
ROOMS = ("hemoco", "pipeline", "cluster", "jobs")
LISTED = {
    "hemoco/foreach.py": {
        "_foreach_add",
        "_foreach_add_",
        "_foreach_lerp_",
        "_foreach_mul_",
        "_foreach_norm",
    },
    "hemoco/models/batch_norm.py": {"_BatchNorm"},
    "hemoco/data/transforms.py": {"_upsample_bilinear2d_aa"},
    "hemoco/transfer/detection/detector.py": {"_skip_resize"},
    "cluster/local/ray.py": {"_temp_dir"},
    "cluster/submit/client.py": {"_do_request"},
    "cluster/submit/checkout.py": {"_private", "_dir_travel", "_get_excludes"},
    "pipeline/workers/group.py": {"_base_exc"},
    "pipeline/workers/capacity.py": {"_private"},
}


def test_foreach():
    first, second = [torch.randn(3), torch.randn(2, 4)], [torch.randn(3), torch.randn(2, 4)]
    pairs = list(zip(first, second, strict=True))
    close(foreach.add(first, second, alpha=0.5), [a + 0.5 * b for a, b in pairs])
    close(foreach.norm(first), [a.square().sum().sqrt() for a in first])
    for change, expected in (
        (lambda mine: foreach.add_(mine, second, alpha=-2.0), [a - 2 * b for a, b in pairs]),
        (lambda mine: foreach.lerp_(mine, second, 0.25), [0.75 * a + 0.25 * b for a, b in pairs]),
        (lambda mine: foreach.mul_(mine, 0.5), [0.5 * a for a in first]),
        (
            lambda mine: foreach.mul_(mine, [torch.tensor(2.0), torch.tensor(3.0)]),
            [2 * first[0], 3 * first[1]],
        ),
    ):
        mine = [a.clone() for a in first]
        change(mine)
        close(mine, expected)


def close(
    found: tuple[torch.Tensor, ...] | list[torch.Tensor], expected: list[torch.Tensor]
) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_batch_norm():
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, BatchNorm)
    for kind in (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d):
        assert not issubclass(kind, BatchNorm)
    assert {"reset_running_stats", "momentum", "running_mean"} <= set(dir(BatchNorm(4)))


def test_check_input_dim():
    with pytest.raises(AssertionError):
        BatchNorm.forward(SplitBatchNorm(4, 2), torch.zeros(2, 4, 3))


def test_upsample():
    image = torch.randint(0, 256, (1, 3, 50, 40), dtype=torch.uint8)
    out = torch.empty(1, 3, 16, 24, dtype=torch.uint8)
    torch.ops.aten._upsample_bilinear2d_aa.out(image, out.shape[2:], align_corners=False, out=out)
    assert torch.equal(
        out, functional.interpolate(image, (16, 24), mode="bilinear", antialias=True)
    )


def test_skip_resize():
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    images = [torch.rand(3, 40, 60)]
    settings = {"min_size": 20, "max_size": 100, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    skipping = GeneralizedRCNNTransform(**settings, _skip_resize=True)
    assert skipping.train()(images)[0].image_sizes == [(40, 60)]
    assert skipping.eval()(images)[0].image_sizes == [(20, 30)]


def test_cleaner_logger():
    name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    assert name in (ROOT / "cluster/local/ray.py").read_text()
    module = importlib.import_module(name)
    assert module.logger is logging.getLogger(name)


def test_do_request():
    from ray.job_submission import JobSubmissionClient

    from cluster.submit.client import _Client

    assert _Client._do_request is not JobSubmissionClient._do_request
    client = object.__new__(_Client)  # without __init__, which connects
    client._address = "http://127.0.0.1:9"
    client._cookies = None
    client._headers = {}
    client._verify = True
    with pytest.raises(requests.exceptions.ConnectionError):
        client._do_request("GET", "/api/version")
    assert "_do_request" in JobSubmissionClient.get_version.__code__.co_names


def test_packaging(tmp_path):
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    for name in ("included.py", "ignored.py", "excluded.py"):
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    visited: list[str] = []
    excludes = [_get_excludes(tmp_path, ["excluded.py"])]
    _dir_travel(
        tmp_path,
        excludes,
        lambda path: visited.append(path.name),
        include_gitignore=True,
        logger=logging.getLogger(),
    )
    assert {name for name in visited if name.endswith(".py")} == {"included.py"}
    assert RAY_RUNTIME_ENV_IGNORE_GITIGNORE == "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"


def test_sigint_handler():
    from ray.train.torch import TorchTrainer

    parameters = inspect.signature(TorchTrainer._register_sigint_handler).parameters
    assert list(parameters) == ["self", "controller"]
    methods = dict(inspect.getmembers(TorchTrainer, inspect.isfunction))
    callers = [
        name
        for name, method in methods.items()
        if "_register_sigint_handler" in method.__code__.co_names
    ]
    assert callers, (
        "nothing installs it by this method any more: Ctrl-C may end the process with status 0"
    )


def test_base_exc():
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from pipeline.workers.group import _causes

    cause = ValueError("why")
    assert cause in list(_causes(UserExceptionWithTraceback(cause, "its traceback")))


def test_startup_timeout():
    from ray.train import ControllerError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    from pipeline.workers.group import _startup_timed_out

    assert _startup_timed_out(ControllerError(WorkerGroupStartupTimeoutError(2)))
    assert not _startup_timed_out(ControllerError(ValueError("something else")))


PUBLIC = ("_asdict", "_make", "_replace")
"""Methods of named tuples, which are public."""


def private_names(file: Path) -> Iterator[str]:
    """Underscored names of outside packages that a file uses.

    It may import them, read them from an object, or pass them as keyword arguments.
    """
    tree = ast.parse(file.read_text())
    own = set()  # names that the file defines, and attributes of self
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and is_of_self(node):
            own.add(node.attr)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ROOMS:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and (
            node.attr not in own or ast.unparse(node.value) == "super()"
        ):
            names = [node.attr]
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Constant) and node.value in ("_skip_resize", "_base_exc"):
            names = [node.value]
        yield from (name for name in names if re.match("_[a-zA-Z]", name) and name not in PUBLIC)


def is_of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_the_list_is_complete():
    used: dict[str, set[str]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            names = set(private_names(path))
            if names:
                used[path.relative_to(ROOT).as_posix()] = names
    assert used == LISTED
