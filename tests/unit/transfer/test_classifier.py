import dataclasses
import hashlib
import math
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hemoco.backbones.file import random_backbone
from hemoco.config import (
    ClassifierConfig,
    EncoderConfig,
    FineTuneConfig,
    LinearClassifierConfig,
    StreamConfig,
)
from hemoco.data.labelled import load_images
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import Batch, batches, steps_per_epoch
from hemoco.data.stream.loader import StreamPosition
from hemoco.data.transforms import center_view
from hemoco.distributed import rank, world_size
from hemoco.errors import CheckpointError, ShardError, TrainingError
from hemoco.models.resnet import Backbone
from hemoco.train.checkpoint import load_checkpoint, save_checkpoint
from hemoco.train.state import LoggedStep
from hemoco.transfer.classification.classifier import (
    ClassifierState,
    build_classifier_state,
    classifier_lr_factor,
    classifier_plan,
    parameter_groups,
)
from hemoco.transfer.classification.training import classifier_steps, classify
from tests.helpers.ranks import run_ranks
from tests.helpers.shard_folders import write_shards

CPU = torch.device("cpu")
SIZES = (9, 8, 11, 12)
SMALL: dict[str, Any] = {
    "epochs": 2,
    "global_batch_size": 8,
    "size": 16,
    "resize": 16,
    "log_every_steps": 1,
    "stream": StreamConfig(workers=0, lanes=2, shards_per_block=2),
}
LINEAR = LinearClassifierConfig(lr=0.5, **SMALL)
WHOLE = FineTuneConfig(lr=0.1, backbone_lr=0.05, layer_decay=0.5, **SMALL)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(str(tmp_path_factory.mktemp("labelled")), SIZES)


def backbone() -> Backbone:
    encoder = EncoderConfig(architecture="resnet10t", stem="small")
    return random_backbone(encoder, 0, (0.5, 0.4, 0.3), (0.2, 0.2, 0.25)).to(CPU)


def fresh(config: ClassifierConfig, digest: str = "") -> ClassifierState:
    return build_classifier_state(config, backbone(), 3, seed=5, data_digest=digest)


def train(state: ClassifierState, url: str, steps: int | None = None) -> list[LoggedStep]:
    index, plan = read_index(url), classifier_plan(state.config, state.seed)
    source = batches(
        url,
        read_index(url),
        "train",
        plan,
        rank=rank(),
        world_size=world_size(),
        start=state.position,
        device=CPU,
        bad_samples=BadSampleFile("memory://unwritten"),
    )
    taken = []
    with closing(source):
        for step in classifier_steps(state, source, steps_per_epoch(index, "train", plan)):
            taken.append(step)
            if len(taken) == steps:
                break
    return taken


def digest_of(module: nn.Module) -> str:
    named = sorted(module.state_dict().items())
    return hashlib.sha256(
        b"".join(tensor.contiguous().numpy().tobytes() for _, tensor in named)
    ).hexdigest()


def made_batch(step: int, labels: tuple[int, ...] = (0, 1, 2, 0, 1, 2, 0, 1)) -> Batch:
    crops = torch.randint(
        256, (8, 1, 3, 16, 16), generator=torch.Generator().manual_seed(step), dtype=torch.uint8
    )
    return Batch(crops, [str(row) for row in range(8)], StreamPosition(0, step), labels=labels)


@pytest.mark.parametrize(
    ("config", "steps", "factors"),
    [
        (LinearClassifierConfig(), (0, 59, 60, 79, 80, 99), (1, 1, 0.1, 0.1, 0.01, 0.01)),
        (
            LinearClassifierConfig(epochs=90, schedule="cosine", lr=0.4, global_batch_size=1024),
            (0, 45, 89),
            (1, 0.5, 0.5 * (1 + math.cos(math.pi * 89 / 90))),
        ),
    ],
)
def test_the_learning_rate_is_that_of_the_official_protocols(
    config: ClassifierConfig, steps: tuple[int, ...], factors: tuple[float, ...]
) -> None:
    per_epoch = 7
    for epoch, factor in zip(steps, factors, strict=True):
        for step in (epoch * per_epoch, epoch * per_epoch + 6):  # once per epoch
            actual = classifier_lr_factor(config, step=step, steps_per_epoch=per_epoch)
            assert actual == pytest.approx(factor, rel=1e-12)


def test_the_warm_up_is_linear_and_the_cosine_begins_after_it() -> None:
    config = FineTuneConfig(epochs=12, warmup_epochs=2)
    steps = (0, 5, 10, 35)
    factors = [classifier_lr_factor(config, step=step, steps_per_epoch=5) for step in steps]
    assert factors == pytest.approx([0, 0.5, 1, 0.5])


def test_the_linear_protocol_trains_two_tensors_as_the_official_code() -> None:
    state = fresh(LinearClassifierConfig(**SMALL))
    trained = [
        name for name, parameter in state.model.named_parameters() if parameter.requires_grad
    ]
    assert trained == ["head.weight", "head.bias"]
    (group,) = state.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (30.0, 0.9, 0.0)
    assert len(group["params"]) == 2
    assert state.model.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not state.model.head.bias.any()


def test_a_frozen_backbone_stays_bit_for_bit(shards: str) -> None:
    state = fresh(LINEAR)
    before, head = digest_of(state.model.backbone), digest_of(state.model.head)
    train(state, shards)
    classify(state, shards, read_index(shards).split("train"))
    assert digest_of(state.model.backbone) == before
    assert digest_of(state.model.head) != head
    assert not state.model.backbone.training


def test_the_linear_protocol_equals_sgd_on_the_backbones_features() -> None:
    config = dataclasses.replace(LINEAR, flip=0.0)
    state, reference = fresh(config), backbone()
    head = nn.Linear(reference.num_features, 3)
    head.load_state_dict(state.model.head.state_dict())
    sgd = torch.optim.SGD(head.parameters(), lr=0.5, momentum=0.9)
    list(classifier_steps(state, map(made_batch, range(4)), 100))
    for step in range(4):
        crops, labels = made_batch(step).crops[:, 0], torch.tensor(made_batch(step).labels)
        with torch.no_grad():
            features = reference(reference.normalise(crops))
        sgd.zero_grad()
        functional.cross_entropy(head(features), labels).backward()
        sgd.step()
    torch.testing.assert_close(state.model.head.weight, head.weight, rtol=1e-4, atol=1e-5)


def test_fine_tuning_moves_the_backbone_and_its_batch_statistics(shards: str) -> None:
    state = fresh(WHOLE)
    before = {
        name: tensor.clone() for name, tensor in state.model.backbone.encoder.state_dict().items()
    }
    train(state, shards, steps=2)
    after = state.model.backbone.encoder.state_dict()
    unmoved = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    assert not {name for name in unmoved if "running_mean" in name or name.endswith("conv1.weight")}


def test_stages_learn_at_decaying_rates_and_every_parameter_is_in_one_group() -> None:
    state = fresh(WHOLE)
    groups = parameter_groups(state.model, WHOLE)
    backbone_lrs = [0.05 / 2**power for power in (4, 3, 2, 1, 0)]
    assert [group["base_lr"] for group in groups] == [0.1, *backbone_lrs]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in state.model.parameters())
    layer4 = state.model.backbone.encoder.get_submodule("layer4")
    layer4_ids = {id(parameter) for parameter in layer4.parameters()}
    assert {id(parameter) for parameter in groups[-1]["params"]} == layer4_ids


class Outcome(NamedTuple):
    losses: list[float]
    tensors: dict[str, Tensor]
    logits: Tensor
    labels: Tensor


def outcomes(configs: list[ClassifierConfig], url: str) -> list[Outcome]:
    return [outcome(config, url) for config in configs]


def outcome(config: ClassifierConfig, url: str) -> Outcome:
    state = fresh(config)
    losses = [step.values["train_loss"] for step in train(state, url, steps=4)]
    scores = classify(state, url, read_index(url).split("train"))
    return Outcome(losses, state.model.state_dict(), scores.logits, scores.labels)


def test_two_ranks_train_and_classify_as_one_process(shards: str) -> None:
    # Small learning rates: on images of one colour, rounding errors grow fast.
    configs = [LINEAR, dataclasses.replace(WHOLE, lr=0.01, backbone_lr=0.005)]
    expected = outcomes(configs, shards)
    # Rank 0 classifies the first and third shard, rank 1 the second and fourth.
    order = torch.cat(
        [torch.arange(0, 9), torch.arange(17, 28), torch.arange(9, 17), torch.arange(28, 40)]
    )
    for by_config in run_ranks(outcomes, 2, configs, shards):
        for actual, alone in zip(by_config, expected, strict=True):
            assert actual.losses == pytest.approx(alone.losses, rel=1e-4)
            for name, tensor in alone.tensors.items():
                torch.testing.assert_close(
                    actual.tensors[name], tensor, rtol=1e-3, atol=1e-4, msg=name
                )
            assert torch.equal(actual.labels, alone.labels[order])
            torch.testing.assert_close(actual.logits, alone.logits[order], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", [LINEAR, WHOLE])
def test_a_training_goes_on_from_a_checkpoint_bit_for_bit(
    config: ClassifierConfig, shards: str, tmp_path: Path
) -> None:
    whole, half = fresh(config, "d"), fresh(config, "d")
    losses = [step.values for step in train(whole, shards)]
    first = [step.values for step in train(half, shards, steps=7)]
    saved = save_checkpoint(half, str(tmp_path), attempt=0, keep_last=1)
    resumed = fresh(config, "d")
    load_checkpoint(saved, resumed)
    assert first + [step.values for step in train(resumed, shards)] == losses
    assert digest_of(resumed.model) == digest_of(whole.model)


def test_a_checkpoint_of_other_settings_seed_or_data_is_refused(tmp_path: Path) -> None:
    saved = save_checkpoint(fresh(LINEAR, "d"), str(tmp_path), attempt=0, keep_last=1)
    with pytest.raises(CheckpointError, match=r"transfer\.lr: 0\.5 -> 1\.0"):
        load_checkpoint(saved, fresh(dataclasses.replace(LINEAR, lr=1.0), "d"))
    with pytest.raises(CheckpointError, match="was begun on shards with digest d"):
        load_checkpoint(saved, fresh(LINEAR, "e"))
    other = build_classifier_state(LINEAR, backbone(), 3, seed=6, data_digest="d")
    with pytest.raises(CheckpointError, match="seed: 5 -> 6"):
        load_checkpoint(saved, other)


def test_scores_are_of_the_centre_view(shards: str) -> None:
    state = fresh(dataclasses.replace(LINEAR, resize=20))
    scores = classify(state, shards, read_index(shards).split("train"), batch_size=7)
    images, labels, _ = load_images(shards, read_index(shards), "train", 20)
    views = torch.stack([center_view(image, 16, 20) for image in images])
    with torch.no_grad():
        expected = state.model(state.model.backbone.normalise(views))
    assert torch.equal(scores.labels, labels)
    torch.testing.assert_close(scores.logits, expected)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_image_without_a_usable_label_is_named(wrong: int) -> None:
    state = fresh(LINEAR)
    with pytest.raises(ShardError, match=f"sample 2 has the label {wrong}: allowed are 0 to 2"):
        next(classifier_steps(state, [made_batch(0, (0, 1, wrong, 0, 1, 2, 0, 1))], 100))
    assert state.step == 0


def test_a_loss_that_is_not_finite_stops_before_the_step() -> None:
    state = fresh(LINEAR)
    with torch.no_grad():
        state.model.head.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 1"):
        next(classifier_steps(state, [made_batch(0)], 100))
