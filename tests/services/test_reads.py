"""Reads of commands besides the images, counted at a proxy in front of a real S3 server."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from hemoco.backbones.file import backbone_metadata, export_backbone, random_backbone
from hemoco.config import EncoderConfig, KnnConfig
from hemoco.data.shards.index import ShardIndexes
from hemoco.storage.objects import filesystem, join_url
from pipeline.checks import check_transfers
from pipeline.run import transfer_only
from tests.helpers.fault_proxy import FaultProxy, fault_proxy
from tests.helpers.small_study import pack_digits, small_recipe

ROOT = Path(__file__).parents[2]
ENCODER = EncoderConfig(architecture="resnet10t")
"""The backbone's, large beside its metadata."""
RECIPE = """
import dataclasses
from hemoco.config import ResourcesConfig
from tests.helpers.small_study import small_recipe

whole = small_recipe({shards!r})
pretrain = dataclasses.replace(
    whole.pretrain, resources=ResourcesConfig(workers=1), knn_every_epochs=1, global_batch_size=512
)
recipe = dataclasses.replace(whole, pretrain=pretrain, transfers={{}}, curve=())
"""


class Reads(NamedTuple):
    """Returns the GET requests for an object, and the bytes of their answers."""

    gets: int
    bytes: int


def reads(proxy: FaultProxy, url: str) -> Reads:
    path = "/" + url.removeprefix("s3://")
    gets = [
        request for request in proxy.requests if (request.method, request.path) == ("GET", path)
    ]
    return Reads(len(gets), proxy.sent_bytes[path])


def size(url: str) -> int:
    files, path = filesystem(url)
    return int(files.size(path))


@pytest.fixture(scope="module")
def shards(s3, ray_cluster, tmp_path_factory):
    return pack_digits(s3, tmp_path_factory.mktemp("digits"))


def test_a_pretraining_reads_the_index_twice_once_by_the_driver_and_once_by_its_rank(
    s3, shards, tracking, tmp_path
):
    (tmp_path / "mine.py").write_text(RECIPE.format(shards=shards))
    command = [
        "pretrain",
        str(tmp_path / "mine.py"),
        "--storage",
        f"{s3}/reads/runs",
        "--run",
        "reads",
    ]
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        subprocess.run(
            [sys.executable, "-m", "jobs", *command],
            cwd=ROOT,
            env=os.environ | {"AWS_ENDPOINT_URL": proxy.endpoint},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    index = join_url(shards, "index.json")
    assert reads(proxy, index) == Reads(2, 2 * size(index))


@pytest.fixture(scope="module")
def backbone(s3):
    url = join_url(s3, "reads/backbone.safetensors")
    made = random_backbone(ENCODER, 0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    export_backbone(made, url, {"data_digest": "d", "run_id": "", "size": "32"})
    return url


def test_the_metadata_of_a_backbone_are_read_without_its_weights(backbone, monkeypatch):
    whole = size(backbone)
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        assert backbone_metadata(backbone)["architecture"] == "resnet10t"
    found = reads(proxy, backbone)
    assert found.gets == 1 and found.bytes < 0.01 * whole


def test_a_driver_of_transfers_reads_a_backbone_once_to_record_it_and_the_index_once(
    ray_cluster, tracking, shards, backbone, bucket, monkeypatch
):
    knn = KnnConfig(neighbours=20, inits=("pretrained", f"other={backbone}"))
    small = small_recipe(shards)
    recipe = dataclasses.replace(
        small,
        pretrain=dataclasses.replace(small.pretrain, encoder=ENCODER),
        transfers={"knn": knn, "again": knn},
        curve=(),
    )
    indexes, index = ShardIndexes(), join_url(shards, "index.json")
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)  # workers have the server's own
        check_transfers(recipe, indexes)
        transfer_only(
            recipe,
            indexes=indexes,
            backbone_url=backbone,
            run="driver-reads",
            storage=bucket,
            fresh=False,
            tags={},
        )
    assert reads(proxy, index) == Reads(1, size(index))
    assert reads(proxy, backbone).bytes < 1.05 * size(backbone)
