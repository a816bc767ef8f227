"""Writes the files of this folder, with the code of commit d410296 and no other.

    git worktree add /tmp/old d410296
    cd /tmp/old && OMP_NUM_THREADS=1 uv run python .../tests/data/written_by_0.1.0/make.py /tmp/written

The imports are those of that commit: they are not to be updated when modules move.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet

from hemoco.checkpoint import export_backbone, load_backbone, save_checkpoint
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
from hemoco.data.counts import BadSampleFile
from hemoco.data.loader import CropPlan, StreamPosition
from hemoco.data.shards import read_index, read_shard
from hemoco.data.stream import Batch, batches, load_images, pretraining_plan, steps_per_epoch
from hemoco.encoder import Backbone
from hemoco.train import TrainState, batch_fingerprint, build_state, train_steps
from hemoco.transfer.classifier import ClassifierState, build_classifier_state, classifier_plan
from hemoco.transfer.classifier_steps import classifier_steps
from hemoco.transfer.frozen import extract_features

CPU = torch.device("cpu")
STOP = 5
"""Steps before the checkpoint; an epoch has 4."""
STREAM = StreamConfig(workers=0, lanes=2, shards_per_block=1)
V2 = PretrainConfig(
    epochs=3,
    global_batch_size=8,
    seed=11,
    log_every_steps=1,
    checkpoint_every_steps=STOP,
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
    optimizer=OptimizerConfig(kind="lars", lr=0.02, weight_decay=1e-6, schedule="cosine_per_step", warmup_epochs=1),
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
RECIPE = """
from hemoco.config import *

recipe = Recipe(
    name="written",
    data=DataConfig(shards={shards!r}),
    pretrain=PretrainConfig(
        epochs=2,
        global_batch_size=8,
        log_every_steps=1,
        knn_every_epochs=1,
        views=ViewsConfig(size=16),
        encoder=EncoderConfig(architecture="test_resnet", stem="small"),
        moco=MoCoConfig(embedding_size=8, queue_length=24, bn_group_size=4),
        stream=StreamConfig(workers=0, lanes=2),
    ),
    transfers={{
        "knn": KnnConfig(neighbours=3),
        "linear_probe": LinearProbeConfig(epochs=2, batch_size=8, seeds=(0, 1)),
    }},
)
"""


def hemoco_test_resnet(pretrained: bool = False, zero_init_last: bool = True, **_: Any) -> ResNet:
    """A ResNet of four narrow blocks, 25,000 parameters, so that a checkpoint is small."""
    return ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=0,
        stem_type="deep",
        stem_width=4,
        channels=(8, 16, 16, 32),
        zero_init_last=zero_init_last,
    )


hemoco_test_resnet.__module__ = "timm.models.resnet"  # EncoderConfig takes the models of this module
timm.models.register_model(hemoco_test_resnet)


def main() -> None:
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory(prefix="written-") as name:
        work = Path(name)
        os.environ["HEMOCO_HOME"] = str(work / "home")
        draw_images(work / "images")
        shards = out / "shards"
        jobs("pack", str(work / "images"), str(shards), "--samples_per_shard", "16")
        (work / "recipe.py").write_text(RECIPE.format(shards=str(shards)))
        jobs("run", str(work / "recipe.py"), "--run", "written", "--out", str(work / "results"))
        (out / "comparison.json").write_bytes((work / "results" / "comparison.json").read_bytes())
    url = str(shards)
    index = read_index(url)
    samples = {
        shard.name: [[s.key, s.label, hashlib.sha256(s.image).hexdigest()] for s in read_shard(url, shard)]
        for shard in index.shards
    }
    expected: dict[str, Any] = {"digest": index.digest, "samples": samples}
    v2 = build_state(V2, CPU, data_digest=index.digest)
    expected["pretrain_v2"] = train(v2, url, out / "pretrain_v2")
    expected["pretrain_v3"] = train(build_state(V3, CPU, data_digest=index.digest), url, out / "pretrain_v3")
    backbone = Backbone(v2.model.query_encoder.encoder, V2.encoder, V2.views.mean, V2.views.std)
    facts = {"data_digest": index.digest, "run_id": "none", "size": str(V2.views.size)}
    export_backbone(backbone, str(out / "backbone.safetensors"), facts)
    loaded = load_backbone(str(out / "backbone.safetensors"))
    images, _, _ = load_images(url, "test", V2.views.size)
    expected["backbone"] = {
        "tensors": tensors_digest(loaded.encoder.state_dict()),
        "features": extract_features(loaded, images).tolist(),
    }
    classifier = build_classifier_state(
        FINE_TUNE, loaded, len(index.classes), seed=FINE_TUNE_SEED, data_digest=index.digest
    )
    expected["fine_tune"] = train(classifier, url, out / "fine_tune")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def draw_images(folder: Path) -> None:
    """32 images of the training split and 8 of the test split, in two classes and two formats."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for label, name in enumerate(("rows", "columns")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                stripes = np.tile(draw.integers(256, size=(20, 1, 3)), (1, 24, 1))
                pixels = stripes if label == 0 else np.tile(draw.integers(256, size=(1, 24, 3)), (20, 1, 1))
                suffix = "png" if number % 2 else "jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number:02d}.{suffix}")


def jobs(*argv: str) -> None:
    subprocess.run([sys.executable, "-m", "jobs", *argv], check=True)


def train(state: TrainState | ClassifierState, url: str, folder: Path) -> dict[str, Any]:
    """Trains to the end, and saves a checkpoint on the way; what was measured."""
    per_epoch = steps_per_epoch(read_index(url), "train", plan_of(state))
    fingerprints: list[float] = []

    def noted() -> Iterator[Batch]:
        with closing(stream(url, plan_of(state), None)) as source:
            for batch in source:
                fingerprints.append(batch_fingerprint(batch.keys, CPU))
                yield batch

    steps = train_steps if isinstance(state, TrainState) else classifier_steps
    losses: list[float] = []
    tensors = ""
    for done in steps(state, noted(), per_epoch):
        losses.append(done.values["loss" if isinstance(state, TrainState) else "train_loss"])
        if done.step == STOP:
            save_checkpoint(state, str(folder), attempt=0, keep_last=1)
            tensors = tensors_digest(state.state_dict())
    return {"step": STOP, "tensors": tensors, "losses": losses, "fingerprints": fingerprints}


def plan_of(state: TrainState | ClassifierState) -> CropPlan:
    if isinstance(state, TrainState):
        return pretraining_plan(state.config)
    return classifier_plan(state.config, state.seed)


def stream(url: str, plan: CropPlan, start: StreamPosition | None) -> Iterator[Batch]:
    unwritten = BadSampleFile("memory://unwritten")
    return batches(url, "train", plan, rank=0, world_size=1, start=start, device=CPU, bad_samples=unwritten)


def tensors_digest(state: Any) -> str:
    """One digest of all tensors in nested dictionaries and lists, with their names, types and shapes."""
    digest = hashlib.sha256()

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(f"{name}/{key}", value[key])
        elif isinstance(value, list | tuple):
            for place, item in enumerate(value):
                walk(f"{name}/{place}", item)

    walk("", state)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
