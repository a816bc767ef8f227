import statistics

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hemoco.backbones.file import random_backbone
from hemoco.config import LowShotConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ConfigError, ShardError
from hemoco.features.extract import extract_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.low_shot import (
    Standardisation,
    count_shots,
    draw_shots,
    fit_logistic_regression,
    run_low_shot,
)
from tests.helpers.coloured_splits import TINY, coloured, digest
from tests.helpers.labelled import images_of, in_memory


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(TINY, 0, (0.45, 0.45, 0.45), (0.05, 0.05, 0.05))


def labelled(counts: list[int]) -> LabelledSplit:
    """A split with `counts` images of each class."""
    labels = torch.repeat_interleave(torch.tensor(counts))
    return in_memory(torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels)


@pytest.mark.parametrize("classes", [2, 4])
def test_minimum_is_that_of_scikit_learn(classes: int) -> None:
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(40) % classes
    weight, bias = fit_logistic_regression(features, labels, classes, weight_decay=0.1)
    # scikit-learn's loss is C * sum of cross-entropies + |weight|^2 / 2
    peer = LogisticRegression(C=1 / (0.1 * 40), tol=1e-10, max_iter=10_000)
    peer.fit(features.numpy(), labels.numpy())
    probabilities = (features @ weight.T + bias).softmax(dim=1)
    if classes > 2:  # for two classes scikit-learn fits one vector, which is another penalty
        expected = torch.from_numpy(peer.predict_proba(features.numpy()))
        torch.testing.assert_close(probabilities, expected, atol=1e-4, rtol=0)
    errors = probabilities - torch.nn.functional.one_hot(labels)
    gradient = errors.T @ features / 40 + 0.1 * weight
    assert gradient.abs().max() < 1e-5


def test_separable_classes_converge() -> None:
    features = torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * 1e3
    weight, bias = fit_logistic_regression(features, torch.tensor([0, 1]), 2, weight_decay=1e-3)
    assert (features @ weight.T + bias).argmax(dim=1).tolist() == [0, 1]
    assert weight.isfinite().all()


def test_each_class_is_drawn_alike_without_repeats() -> None:
    labels = torch.tensor([0, 1, 2] * 10)
    generator = torch.Generator().manual_seed(0)
    first, second = (draw_shots(labels, [4, 4, 4], generator) for _ in range(2))
    assert labels[first].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(first.tolist())) == 12
    assert not torch.equal(first, second)
    assert sorted(draw_shots(labels, [10, 10, 10], generator).tolist()) == list(range(30))


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.01, [3, 1, 0, 1]), (0.1, [30, 5, 0, 1]), (0.99, [297, 50, 0, 1])]
)
def test_fraction_is_of_each_class_and_at_least_one(fraction: float, expected: list[int]) -> None:
    assert count_shots(labelled([300, 50, 0, 1]), LowShotConfig(fraction=fraction)) == expected


def test_shots_are_of_each_class_that_has_images() -> None:
    assert count_shots(labelled([3, 0, 5]), LowShotConfig(shots=3)) == [3, 0, 3]


@pytest.mark.parametrize(("second", "others"), [(9, ""), (4, ", and 1 more classes have too few")])
def test_class_with_too_few_images_is_named(second: int, others: str) -> None:
    message = (
        rf"low_shot.shots is 5: class 1 \(bee\) has 2 images in train_split{others}; .* at most 2"
    )
    split = labelled([9, 2, second])._replace(classes=("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match=message):
        count_shots(split, LowShotConfig(shots=5))


def test_class_that_only_the_test_split_has_is_named(backbone: Backbone) -> None:
    train, test = coloured(40, 0), coloured(8, 1)
    relabelled = in_memory(images_of(test), test.labels + 1)
    with pytest.raises(ShardError, match="lacks: 4: 2 images"):
        run_low_shot(LowShotConfig(), backbone, train, relabelled, 0)


def test_standardisation_is_that_of_numpy() -> None:
    noise = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))
    features = noise * 5 + 100  # so many that they are summed in two parts
    float64 = features.double().numpy()
    expected = (float64[:9] - float64.mean(axis=0)) / float64.std(axis=0)
    np.testing.assert_allclose(Standardisation.of(features)(features[:9]), expected, rtol=1e-9)


def test_accuracy_is_that_of_scikit_learn_on_the_same_draws(backbone: Backbone) -> None:
    train, test = coloured(80, 0), coloured(200, 1)
    config = LowShotConfig(shots=5, draws=3, weight_decay=1e-2)
    result = run_low_shot(config, backbone, train, test, seed=7)
    features, test_features = (
        extract_features(backbone, images_of(s)).double().numpy() for s in (train, test)
    )
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    deviation[deviation <= 1e-6] = 1
    generator, scores = torch.Generator().manual_seed(7), []
    for _ in range(3):
        rows = draw_shots(train.labels, [5] * 4, generator).numpy()
        peer = LogisticRegression(C=1 / (1e-2 * 20), tol=1e-8, max_iter=10_000)
        peer.fit((features[rows] - mean) / deviation, train.labels.numpy()[rows])
        scores.append(peer.score((test_features - mean) / deviation, test.labels.numpy()))
    one_image = 1 / 200
    assert result.value == pytest.approx(statistics.fmean(scores), abs=one_image)
    assert result.metrics["std"] == pytest.approx(statistics.stdev(scores), abs=one_image)
    quantile = 4.303  # Student's t with 2 degrees of freedom
    half_width = quantile * result.metrics["std"] / 3**0.5
    assert result.metrics["ci95"] == pytest.approx(half_width, rel=1e-4)
    assert result.metrics["labelled_images"] == 20
    lines = result.files["classes.csv"].splitlines()[1:]
    assert sum(int(line.split(b",")[2]) for line in lines) == 3 * 200


def test_same_seed_gives_the_same_result_and_the_backbone_stays_as_it_is(
    backbone: Backbone,
) -> None:
    before = digest(backbone)
    config = LowShotConfig(shots=1, draws=3)
    first, again, other = (
        run_low_shot(config, backbone, coloured(40, 0), coloured(80, 1), s) for s in (3, 3, 4)
    )
    assert first == again
    assert first != other
    assert digest(backbone) == before


def test_backbones_see_the_same_draws_of_a_fraction(backbone: Backbone) -> None:
    train, test = coloured(80, 0), coloured(40, 1)
    config = LowShotConfig(fraction=0.1, draws=2)
    first, again = (run_low_shot(config, backbone, train, test, 3) for _ in range(2))
    assert first == again
    assert first.metrics["labelled_images"] == 8


def test_one_draw_has_no_deviation(backbone: Backbone) -> None:
    config = LowShotConfig(shots=2, draws=1)
    result = run_low_shot(config, backbone, coloured(40, 0), coloured(40, 1), 0)
    assert result.metrics.keys() == {"top1", "per_class_accuracy", "labelled_images"}
    assert (result.metric, result.history) == ("top1", [])


def test_features_that_are_constant_in_training_do_not_dominate(backbone: Backbone) -> None:
    grey = in_memory(torch.full((8, 3, 8, 8), 120, dtype=torch.uint8), torch.arange(8) % 4)
    result = run_low_shot(LowShotConfig(shots=2, draws=2), backbone, grey, coloured(40, 1), 0)
    assert result.value == 0.25  # nothing can be learnt, so all test images get the same class
