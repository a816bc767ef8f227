import dataclasses
import hashlib
import io
import itertools
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data import stream
from hemoco.data.shards import Sample, Shard, ShardIndex, encode_shard, read_index, write_index
from hemoco.data.stream import Batch, StreamPosition
from hemoco.errors import ConfigError, ShardError

SIZES = [17, 5, 30, 1, 22]
CPU = torch.device("cpu")


def png(number: int) -> bytes:
    """A 12 x 10 image whose every pixel has the value `number`."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((10, 12, 3), number, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_shards(folder: Path, *, bad: tuple[int, ...] = (), labelled: bool = True) -> str:
    """Shards of SIZES with the images 0, 1, 2, ..., whose keys are their numbers."""
    numbers, shards = itertools.count(), []
    for place, size in enumerate(SIZES):
        rows = [next(numbers) for _ in range(size)]
        image = {row: b"not an image" if row in bad else png(row) for row in rows}
        data = encode_shard([Sample(str(row), image[row], row % 3 if labelled else None, suffix="png") for row in rows])
        shard = Shard(f"train-{place:06d}.tar", "train", size, len(data), hashlib.sha256(data).hexdigest())
        (folder / shard.name).write_bytes(data)
        shards.append(shard)
    write_index(str(folder), ShardIndex(tuple(shards), ("a", "b", "c"), ()))
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"))


def config(*, workers: int = 0, global_batch_size: int = 16, **changed: Any) -> PretrainConfig:
    return PretrainConfig(
        global_batch_size=global_batch_size,
        views=ViewsConfig(size=8),
        moco=MoCoConfig(queue_length=64, bn_group_size=2),
        stream=StreamConfig(workers=workers, lanes=4, shards_per_block=2, **changed),
    )


def run(
    url: str, made: PretrainConfig, *, rank: int = 0, world_size: int = 1, start: StreamPosition | None = None
) -> list[Batch]:
    return list(
        stream.batches(url, "train", config=made, rank=rank, world_size=world_size, start=start, epochs=2, device=CPU)
    )


def assert_equal(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [batch.position for batch in ours] == [batch.position for batch in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.query_views, other.query_views)
        assert torch.equal(one.key_views, other.key_views)


def test_every_epoch_delivers_its_steps_and_no_image_twice(shards: str) -> None:
    batches = run(shards, config())
    steps = stream.steps_per_epoch(read_index(shards), "train", config())
    assert steps == sum(SIZES) // 16
    assert [batch.position for batch in batches] == [(epoch, step) for epoch in range(2) for step in range(steps)]
    for epoch in range(2):
        keys = [key for batch in batches if batch.position.epoch == epoch for key in batch.keys]
        assert len(set(keys)) == len(keys) == 16 * steps


def test_views_show_the_image_of_their_key(shards: str) -> None:
    plain = ViewsConfig(size=8, jitter=0, grayscale=0, blur=0, mean=(0, 0, 0), std=(1, 1, 1))
    for batch in run(shards, dataclasses.replace(config(), views=plain)):
        expected = torch.tensor([int(key) for key in batch.keys])[:, None, None, None].expand(-1, 3, 8, 8)
        for view in (batch.query_views, batch.key_views):
            assert torch.equal((view * 255).round().long(), expected)


@pytest.mark.parametrize("consumed", [1, 4, 5, 7])
def test_resuming_gives_the_batches_that_were_left_bit_for_bit(shards: str, consumed: int) -> None:
    batches = run(shards, config())
    resumed = run(shards, config(), start=batches[consumed - 1].position)
    assert_equal(resumed, batches[consumed:])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_have_the_batches_of_one(shards: str, world_size: int) -> None:
    ranks = [run(shards, config(), rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [
        Batch(
            torch.cat([part.query_views for part in parts]),
            torch.cat([part.key_views for part in parts]),
            [key for part in parts for key in part.keys],
            parts[0].position,
        )
        for parts in zip(*ranks, strict=True)
    ]
    assert_equal(joined, run(shards, config()))


def test_loader_processes_deliver_what_one_process_delivers(shards: str) -> None:
    batches = run(shards, config())
    assert_equal(run(shards, config(workers=2)), batches)
    assert_equal(run(shards, config(workers=2), start=StreamPosition(0, 2)), batches[3:])


def test_closing_the_generator_ends_the_loader_processes(shards: str) -> None:
    source = stream.batches(
        shards, "train", config=config(workers=2), rank=0, world_size=1, start=None, epochs=1000, device=CPU
    )
    next(source)
    assert len(multiprocessing.active_children()) >= 2
    source.close()
    assert multiprocessing.active_children() == []


def test_an_undecodable_image_is_replaced_by_the_next_good_one(
    tmp_path: Path, shards: str, caplog: pytest.LogCaptureFixture
) -> None:
    damaged = run(write_shards(tmp_path, bad=(30, 31, 51)), config())
    whole = run(shards, config())
    replaced = {"30": "32", "31": "32", "51": "22"}  # the shard of 22 to 51 goes round
    assert [[replaced.get(key, key) for key in batch.keys] for batch in whole] == [batch.keys for batch in damaged]
    assert "train-000002.tar: sample" in caplog.text and "bad=2" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_undecodable_images_are_an_error_in_one_line(tmp_path: Path, workers: int) -> None:
    url = write_shards(tmp_path, bad=tuple(range(25, 50)))
    with pytest.raises(ShardError, match=r"^10 of \d+ images cannot be decoded, the last is .*train-000002") as raised:
        run(url, config(workers=workers))
    assert "\n" not in str(raised.value)
    assert multiprocessing.active_children() == []


def test_a_shard_without_any_good_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"train-000003\.tar: none of its images"):
        run(write_shards(tmp_path, bad=(52,)), config())


def test_a_cache_smaller_than_the_open_blocks_is_refused(shards: str) -> None:
    needed = sum(shard.bytes for shard in read_index(shards).shards)
    with pytest.raises(ConfigError, match=rf"pretrain\.stream\.cache_bytes .* at least {needed}"):
        run(shards, config(cache_bytes=needed - 1))


def test_shards_are_read_once_per_epoch_while_the_cache_holds_a_block(
    shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read_shard = stream.read_shard
    monkeypatch.setattr(stream, "read_shard", lambda url, shard: reads.append(shard.name) or read_shard(url, shard))
    total = sum(shard.bytes for shard in read_index(shards).shards)
    run(shards, config(cache_bytes=total))
    assert sorted(reads) == [shard.name for shard in read_index(shards).shards]


def test_a_reader_never_holds_more_than_its_cache(shards: str) -> None:
    index = read_index(shards)
    reader = stream._ImageReader(shards, index.shards, 60_000)
    for shard in [0, 1, 2, 3, 4, 0, 2]:
        reader.image(shard, 0)
        held = sum(index.shards[number].bytes for number in reader._cache)
        assert held <= 60_000 or len(reader._cache) == 1


def test_labelled_images_come_whole_and_in_storage_order(shards: str) -> None:
    images, labels, keys = stream.load_images(shards, "train", 8)
    assert images.shape == (75, 3, 8, 8) and images.dtype == torch.uint8
    assert images[:, 0, 0, 0].tolist() == [int(key) for key in keys] == list(range(75))
    assert labels.tolist() == [number % 3 for number in range(75)]
    streamed = list(stream.labelled_batches(shards, "train", 8, 32))
    assert [len(batch) for batch, _ in streamed] == [32, 32, 11]
    assert torch.equal(torch.cat([batch for batch, _ in streamed]), images)
    assert torch.equal(torch.cat([batch for _, batch in streamed]), labels)


def test_evaluation_names_an_image_without_label_or_with_damage(tmp_path: Path) -> None:
    unlabelled = write_shards(tmp_path, labelled=False)
    with pytest.raises(ShardError, match=r"train-000000\.tar: sample 0 has no label"):
        stream.load_images(unlabelled, "train", 8)
    damaged = write_shards(tmp_path, bad=(3,))
    with pytest.raises(ShardError, match=r"sample 3: its 12 bytes are not an image"):
        stream.load_images(damaged, "train", 8)
