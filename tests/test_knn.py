import math

import pytest
import torch

from hemoco.checkpoint import random_backbone
from hemoco.config import EncoderConfig, KnnConfig
from hemoco.errors import ConfigError
from hemoco.knn import extract_features, knn_accuracy, knn_predict, run_knn
from hemoco.transfer.frozen import accuracies, calibrate_batch_norm
from hemoco.transfer.result import LabelledImages

TINY = EncoderConfig(architecture="resnet10t", stem="small")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def slow_vote(bank: list, labels: list, query: list, k: int, temperature: float) -> int:  # type: ignore[type-arg]
    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def cosine(a: list[float], b: list[float]) -> float:
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    ranked = sorted(zip((cosine(query, image) for image in bank), labels, strict=True), reverse=True)
    votes: dict[int, float] = {}
    for similarity, label in ranked[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
    return max(votes, key=lambda label: votes[label])


@pytest.mark.parametrize("k", [1, 7, 60])
def test_vote_equals_a_slow_loop(k: int) -> None:
    bank, queries, labels = draw(60, 5), draw(300, 5, seed=1) * 7, torch.arange(60) % 4
    ours = knn_predict(bank, labels, queries, neighbours=k, temperature=0.1, classes=4)
    theirs = [slow_vote(bank.tolist(), labels.tolist(), query, k, 0.1) for query in queries.tolist()]
    assert ours.tolist() == theirs


def test_nearest_neighbour_of_an_image_is_itself() -> None:
    bank, labels = draw(50, 6), torch.arange(50) % 7
    assert knn_accuracy(bank, labels, bank * 3, labels, neighbours=1, temperature=0.1) == 1.0


def test_low_temperature_does_not_overflow() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1, 1])
    predicted = knn_predict(bank, labels, bank[:1], neighbours=3, temperature=1e-3, classes=2)
    assert predicted.tolist() == [0]


@pytest.mark.parametrize("k", [0, 11])
def test_neighbours_must_be_in_the_bank(k: int) -> None:
    bank, labels = draw(10, 3), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ConfigError, match=rf"knn.neighbours is {k}: it must be between 1 and the 10 images"):
        knn_predict(bank, labels, bank, neighbours=k, temperature=0.1, classes=1)


def test_temperature_must_be_positive() -> None:
    bank, labels = draw(10, 3), torch.zeros(10, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"knn.temperature is 0"):
        knn_predict(bank, labels, bank, neighbours=1, temperature=0.0, classes=1)


def test_features_do_not_depend_on_batch_or_mode_and_leave_the_backbone_alone() -> None:
    backbone = random_backbone(TINY, 0, MEAN, STD)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    expected = torch.cat([backbone((image[None] / 255 - 0.5) / 0.25) for image in images])
    backbone.train()
    features = extract_features(backbone, images, batch_size=2)
    torch.testing.assert_close(features, expected)
    assert backbone.training
    assert not features.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_unseen_test_classes_count_as_wrong() -> None:
    images = torch.randint(256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    train = LabelledImages(images, torch.tensor([0, 1, 0, 1, 0, 1]))
    test = LabelledImages(images[:4], torch.tensor([0, 1, 0, 2]))
    backbone = random_backbone(TINY, 0, MEAN, STD)
    result = run_knn(KnnConfig(neighbours=1), backbone, train, test, 0)
    assert (result.metric, result.value) == ("top1", 0.75)
    assert result.metrics == {"top1": 0.75, "per_class_accuracy": pytest.approx(2 / 3)}


def test_accuracies_weigh_images_or_classes() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    measured = accuracies(torch.tensor([0, 0, 1, 0]), labels)
    assert measured == {"top1": 0.5, "per_class_accuracy": pytest.approx((2 / 3 + 0) / 2)}


def test_calibration_gives_the_first_norm_the_statistics_of_the_images() -> None:
    backbone = random_backbone(TINY, 0, MEAN, STD)
    images = torch.randint(256, (300, 3, 8, 8), dtype=torch.uint8)
    weights = [parameter.clone() for parameter in backbone.parameters()]
    calibrate_batch_norm(backbone, images)
    norm, convolution = backbone.encoder.bn1, backbone.encoder.conv1
    outputs = [convolution(backbone.normalise(half)) for half in (images[::2], images[1::2])]  # 2 batches
    torch.testing.assert_close(norm.running_mean, sum(o.mean((0, 2, 3)) for o in outputs) / 2)
    torch.testing.assert_close(norm.running_var, sum(o.var((0, 2, 3)) for o in outputs) / 2)
    assert (norm.momentum, norm.num_batches_tracked, backbone.training) == (0.1, 2, False)
    assert all(torch.equal(a, b) for a, b in zip(weights, backbone.parameters(), strict=True))
