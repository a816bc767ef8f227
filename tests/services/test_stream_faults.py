"""Batches from faulty storage: they equal those of sound storage, or a named error is raised."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
import torch

from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data import labelled
from hemoco.data.shards.index import read_index, read_shard
from hemoco.data.shards.tar import encode_shard
from hemoco.data.stream import batches as stream
from hemoco.data.stream.bad_samples import BadSampleFile, ReadCounts, sum_counts
from hemoco.errors import HemocoError, ShardError, StorageError
from hemoco.storage.objects import read_bytes, remove, write_bytes
from hemoco.storage.retry import EVALUATION_PATIENCE_S
from tests.helpers.fault_proxy import FaultProxy, fault_proxy
from tests.helpers.shard_folders import write_shards

SIZES = [40, 40, 40, 40]


@pytest.fixture
def proxy(s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the S3 server, which the environment names."""
    import os

    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
        yield made
    s3fs.S3FileSystem.clear_instance_cache()


def config(**changed: Any) -> PretrainConfig:
    return PretrainConfig(
        global_batch_size=16,
        views=ViewsConfig(size=8),
        moco=MoCoConfig(queue_length=64, bn_group_size=2),
        stream=StreamConfig(**{"workers": 0, "lanes": 2, "shards_per_block": 2} | changed),
    )


def batches(url: str, made: PretrainConfig, epochs: int = 1) -> Iterator[stream.Batch]:
    return stream.batches(
        url,
        read_index(url, patience_s=made.stream.retry_s),
        "train",
        dataclasses.replace(stream.pretraining_plan(made), epochs=epochs),
        rank=0,
        world_size=1,
        start=None,
        device=torch.device("cpu"),
        bad_samples=BadSampleFile("memory://unwritten"),
    )


def keys_and_counts(url: str, made: PretrainConfig) -> tuple[list[list[str]], ReadCounts]:
    found = list(batches(url, made))
    return [batch.keys for batch in found], sum_counts(batch.reading for batch in found)


FAULTS: dict[str, dict[str, Any]] = {
    "status": {"times": 3},
    "reset": {"times": 2, "after": 5000},
    "truncate": {"times": 2, "after": 9000},
    "damage": {"times": 1, "after": 3000},
    "content_range": {"times": 1},
}


@pytest.mark.parametrize("kind", FAULTS)
def test_faults_on_the_way_change_no_batch(bucket: str, proxy: FaultProxy, kind: Any) -> None:
    write_shards(bucket, SIZES)
    expected, clean = keys_and_counts(bucket, config())
    proxy.fail(kind, **FAULTS[kind])
    found, counts = keys_and_counts(bucket, config())
    assert found == expected
    assert counts.bad == ()
    assert any(request.fault for request in proxy.requests)
    assert kind in ("damage",) or counts.retries > clean.retries


def test_an_outage_of_some_seconds_is_waited_out_by_training_and_evaluation(
    bucket: str, proxy: FaultProxy
) -> None:
    write_shards(bucket, SIZES)
    expected, _ = keys_and_counts(bucket, config())
    proxy.fail("status", times=10**6, for_s=8, match="")
    assert keys_and_counts(bucket, config())[0] == expected
    proxy.fail("status", times=10**6, for_s=8, match="")
    index = read_index(bucket, patience_s=EVALUATION_PATIENCE_S)
    assert len(labelled.load_images(bucket, index, "train", 8)[2]) == sum(SIZES)


def test_a_sample_table_that_comes_late_is_waited_for(bucket: str, proxy: FaultProxy) -> None:
    write_shards(bucket, SIZES)
    expected, _ = keys_and_counts(bucket, config())
    proxy.fail("status", times=12, match="samples/")  # more than the client itself tries
    assert keys_and_counts(bucket, config())[0] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_storage_that_stays_away_ends_the_run_in_one_line(
    bucket: str, proxy: FaultProxy, workers: int
) -> None:
    write_shards(bucket, SIZES)
    proxy.fail("status", times=10**6)
    with pytest.raises(
        StorageError, match=r"\.tar: 0 of \d+ bytes came .*run the same command again"
    ) as raised:
        list(batches(bucket, config(retry_s=1.0, workers=workers)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["missing", "cut", "replaced"])
def test_a_shard_that_changes_in_mid_run_is_named(bucket: str, damage: str) -> None:
    write_shards(bucket, SIZES)
    last = f"{bucket}/train-000003.tar"
    data = read_bytes(last)
    other = encode_shard([s for s in read_shard(bucket, read_index(bucket).shards[2])])
    running = batches(bucket, config(memory_bytes=4 * len(data)), epochs=50)
    list(itertools.islice(running, 3))
    if damage == "missing":
        remove(last)
    else:
        write_bytes(
            last,
            data[: len(data) // 2]
            if damage == "cut"
            else other[: len(data)].ljust(len(data), b"\0"),
        )
    with pytest.raises(ShardError, match=r"train-000003\.tar"):
        list(running)


def test_an_index_of_other_data_is_refused(bucket: str, tmp_path: Path) -> None:
    write_shards(bucket, SIZES)
    other = write_shards(tmp_path.as_uri(), [30, 30, 30, 30])
    write_bytes(f"{bucket}/index.json", read_bytes(f"{other}/index.json"))
    with pytest.raises(ShardError, match=r"samples/[0-9a-f]{64}\.safetensors: .* is missing"):
        list(batches(bucket, config()))


def test_empty_shards_are_passed_over(bucket: str) -> None:
    write_shards(bucket, [0, 20, 0, 20, 0])
    found = keys_and_counts(bucket, config())[0]
    assert len(found) == 2 and len(set(itertools.chain(*found))) == 32


@pytest.mark.parametrize(
    "url", ["pipe:cat /etc/passwd", "gopher://x/y", "s3://b/$(touch x)", "file://host/x"]
)
def test_urls_that_are_no_storage_are_refused(url: str) -> None:
    with pytest.raises(HemocoError, match=r"not supported|not allowed|is in the place of a host"):
        list(batches(url, config()))
