"""hemoco's stream inside pipelines of the webdataset library."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from hemoco.config import StreamConfig
from hemoco.data.stream.order import EpochOrder
from hemoco.data.stream.webdataset import SampleSource
from hemoco.errors import ConfigError
from tests.helpers.shard_folders import write_shards

SIZES = [17, 5, 30, 0, 1, 22]
CONFIG = StreamConfig(lanes=4, shards_per_block=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards").as_uri(), SIZES)


def source(url: str, rank: int = 0, world_size: int = 1) -> SampleSource:
    return SampleSource(
        url, "train", config=CONFIG, seed=5, global_batch_size=16, rank=rank, world_size=world_size
    )


def expected(epoch: int) -> list[int]:
    order = EpochOrder(
        SIZES, seed=5, epoch=epoch, lanes=4, shards_per_block=2, global_batch_size=16
    )
    first = np.cumsum([0, *SIZES])
    rows = np.concatenate([order.samples(step, 0, 16) for step in range(order.steps)])
    return (first[rows[:, 0]] + rows[:, 1]).tolist()


def test_it_is_the_source_of_a_webdataset_pipeline(shards: str) -> None:
    pipeline = webdataset.DataPipeline(
        source(shards),
        webdataset.decode("pil"),
        webdataset.to_tuple("__key__", "png", "cls"),
        webdataset.batched(16),
    )
    numbers = []
    for keys, images, labels in pipeline:
        for key, image, label in zip(keys, images, labels, strict=True):
            number = int(key)
            numbers.append(number)
            assert image.getpixel((0, 0)) == (number, number, number)
            assert label == number % 3
    assert numbers == expected(0)


def test_ranks_share_the_epoch_and_epochs_differ(shards: str) -> None:
    parts = [source(shards, rank, 4) for rank in range(4)]
    for epoch in range(2):
        keys = []
        for part in parts:
            part.epoch = epoch
            keys.append([int(sample["__key__"]) for sample in part])
        assert len({len(of_rank) for of_rank in keys}) == 1
        assert sorted(itertools.chain(*keys)) == sorted(expected(epoch))
    assert expected(0) != expected(1)


def test_loader_processes_share_the_samples_of_a_rank(shards: str) -> None:
    loader = torch.utils.data.DataLoader(
        source(shards), batch_size=None, num_workers=2, multiprocessing_context="forkserver"
    )
    assert sorted(int(sample["__key__"]) for sample in loader) == sorted(expected(0))


def test_ranks_that_cannot_have_equal_shares_are_refused(shards: str) -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 3 ranks"):
        source(shards, 0, 3)


def test_a_sample_names_its_tar(shards: str, tmp_path: Path) -> None:
    sample = next(iter(source(shards)))
    assert sample["__url__"].startswith(shards) and sample["__url__"].endswith(".tar")
    assert sample["cls"] == str(int(sample["__key__"]) % 3).encode()
