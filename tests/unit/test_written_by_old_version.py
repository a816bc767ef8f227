"""Today's code reads the files of commit d410296 (version 0.1.0) and resumes its trainings.

tests/data/written_by_0.1.0/README.md describes the files; `expected.json` among them has the old
code's measurements. Losses and features may differ in the last digits between processors;
everything that is only read or drawn at random is exact.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, ResNet

from hemoco.backbones.file import backbone_metadata, export_backbone, load_backbone
from hemoco.config import (
    EncoderConfig,
    FineTuneConfig,
    MoCoConfig,
    MoCoV3Config,
    OptimizerConfig,
    PretrainConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.labelled import load_images
from hemoco.data.shards.index import read_index, read_shard, write_index, write_table
from hemoco.data.shards.tar import encode_shard, parse_tar
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import Batch, batches, pretraining_plan, steps_per_epoch
from hemoco.data.stream.loader import CropPlan, StreamPosition
from hemoco.features.extract import extract_features
from hemoco.report.files import contract_json
from hemoco.results.records import Pretraining, Row, RunResults
from hemoco.train.checkpoint import newest_checkpoint, resume_newest, save_checkpoint
from hemoco.train.pretrain import TrainState, batch_fingerprint, build_state, train_steps
from hemoco.transfer.classification.classifier import (
    ClassifierState,
    build_classifier_state,
    classifier_plan,
)
from hemoco.transfer.classification.training import classifier_steps

FOLDER = Path(__file__).parents[1] / "data" / "written_by_0.1.0"
SHARDS = str(FOLDER / "shards")
BACKBONE = str(FOLDER / "backbone.safetensors")
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
CPU = torch.device("cpu")
CLOSE = 1e-5
"""Largest relative difference of losses between processors; AVX-512, AVX2 and SSE stay below it.

The learning rates are low, since at higher ones a difference in the last digit grows to a percent
within ten steps."""
STREAM = StreamConfig(workers=0, lanes=2, shards_per_block=1)
V2 = PretrainConfig(
    epochs=3,
    global_batch_size=8,
    seed=11,
    log_every_steps=1,
    checkpoint_every_steps=5,
    knn_every_epochs=0,
    views=ViewsConfig(size=16),
    encoder=EncoderConfig(architecture="hemoco_test_resnet", stem="small"),
    moco=MoCoConfig(embedding_size=8, queue_length=24, momentum=0.9, bn_group_size=4),
    optimizer=OptimizerConfig(lr=0.003),
    stream=STREAM,
)
V3 = dataclasses.replace(
    V2,
    seed=12,
    encoder=dataclasses.replace(V2.encoder, zero_init_last=True),
    moco=MoCoV3Config(embedding_size=8, hidden_size=16, temperature=0.2),
    optimizer=OptimizerConfig(
        kind="lars", lr=0.02, weight_decay=1e-6, schedule="cosine_per_step", warmup_epochs=1
    ),
)
FINE_TUNE = FineTuneConfig(
    epochs=3,
    global_batch_size=8,
    lr=0.1,
    backbone_lr=0.05,
    layer_decay=0.5,
    size=16,
    resize=16,
    log_every_steps=1,
    stream=STREAM,
)
FINE_TUNE_SEED = 13
TRAININGS = ("pretrain_v2", "pretrain_v3", "fine_tune")

State = TrainState | ClassifierState


def hemoco_test_resnet(pretrained: bool = False, zero_init_last: bool = True, **_: Any) -> ResNet:
    """The network of the old files: a ResNet of four narrow blocks."""
    return ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=0,
        stem_type="deep",
        stem_width=4,
        channels=(8, 16, 16, 32),
        zero_init_last=zero_init_last,
    )


# EncoderConfig accepts only models that timm defines in this module.
hemoco_test_resnet.__module__ = "timm.models.resnet"
timm.models.register_model(hemoco_test_resnet)


def fresh_state(training: str) -> State:
    """The state of one of the trainings before its first step."""
    index = read_index(SHARDS)
    if training == "fine_tune":
        classes = len(index.classes)
        backbone = load_backbone(BACKBONE)
        return build_classifier_state(
            FINE_TUNE, backbone, classes, seed=FINE_TUNE_SEED, data_digest=index.digest
        )
    return build_state(V2 if training == "pretrain_v2" else V3, CPU, data_digest=index.digest)


def resumed_state(training: str) -> State:
    """The state of a training resumed from its old checkpoint."""
    state = fresh_state(training)
    assert resume_newest(str(FOLDER / training), state) == 1
    return state


def plan_of(state: State) -> CropPlan:
    if isinstance(state, TrainState):
        return pretraining_plan(state.config)
    return classifier_plan(state.config, state.seed)


def stream(plan: CropPlan, start: StreamPosition | None) -> Iterator[Batch]:
    """The batches after a position, in one process."""
    source = batches(
        SHARDS,
        read_index(SHARDS),
        "train",
        plan,
        rank=0,
        world_size=1,
        start=start,
        device=CPU,
        bad_samples=BadSampleFile("memory://unwritten"),
    )
    with closing(source):
        yield from source


def losses_to_the_end(state: State) -> list[float]:
    """Trains to the last step and returns the loss of each step."""
    plan = plan_of(state)
    source = stream(plan, state.position)
    per_epoch = steps_per_epoch(read_index(SHARDS), "train", plan)
    if isinstance(state, TrainState):
        return [step.values["loss"] for step in train_steps(state, source, per_epoch)]
    return [step.values["train_loss"] for step in classifier_steps(state, source, per_epoch)]


def tensors_digest(state: Any) -> str:
    """SHA-256 of all tensors in nested dictionaries and lists, with names, dtypes and shapes."""
    digest = hashlib.sha256()

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                walk(f"{name}/{index}", item)

    walk("", state)
    return digest.hexdigest()


def test_old_shards_hold_the_samples_that_were_packed() -> None:
    index = read_index(SHARDS)
    assert index.digest == EXPECTED["digest"]
    assert index.classes == ("columns", "rows")
    samples: dict[str, list[list[object]]] = {}
    for shard in index.shards:
        samples[shard.name] = [
            [sample.key, sample.label, hashlib.sha256(sample.image).hexdigest()]
            for sample in read_shard(SHARDS, shard)
        ]
    assert samples == EXPECTED["samples"]


def test_shards_index_and_sample_tables_are_still_written_with_the_same_bytes(
    tmp_path: Path,
) -> None:
    index = read_index(SHARDS)
    for shard in index.shards:
        old = Path(SHARDS, shard.name).read_bytes()
        content = parse_tar(old, shard.name)
        assert encode_shard(content.samples) == old
        write_table(str(tmp_path), shard, content.table)
    write_index(str(tmp_path), index)
    names = ["index.json", *(f"samples/{shard.sha256}.safetensors" for shard in index.shards)]
    for name in names:
        assert (tmp_path / name).read_bytes() == Path(SHARDS, name).read_bytes()


@pytest.mark.parametrize("training", TRAININGS)
def test_the_stream_draws_the_same_batches_from_old_shards(training: str) -> None:
    plan = plan_of(fresh_state(training))
    fingerprints = [batch_fingerprint(batch.keys, CPU) for batch in stream(plan, None)]
    assert fingerprints == EXPECTED[training]["fingerprints"]


@pytest.mark.parametrize("training", TRAININGS)
def test_an_old_checkpoint_is_loaded_bit_for_bit_and_draws_the_batches_that_are_left(
    training: str,
) -> None:
    expected, state = EXPECTED[training], resumed_state(training)
    assert state.step == expected["step"]
    assert tensors_digest(state.state_dict()) == expected["tensors"]
    left = [batch_fingerprint(batch.keys, CPU) for batch in stream(plan_of(state), state.position)]
    assert left == expected["fingerprints"][expected["step"] :]


@pytest.mark.parametrize("training", TRAININGS)
def test_a_training_resumed_from_an_old_checkpoint_has_the_losses_of_the_one_that_went_on(
    training: str,
) -> None:
    expected = EXPECTED[training]
    left = losses_to_the_end(resumed_state(training))
    assert left == pytest.approx(expected["losses"][expected["step"] :], rel=CLOSE)


@pytest.mark.parametrize("training", TRAININGS[:2])
def test_a_pretraining_begun_today_has_the_losses_of_the_old_one_up_to_its_checkpoint(
    training: str,
) -> None:
    first = EXPECTED[training]["losses"][: EXPECTED[training]["step"]]
    assert losses_to_the_end(fresh_state(training))[: len(first)] == pytest.approx(first, rel=CLOSE)


@pytest.mark.parametrize("training", TRAININGS)
def test_a_checkpoint_written_today_has_the_manifest_of_the_old_one(
    training: str, tmp_path: Path
) -> None:
    old = newest_checkpoint(str(FOLDER / training))
    new = save_checkpoint(resumed_state(training), str(tmp_path), attempt=0, keep_last=1)
    assert old is not None
    assert Path(new).name == Path(old).name
    manifests = [json.loads(Path(url, "manifest.json").read_text()) for url in (old, new)]
    for manifest in manifests:  # the bytes of the file depend on the version of torch
        del manifest["bytes"], manifest["sha256"]
    assert manifests[0] == manifests[1]


def test_an_old_backbone_gives_the_features_that_it_gave() -> None:
    backbone, expected = load_backbone(BACKBONE), EXPECTED["backbone"]
    assert tensors_digest(backbone.encoder.state_dict()) == expected["tensors"]
    images, labels, _ = load_images(SHARDS, read_index(SHARDS), "test", V2.views.size)
    assert labels.tolist() == [label for _, label, _ in EXPECTED["samples"]["test-000000.tar"]]
    features = extract_features(backbone, images)
    torch.testing.assert_close(features, torch.tensor(expected["features"]), rtol=1e-4, atol=1e-5)


def test_a_backbone_exported_today_has_the_metadata_of_the_old_one(tmp_path: Path) -> None:
    old = backbone_metadata(BACKBONE)
    given = {name: old[name] for name in ("data_digest", "run_id", "size")}
    new = str(tmp_path / "backbone.safetensors")
    export_backbone(load_backbone(BACKBONE), new, given)
    assert backbone_metadata(new) == old


def test_comparison_json_is_still_written_with_the_same_names_in_the_same_order() -> None:
    text = (FOLDER / "comparison.json").read_text()
    old = json.loads(text)
    pretraining = {
        name: math.nan if value is None else value for name, value in old["pretraining"].items()
    }
    rows = tuple(Row(**row) for row in old["rows"])
    results = RunResults(pretraining=Pretraining(**pretraining), rows=rows, failed=())
    assert contract_json(results) == text
