import dataclasses
import itertools
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data import labelled
from hemoco.data.shards.index import read_index
from hemoco.data.stream import batches as stream
from hemoco.data.stream import loader
from hemoco.data.stream.bad_samples import BadSampleFile, sum_counts
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.errors import ConfigError, ShardError
from tests.helpers.shard_folders import write_shards

SIZES = [17, 5, 30, 1, 22]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards").as_uri(), SIZES)


def config(*, workers: int = 0, global_batch_size: int = 16, **changed: Any) -> PretrainConfig:
    return PretrainConfig(
        global_batch_size=global_batch_size,
        views=ViewsConfig(size=8),
        moco=MoCoConfig(queue_length=64, bn_group_size=2),
        stream=StreamConfig(workers=workers, lanes=4, shards_per_block=2, **changed),
    )


def run(
    url: str,
    made: PretrainConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    start: StreamPosition | None = None,
    epochs: int = 2,
    bad_samples: BadSampleFile | None = None,
) -> list[Batch]:
    listed = bad_samples or BadSampleFile("memory://unwritten")
    return list(
        stream.batches(
            url,
            read_index(url),
            "train",
            dataclasses.replace(stream.pretraining_plan(made), epochs=epochs),
            rank=rank,
            world_size=world_size,
            start=start,
            device=CPU,
            bad_samples=listed,
        )
    )


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [batch.position for batch in ours] == [batch.position for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.crops, other.crops)


def test_every_epoch_delivers_its_steps_and_no_image_twice(shards: str) -> None:
    batches = run(shards, config())
    steps = stream.steps_per_epoch(read_index(shards), "train", stream.pretraining_plan(config()))
    assert steps == sum(SIZES) // 16
    positions = [batch.position for batch in batches]
    assert positions == list(itertools.product(range(2), range(steps)))
    for epoch in (batches[:steps], batches[steps:]):
        keys = [key for batch in epoch for key in batch.keys]
        assert len(set(keys)) == len(keys) == 16 * steps


def test_views_show_the_image_of_their_key(shards: str) -> None:
    for batch in run(shards, config()):
        values = torch.tensor([int(key) for key in batch.keys])
        expected = values[:, None, None, None, None].expand(-1, 2, 3, 8, 8)
        assert torch.equal(batch.crops.long(), expected)


@pytest.mark.parametrize("consumed", [1, 4, 5, 7])
def test_resuming_gives_the_batches_that_were_left_bit_for_bit(shards: str, consumed: int) -> None:
    batches = run(shards, config())
    resumed = run(shards, config(), start=batches[consumed - 1].position)
    assert_equal(resumed, batches[consumed:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_batches_of_one(shards: str, world_size: int) -> None:
    ranks = [run(shards, config(), rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = []
    for parts in zip(*ranks, strict=True):
        crops = torch.cat([part.crops for part in parts])
        keys = [key for part in parts for key in part.keys]
        joined.append(Batch(crops, keys, parts[0].position))
    assert_equal(joined, run(shards, config()))


def test_loader_processes_deliver_what_one_process_delivers(shards: str) -> None:
    batches = run(shards, config())
    assert_equal(run(shards, config(workers=2)), batches)
    assert_equal(run(shards, config(workers=2), start=StreamPosition(0, 2)), batches[3:])


def test_memory_of_loader_processes_used_again_holds_the_right_views(shards: str) -> None:
    epochs = 2 * loader._BUFFERS
    assert_equal(
        run(shards, config(workers=2), epochs=epochs), run(shards, config(), epochs=epochs)
    )


def test_closing_the_generator_ends_the_loader_processes(shards: str) -> None:
    others = multiprocessing.active_children()  # tests/helpers/ranks.py keeps its processes
    source = stream.batches(
        shards,
        read_index(shards),
        "train",
        dataclasses.replace(stream.pretraining_plan(config(workers=2)), epochs=1000),
        rank=0,
        world_size=1,
        start=None,
        device=CPU,
        bad_samples=BadSampleFile("memory://unwritten"),
    )
    next(source)
    assert len(multiprocessing.active_children()) >= len(others) + 2
    source.close()
    assert {*multiprocessing.active_children()} <= {*others}


def test_bad_samples_are_replaced_by_the_next_good_one_and_listed(
    tmp_path: Path, shards: str
) -> None:
    listed = BadSampleFile((tmp_path / "bad.jsonl").as_uri())
    url = write_shards(f"file://{tmp_path}/s", SIZES, bad=(30, 31, 51))
    damaged = run(url, config(), bad_samples=listed)
    whole = run(shards, config())
    # the shard has the samples 22 to 51; after its last sample comes its first
    replaced = {"30": "32", "31": "32", "51": "22"}
    for with_bad, without_bad in zip(damaged, whole, strict=True):
        assert with_bad.keys == [replaced.get(key, key) for key in without_bad.keys]
    listed.close()
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == {"30", "31", "51"}
    assert {(line["shard"], line["reason"]) for line in lines} == {
        (f"file://{tmp_path}/s/train-000002.tar", "not an image")
    }


def test_the_replacement_does_not_depend_on_who_reads(tmp_path: Path) -> None:
    url = write_shards(tmp_path.as_uri(), SIZES, bad=(30, 31, 51))
    ranks = [run(url, config(), rank=rank, world_size=4) for rank in range(4)]
    for batch, *parts in zip(run(url, config()), *ranks, strict=True):
        assert [key for part in parts for key in part.keys] == batch.keys


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_samples_are_an_error_in_one_line(tmp_path: Path, workers: int) -> None:
    url = write_shards(tmp_path.as_uri(), SIZES, bad=tuple(range(25, 50)))
    others = multiprocessing.active_children()
    with pytest.raises(
        ShardError, match=r"^1\d of \d+ samples are bad, the last is \d+ in .*train-000002"
    ) as raised:
        run(url, config(workers=workers))
    assert "\n" not in str(raised.value)
    assert {*multiprocessing.active_children()} <= {*others}
    assert len(run(url, config(max_bad_share=1.0))) == 8


def test_a_shard_without_any_good_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"train-000003\.tar: none of its images"):
        run(write_shards(tmp_path.as_uri(), SIZES, bad=(52,)), config())


def test_a_memory_limit_smaller_than_the_open_blocks_is_refused(shards: str) -> None:
    needed = sum(shard.bytes for shard in read_index(shards).shards)
    with pytest.raises(ConfigError, match=rf"stream\.memory_bytes .* at least {needed}"):
        run(shards, config(memory_bytes=needed - 1))


def test_a_disk_cache_spares_the_storage_later_epochs(
    shards: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("HEMOCO_HOME", str(tmp_path))
    batches = run(shards, config(disk_cache_bytes=10**7))
    assert_equal(batches, run(shards, config()))
    total = sum_counts(batch.reading for batch in batches)
    assert total.cache_misses == len(SIZES) and total.cache_hits > 0
    assert total.bytes == sum(shard.bytes for shard in read_index(shards).shards)


def test_batches_say_what_was_read(shards: str) -> None:
    reading = [batch.reading for batch in run(shards, config())]
    assert [counts.samples for counts in reading] == [16] * 8
    stored = sum(shard.bytes for shard in read_index(shards).shards)
    assert sum(counts.bytes for counts in reading) >= 2 * stored  # two epochs


def test_labelled_images_come_whole_and_in_storage_order(shards: str) -> None:
    images, labels, keys = labelled.load_images(shards, read_index(shards), "train", 8)
    assert images.shape == (75, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [int(key) for key in keys] == list(range(75))
    assert labels.tolist() == [number % 3 for number in range(75)]


def test_evaluation_names_an_image_without_label_or_with_damage(tmp_path: Path) -> None:
    unlabelled = write_shards(f"file://{tmp_path}/a", SIZES, labelled=False)
    with pytest.raises(ShardError, match=r"train-000000\.tar: sample 0 has no label"):
        labelled.load_images(unlabelled, read_index(unlabelled), "train", 8)
    damaged = write_shards(f"file://{tmp_path}/b", SIZES, bad=(3,))
    with pytest.raises(ShardError, match=r"sample 3: its 12 bytes are not an image"):
        labelled.load_images(damaged, read_index(damaged), "train", 8)
