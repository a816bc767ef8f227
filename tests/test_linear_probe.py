import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss

from hemoco.checkpoint import random_backbone
from hemoco.config import EncoderConfig, LinearProbeConfig
from hemoco.encoder import Backbone
from hemoco.errors import ConfigError, TrainingError
from hemoco.knn import extract_features
from hemoco.transfer.linear_probe import Heads, run_linear_probe, stratified_split
from hemoco.transfer.result import LabelledImages

TINY = EncoderConfig(architecture="resnet10t", stem="small")
CONFIG = LinearProbeConfig(epochs=20, batch_size=32, lrs=(0.01, 0.3, 3.0))


def coloured(count: int, seed: int) -> LabelledImages:
    """Noisy images of four shades; neighbouring classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    shades = torch.tensor([[90, 120, 120], [120, 90, 120], [120, 120, 90], [120, 120, 120]])[labels]
    noise = torch.randn(count, 3, 1, 1, generator=generator) * 12 + torch.randn(count, 3, 8, 8, generator=generator)
    return LabelledImages((shades.view(-1, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8), labels)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(TINY, 0, (0.45, 0.45, 0.45), (0.05, 0.05, 0.05))


def digest(backbone: Backbone) -> str:
    data = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        data.update(tensor.numpy().tobytes())
    return data.hexdigest()


def test_heads_train_as_torchs_sgd_trains_one() -> None:
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    heads = Heads((0.1, 1e30, 2.0), 3, 5, torch.Generator().manual_seed(1))  # the second diverges, alone
    linear = torch.nn.Linear(5, 3)
    linear.load_state_dict({"weight": heads.weight[2], "bias": heads.bias[2]})
    optimizer = torch.optim.SGD(linear.parameters(), lr=2.0, momentum=0.9)
    for decay in (1.0, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = 2.0 * decay
        loss = torch.nn.functional.cross_entropy(linear(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(heads.step(features, labels, decay)[2], loss.detach())
    torch.testing.assert_close(heads.weight[2], linear.weight)
    torch.testing.assert_close(heads.bias[2], linear.bias)


def test_classifier_starts_as_in_the_paper() -> None:
    heads = Heads((1.0, 2.0), 100, 500, torch.Generator().manual_seed(0))
    assert heads.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(heads.weight[0], heads.weight[1])
    assert heads.bias.eq(0).all()


def test_long_training_reaches_scikit_learns_minimum() -> None:
    # 3 features and overlapping classes: the minimum without a penalty is finite and unique, stopping early is not it
    colours = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    backbone = Backbone(colours, TINY, (0.45, 0.45, 0.45), (0.05, 0.05, 0.05)).eval()
    train, test = coloured(240, 0), coloured(400, 1)
    config = dataclasses.replace(CONFIG, epochs=300, batch_size=240, lrs=(0.01, 0.5))
    result = run_linear_probe(config, backbone, train, test, seed=0)
    features, test_features = (extract_features(backbone, split.images).numpy() for split in (train, test))
    peer = LogisticRegression(C=np.inf, max_iter=5000, tol=1e-8).fit(features, train.labels.numpy())
    final = result.history[-1][1]
    assert final["train_loss"] == pytest.approx(log_loss(train.labels, peer.predict_proba(features)), rel=1e-3)
    assert final["test_loss"] == pytest.approx(log_loss(test.labels, peer.predict_proba(test_features)), rel=5e-3)
    assert result.value == pytest.approx(peer.score(test_features, test.labels.numpy()), abs=0.005)  # 2 images of 400
    assert 0.5 < result.value < 1


def test_same_seed_gives_the_same_result_and_the_backbone_stays_as_it_is(backbone: Backbone) -> None:
    before = digest(backbone)
    first, again, other = (run_linear_probe(CONFIG, backbone, coloured(40, 0), coloured(40, 1), s) for s in (3, 3, 4))
    assert first == again
    assert first.history != other.history
    assert digest(backbone) == before


def test_history_has_every_epoch_and_the_result_is_the_last(backbone: Backbone) -> None:
    result = run_linear_probe(CONFIG, backbone, coloured(40, 0), coloured(40, 1), 0)
    assert [epoch for epoch, _ in result.history] == list(range(1, 21))
    assert result.history[-1][1].keys() == {"train_loss", "test_loss", "top1"}
    assert result.value == result.metrics["top1"] == result.history[-1][1]["top1"]
    assert result.history[-1][1]["train_loss"] < result.history[0][1]["train_loss"]
    assert result.metrics.keys() == {"top1", "per_class_accuracy", "lr", "held_out_top1"}


def test_learning_rate_that_diverges_is_not_chosen(backbone: Backbone) -> None:
    config = dataclasses.replace(CONFIG, lrs=(1e38, 0.3))
    result = run_linear_probe(config, backbone, coloured(40, 0), coloured(40, 1), 0)
    assert result.metrics["lr"] == 0.3
    with pytest.raises(TrainingError, match="all diverge; add lower"):
        run_linear_probe(dataclasses.replace(CONFIG, lrs=(1e38,)), backbone, coloured(40, 0), coloured(40, 1), 0)


def test_learning_rate_is_chosen_without_the_test_split(backbone: Backbone) -> None:
    wrong = LabelledImages(coloured(40, 1).images, (coloured(40, 1).labels + 1) % 4)
    right, misled = (run_linear_probe(CONFIG, backbone, coloured(80, 0), test, 0) for test in (coloured(40, 1), wrong))
    assert right.metrics["lr"] == misled.metrics["lr"]
    assert right.metrics["held_out_top1"] == misled.metrics["held_out_top1"]
    assert misled.value < right.value


def test_a_fifth_of_each_class_is_held_out() -> None:
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 10)
    fit, held_out = stratified_split(labels, seed=0)
    assert sorted([*fit.tolist(), *held_out.tolist()]) == list(range(85))
    assert np.bincount(labels[held_out]).tolist() == [10, 5, 2]
    assert not torch.equal(held_out, stratified_split(labels, seed=1)[1])


def test_too_few_images_to_hold_any_out_are_refused() -> None:
    with pytest.raises(ConfigError, match="train_split has 4 images: at least 5"):
        stratified_split(torch.zeros(4, dtype=torch.int64), seed=0)
