"""Checkpoints and backbone files: round trips, damage, interrupted writes, and what is pruned."""

import dataclasses
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hemoco import load_backbone as load_from_the_front
from hemoco.backbones.file import backbone_metadata, export_backbone, load_backbone, random_backbone
from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, ResourcesConfig, StreamConfig
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.errors import CheckpointError
from hemoco.models.resnet import Backbone
from hemoco.train.checkpoint import attempt_of, load_checkpoint, newest_checkpoint, save_checkpoint
from hemoco.train.pretrain import TrainState, build_state, train_steps

CONFIG = PretrainConfig(
    epochs=2,
    global_batch_size=4,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=8, queue_length=8, bn_group_size=2),
    stream=StreamConfig(lanes=1),
)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
FACTS = {"data_digest": "d1", "run_id": "r1"}


def state_of(config: PretrainConfig = CONFIG, data: str = "d1") -> TrainState:
    return build_state(config, torch.device("cpu"), data_digest=data)


@pytest.fixture(scope="module")
def state() -> TrainState:
    return state_of()


def save(
    state: TrainState, url: str | Path, *steps: int, attempt: int = 0, keep_last: int = 9
) -> list[str]:
    """Saves a checkpoint at each step; returns their URLs."""
    urls = []
    for step in steps:
        state.step = step
        urls.append(save_checkpoint(state, str(url), attempt=attempt, keep_last=keep_last))
    return urls


def damage(path: str, name: str = "state.pt") -> None:
    """Inverts a byte in the middle of a file."""
    data = bytearray(Path(path, name).read_bytes())
    data[len(data) // 2] ^= 0xFF
    Path(path, name).write_bytes(data)


def folders(url: Path) -> list[str]:
    return sorted(path.name for path in url.iterdir())


def test_training_resumed_from_storage_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def train(state: TrainState, first: int, last: int) -> None:
        generator = torch.Generator().manual_seed(0)
        crops = torch.randint(256, (4, 4, 2, 3, 16, 16), generator=generator, dtype=torch.uint8)
        steps = range(first, last)
        batches = [Batch(crops[i], ["k"] * 4, StreamPosition(*divmod(i, 2))) for i in steps]
        list(train_steps(state, batches, 2))

    straight, first, second = (state_of() for _ in range(3))
    train(straight, 0, 4)
    train(first, 0, 2)
    save_checkpoint(first, str(tmp_path), attempt=0, keep_last=1)
    newest = newest_checkpoint(str(tmp_path))
    assert newest == f"{tmp_path}/step_00000002_a0"
    load_checkpoint(newest, second)
    assert (second.step, second.position) == (2, StreamPosition(0, 1))
    train(second, 2, 4)
    resumed, expected = second.model.state_dict(), straight.model.state_dict()
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_nothing_to_resume_where_nothing_was_saved(tmp_path: Path) -> None:
    assert newest_checkpoint(str(tmp_path)) is None
    assert newest_checkpoint(str(tmp_path / "never_made")) is None
    (tmp_path / "notes").mkdir()
    assert newest_checkpoint(str(tmp_path)) is None


def test_newest_is_the_highest_step_then_the_highest_attempt(
    state: TrainState, tmp_path: Path
) -> None:
    save(state, tmp_path, 99_999_999)
    save(state, tmp_path, 100_000_000, attempt=2)
    (newest,) = save(state, tmp_path, 100_000_000, attempt=10)
    assert newest_checkpoint(str(tmp_path)) == newest
    assert attempt_of(newest) == 10
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        attempt_of(str(tmp_path))


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_damaged_checkpoints_are_skipped_with_a_warning(
    state: TrainState, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    older, newer = save(state, tmp_path, 1, 2)
    damage(newer, name)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(str(tmp_path)) == older
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert newer in caplog.text


def test_interrupted_writes_are_no_checkpoints(state: TrainState, tmp_path: Path) -> None:
    older, newer = save(state, tmp_path, 1, 2)
    Path(newer, "manifest.json").unlink()
    assert newest_checkpoint(str(tmp_path)) == older
    Path(older, "manifest.json").unlink()
    assert newest_checkpoint(str(tmp_path)) is None


def test_refuses_to_restart_from_zero_when_all_are_damaged(
    state: TrainState, tmp_path: Path
) -> None:
    for checkpoint in save(state, tmp_path, 1, 2):
        damage(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"none of its 2 checkpoints verifies.*step_00000002_a0"
    ):
        newest_checkpoint(str(tmp_path))


def test_lost_and_cut_states_do_not_verify(state: TrainState, tmp_path: Path) -> None:
    _, cut, lost = save(state, tmp_path, 1, 2, 3)
    Path(lost, "state.pt").unlink()
    Path(cut, "state.pt").write_bytes(Path(cut, "state.pt").read_bytes()[:-1])
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "step_00000001_a0")
    with pytest.raises(CheckpointError, match=r"state\.pt is missing"):
        load_checkpoint(lost, state)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(cut, state)


def test_old_checkpoints_are_pruned(state: TrainState, tmp_path: Path) -> None:
    save(state, tmp_path, 1, 2, 3, keep_last=2)
    assert folders(tmp_path) == ["step_00000002_a0", "step_00000003_a0"]


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(
    state: TrainState, tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40, 50):
        state.step = step
        save_checkpoint(state, str(tmp_path), attempt=0, keep_last=1, keep_every_steps=20)
    assert folders(tmp_path) == ["step_00000020_a0", "step_00000040_a0", "step_00000050_a0"]


def test_pruning_keeps_the_one_just_saved_and_drops_those_it_passed_over(
    state: TrainState, tmp_path: Path
) -> None:
    damage(save(state, tmp_path, 1, 2)[1])
    save(state, tmp_path, 1, attempt=1, keep_last=1)  # resumed before the damaged one
    assert folders(tmp_path) == ["step_00000001_a1"]


def test_pruning_does_not_count_interrupted_writes(state: TrainState, tmp_path: Path) -> None:
    Path(save(state, tmp_path, 1, 2)[1], "manifest.json").unlink()
    save(state, tmp_path, 3, attempt=1, keep_last=2)
    assert folders(tmp_path) == ["step_00000001_a0", "step_00000003_a1"]


def test_a_stale_attempt_leaves_later_attempts_alone(state: TrainState, tmp_path: Path) -> None:
    save(state, tmp_path, 1, 3, attempt=1)
    save(state, tmp_path, 2, attempt=0, keep_last=1)
    assert folders(tmp_path) == ["step_00000001_a1", "step_00000002_a0", "step_00000003_a1"]


def test_another_config_is_refused_with_the_difference(state: TrainState, tmp_path: Path) -> None:
    (checkpoint,) = save(state, tmp_path, 1)
    other = state_of(dataclasses.replace(CONFIG, epochs=3))
    with pytest.raises(CheckpointError, match=r"another config \(pretrain.epochs: 2 -> 3\)"):
        load_checkpoint(checkpoint, other)
    assert other.step == 0


def test_resources_and_loader_workers_may_change(state: TrainState, tmp_path: Path) -> None:
    (checkpoint,) = save(state, tmp_path, 1)
    stream = StreamConfig(lanes=1, workers=0, memory_bytes=1)
    resources = ResourcesConfig(workers=2)
    other = state_of(dataclasses.replace(CONFIG, resources=resources, stream=stream))
    load_checkpoint(checkpoint, other)
    assert other.step == 1


def test_other_data_are_refused(state: TrainState, tmp_path: Path) -> None:
    (checkpoint,) = save(state, tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"digest d1.* d2"):
        load_checkpoint(checkpoint, state_of(data="d2"))


class Bomb:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


def test_code_in_a_checkpoint_is_not_run(
    state: TrainState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(state, "state_dict", lambda: {"model": Bomb()}, raising=True)
    (checkpoint,) = save(state, tmp_path / "c", 1)
    with pytest.raises(CheckpointError, match="was not run"):
        load_checkpoint(checkpoint, state)
    assert not Path("exploded").exists()


def test_backbone_comes_back_with_all_that_is_needed_to_use_it(
    state: TrainState, tmp_path: Path
) -> None:
    trained = Backbone(state.model.query_encoder.encoder, CONFIG.encoder, MEAN, STD)
    url = str(tmp_path / "b.safetensors")
    export_backbone(trained, url, FACTS)
    loaded = load_from_the_front(url)
    assert loaded.config == CONFIG.encoder
    assert (loaded.mean, loaded.std) == (MEAN, STD)
    assert not loaded.training
    assert backbone_metadata(url).items() >= FACTS.items()
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    trained.eval()
    # the encoder of the training is channels-last, so that sums have another order
    torch.testing.assert_close(loaded(loaded.normalise(images)), trained(trained.normalise(images)))


def rewritten(path: Path, change: dict[str, str | None], drop: str = "", extra: str = "") -> str:
    """A valid backbone file with other metadata or tensors."""
    export_backbone(random_backbone(CONFIG.encoder, 0, MEAN, STD), str(path), FACTS)
    metadata = backbone_metadata(str(path)) | change
    tensors = {name: t for name, t in safetensors.torch.load_file(path).items() if name != drop}
    tensors |= {extra: torch.zeros(1)} if extra else {}
    path.write_bytes(
        safetensors.torch.save(tensors, {k: v for k, v in metadata.items() if v is not None})
    )
    return str(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": {"format": "else"}}, "not a hemoco backbone"),
        ({"change": {"mean": None}}, "metadata lacks 'mean'"),
        ({"change": {"architecture": "resnet18"}}, "does not fit its architecture"),
        ({"change": {"architecture": "nonesuch"}}, "architecture is 'nonesuch'"),
        ({"change": {"stem": "imagenet"}}, "does not fit its architecture"),
        ({"change": {}, "drop": "bn1.num_batches_tracked"}, "bn1.num_batches_tracked.*missing"),
        ({"change": {}, "extra": "fc.bias"}, "Unexpected key.*fc.bias"),
    ],
)
def test_backbones_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    url = rewritten(tmp_path / "b.safetensors", **changes)
    with pytest.raises(CheckpointError, match=message):
        load_backbone(url)


@pytest.mark.parametrize(
    "data", [b"", b"\x80\x04", pickle.dumps({"a": 1}), json.dumps({}).encode() * 99]
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "b").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_backbone(str(tmp_path / "b"))
