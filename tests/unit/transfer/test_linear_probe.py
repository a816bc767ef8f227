import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.preprocessing import StandardScaler

from hemoco.backbones.file import random_backbone
from hemoco.config import LinearProbeConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ConfigError, ShardError, TrainingError
from hemoco.features.cache import FeatureCache
from hemoco.features.extract import calibrate_batch_norm, extract_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification import linear_probe
from hemoco.transfer.classification.linear_probe import (
    Heads,
    Setting,
    evaluate_heads,
    new_heads,
    run_linear_probe,
    stratified_split,
    train_heads,
)
from tests.helpers.coloured_splits import TINY, coloured, digest
from tests.helpers.labelled import images_of, in_memory

CONFIG = LinearProbeConfig(epochs=20, batch_size=32, lrs=(0.01, 0.3, 3.0))


def draw_features(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (M, 5) of three classes."""
    labels = torch.arange(count) % 3
    noise = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    return noise + torch.eye(5)[labels], labels


def trained_by_torch(
    weight: torch.Tensor,
    features: torch.Tensor,
    labels: torch.Tensor,
    config: LinearProbeConfig,
    setting: Setting,
) -> tuple[torch.nn.Linear, list[float]]:
    """A classifier trained by autograd and torch's SGD in the order of seed 7, and its losses."""
    linear = torch.nn.Linear(5, 3)
    linear.load_state_dict({"weight": weight, "bias": torch.zeros(3)})
    optimizer = torch.optim.SGD(
        linear.parameters(), setting.lr, momentum=0.9, weight_decay=setting.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    generator, means = torch.Generator().manual_seed(7), []
    for _ in range(config.epochs):
        total = 0.0
        for rows in torch.randperm(len(labels), generator=generator).split(config.batch_size):
            loss = torch.nn.functional.cross_entropy(linear(features[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        schedule.step()
        means.append(total / len(labels))
    return linear, means


def digits() -> tuple[LabelledSplit, LabelledSplit]:
    """scikit-learn's digits of 8x8 pixels: 1,200 training and 597 test images."""
    scans = load_digits()
    grey = torch.from_numpy(scans.images / 16 * 255).to(torch.uint8)  # (1797, 8, 8)
    images = grey[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(scans.target).long()
    return in_memory(images[:1200], labels[:1200]), in_memory(images[1200:], labels[1200:])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(TINY, 0, (0.45, 0.45, 0.45), (0.05, 0.05, 0.05))


def test_grid_equals_separate_runs_of_torchs_sgd() -> None:
    features, labels = draw_features(50, 0)
    config = LinearProbeConfig(
        epochs=3, batch_size=16, lrs=(0.1, 1e38, 2.0), weight_decays=(0.0, 0.01, 0.3)
    )
    settings = [Setting(lr, decay) for lr in config.lrs for decay in config.weight_decays]
    heads = new_heads(settings, 3, features, seed=5)
    start = heads.weight.clone()
    losses = [loss for _, loss in train_heads(heads, features, labels, config, seed=7)]
    # the heads with the learning rate 1e38 diverge, and leave the others alone
    assert heads.weight[:, 3:6].isfinite().logical_not().any()
    for head in (0, 1, 2, 6, 7, 8):
        setting = settings[head]
        linear, expected = trained_by_torch(start[:, head], features, labels, config, setting)
        torch.testing.assert_close(heads.weight[:, head], linear.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(heads.bias[:, head], linear.bias, rtol=1e-4, atol=1e-5)
        if head == 0:
            assert losses == pytest.approx(expected, rel=1e-4)


def test_head_of_a_grid_is_the_head_alone() -> None:
    features, labels = draw_features(50, 0)
    settings = [Setting(0.1, 0.0), Setting(3.0, 0.01), Setting(0.5, 0.1)]
    grid, alone = new_heads(settings, 3, features, 1), new_heads(settings[1:2], 3, features, 1)
    for heads in (grid, alone):
        assert len(list(train_heads(heads, features, labels, CONFIG, seed=2))) == CONFIG.epochs
    torch.testing.assert_close(grid.weight[:, 1], alone.weight[:, 0], rtol=1e-4, atol=1e-5)


def test_classifier_starts_as_in_the_paper() -> None:
    settings = [Setting(1.0, 0.0), Setting(2.0, 0.1)]
    heads = Heads(settings, 100, 500, torch.Generator().manual_seed(0))
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(heads.weight[:, 0], heads.weight[:, 1])
    assert heads.bias.eq(0).all()


def test_evaluation_in_parts_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = draw_features(50, 0)
    heads = new_heads([Setting(0.1, 0.0), Setting(1.0, 0.0)], 3, features, 0)
    heads.bias[:, 1] += torch.tensor([0.0, 1.0, 0.0])
    monkeypatch.setattr(linear_probe, "_LOGITS_AT_ONCE", 7 * 6)
    losses, accuracies = evaluate_heads(heads, features, labels)
    for head in range(2):
        logits = features @ heads.weight[:, head].T + heads.bias[:, head]
        loss = torch.nn.functional.cross_entropy(logits, labels).item()
        accuracy = (logits.argmax(1) == labels).double().mean().item()
        assert losses[head].item() == pytest.approx(loss)
        assert accuracies[head].item() == pytest.approx(accuracy)


def test_long_training_reaches_scikit_learns_minimum() -> None:
    # With 3 features and overlapping classes, the minimum without a penalty is finite and unique.
    # Training that stops early does not reach it.
    colours = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    backbone = Backbone(colours, TINY, (0.45, 0.45, 0.45), (0.05, 0.05, 0.05)).eval()
    train, test = coloured(240, 0), coloured(400, 1)
    config = dataclasses.replace(CONFIG, epochs=300, batch_size=240, lrs=(0.01, 0.5))
    result = run_linear_probe(config, backbone, train, test, seed=0)
    features, test_features = (
        extract_features(backbone, images_of(split)).numpy() for split in (train, test)
    )
    peer = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-8).fit(features, train.labels.numpy())
    train_loss = log_loss(train.labels, peer.predict_proba(features))
    test_loss = log_loss(test.labels, peer.predict_proba(test_features))
    top1 = peer.score(test_features, test.labels.numpy())
    final = result.history[-1][1]
    assert final["train_loss"] == pytest.approx(train_loss, rel=1e-3)
    assert final["test_loss"] == pytest.approx(test_loss, rel=5e-3)
    assert result.value == pytest.approx(top1, abs=0.005)  # 2 images of 400
    assert 0.5 < result.value < 1


def test_probe_agrees_with_scikit_learn_on_exported_features(tmp_path: Path) -> None:
    backbone = random_backbone(TINY, 0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    train, test = digits()
    calibrate_batch_norm(backbone, images_of(train))
    config = LinearProbeConfig(
        epochs=60, batch_size=100, lrs=(0.3, 1.0), weight_decays=(1e-2,), lbfgs_check=True
    )
    result = run_linear_probe(config, backbone, train, test, 0, FeatureCache(tmp_path))
    exported = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    larger, smaller = sorted(exported, key=lambda file: -len(file["labels"]))
    features, labels = larger["features"], larger["labels"]
    test_features, test_labels = smaller["features"], smaller["labels"]
    peer = LogisticRegression(C=1 / (1e-2 * 1200), max_iter=5000).fit(features, labels)
    score = peer.score(test_features, test_labels)
    assert 0.8 < score < 0.99
    assert result.value == pytest.approx(score, abs=0.005)
    scaler = StandardScaler().fit(features)
    peer = LogisticRegression(max_iter=5000).fit(scaler.transform(features), labels)
    score = peer.score(scaler.transform(test_features), test_labels)
    assert result.metrics["lbfgs_top1"] == pytest.approx(score, abs=0.005)


def test_same_seed_gives_the_same_result_and_the_backbone_stays_as_it_is(
    backbone: Backbone,
) -> None:
    before = digest(backbone)
    first, again, other = (
        run_linear_probe(CONFIG, backbone, coloured(40, 0), coloured(40, 1), s) for s in (3, 3, 4)
    )
    assert first == again
    assert first.history != other.history
    assert digest(backbone) == before


def test_history_has_every_epoch_and_the_result_is_the_last(backbone: Backbone) -> None:
    result = run_linear_probe(CONFIG, backbone, coloured(40, 0), coloured(40, 1), 0)
    assert [epoch for epoch, _ in result.history] == list(range(1, 21))
    assert result.history[-1][1].keys() == {"train_loss", "test_loss", "top1"}
    assert result.value == result.metrics["top1"] == result.history[-1][1]["top1"]
    assert result.history[-1][1]["train_loss"] < result.history[0][1]["train_loss"]
    held_out = {f"held_out_top1/lr_{lr:g}_wd_0" for lr in CONFIG.lrs}
    others = {"top1", "per_class_accuracy", "lr", "weight_decay", "held_out_top1"}
    assert result.metrics.keys() == others | held_out
    assert result.metrics["held_out_top1"] == max(result.metrics[name] for name in held_out)
    assert result.files.keys() == {"classes.csv", "confusion.csv"}


def test_learning_rate_that_diverges_is_not_chosen(backbone: Backbone) -> None:
    config = dataclasses.replace(CONFIG, lrs=(1e38, 0.3))
    result = run_linear_probe(config, backbone, coloured(40, 0), coloured(40, 1), 0)
    assert result.metrics["lr"] == 0.3
    only_diverging = dataclasses.replace(CONFIG, lrs=(1e38,))
    with pytest.raises(TrainingError, match="all diverge; add lower"):
        run_linear_probe(only_diverging, backbone, coloured(40, 0), coloured(40, 1), 0)


def test_learning_rate_is_chosen_without_the_test_split(backbone: Backbone) -> None:
    wrong = in_memory(images_of(coloured(40, 1)), (coloured(40, 1).labels + 1) % 4)
    right, misled = (
        run_linear_probe(CONFIG, backbone, coloured(80, 0), test, 0)
        for test in (coloured(40, 1), wrong)
    )
    assert right.metrics["lr"] == misled.metrics["lr"]
    assert right.metrics["held_out_top1"] == misled.metrics["held_out_top1"]
    assert misled.value < right.value


def test_weight_decay_is_chosen_with_the_learning_rate(backbone: Backbone) -> None:
    # only the pair 0.3 and 1e-3 can learn
    config = dataclasses.replace(CONFIG, lrs=(1e-9, 0.3), weight_decays=(100.0, 1e-3))
    result = run_linear_probe(config, backbone, coloured(80, 0), coloured(40, 1), 0)
    assert (result.metrics["lr"], result.metrics["weight_decay"]) == (0.3, 1e-3)


def test_one_class_is_refused(backbone: Backbone) -> None:
    one = in_memory(images_of(coloured(40, 0)), torch.zeros(40, dtype=torch.int64))
    with pytest.raises(ShardError, match="name a split with at least two classes"):
        run_linear_probe(CONFIG, backbone, one, one, 0)


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 10)
    fit, held_out = stratified_split(labels, seed=0)
    assert sorted([*fit.tolist(), *held_out.tolist()]) == list(range(85))
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 2]
    assert not torch.equal(held_out, stratified_split(labels, seed=1)[1])


def test_too_few_images_to_hold_any_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="train_split has 4 images: at least 5"):
        stratified_split(torch.zeros(4, dtype=torch.int64), seed=0)
