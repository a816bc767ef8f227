import hashlib
import math

import numpy as np
import pytest
import torch

from hemoco.backbones.file import random_backbone
from hemoco.config import EncoderConfig, KnnConfig
from hemoco.errors import ConfigError, ShardError
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.knn import knn_accuracy, knn_votes, make_bank, run_knn
from tests.helpers.labelled import images_of, in_memory

TINY = EncoderConfig(architecture="resnet10t", stem="small")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise around the means of ten classes, of which some images are taken for others."""
    labels = torch.arange(count) % 10
    return draw(10, 64, seed=9)[labels] * 0.5 + draw(count, 64, seed=seed) * 1.5, labels


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(
        256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return random_backbone(TINY, 0, MEAN, STD)


def slow_votes(
    bank: list[list[float]], labels: list[int], query: list[float], k: int, temperature: float
) -> dict[int, float]:
    """Votes by class, by the definition, without torch."""

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    def cosine(a: list[float], b: list[float]) -> float:
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))

    cosines = [cosine(query, image) for image in bank]
    ranked = sorted(zip(cosines, labels, strict=True), reverse=True)
    votes: dict[int, float] = {}
    for similarity, label in ranked[:k]:
        votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
    return votes


@pytest.mark.parametrize("k", [1, 7, 60])
def test_votes_equal_a_slow_loop(k: int) -> None:
    bank, queries, labels = draw(60, 5), draw(300, 5, seed=1) * 7, torch.arange(60) % 4
    parts = knn_votes(make_bank(bank, labels, 4), queries, neighbours=k, temperature=0.1)
    actual = torch.cat(list(parts))
    expected = torch.zeros(300, 4)
    for row, query in enumerate(queries.tolist()):
        for label, vote in slow_votes(bank.tolist(), labels.tolist(), query, k, 0.1).items():
            expected[row, label] = vote
    # in shares, since ours are relative to the vote of the nearest image
    torch.testing.assert_close(
        actual / actual.sum(1, keepdim=True), expected / expected.sum(1, keepdim=True)
    )


@pytest.mark.parametrize("k", [3, 2000, 69_000])
@pytest.mark.parametrize("images", [70_003, 131_072])
def test_a_bank_searched_in_parts_gives_the_votes_of_sorting_all_images(
    images: int, k: int
) -> None:
    bank, queries, labels = draw(images, 6), draw(5, 6, seed=1), torch.arange(images) % 7
    (actual,) = knn_votes(make_bank(bank, labels, 7), queries, neighbours=k, temperature=0.3)
    bank64, queries64 = bank.double().numpy(), queries.double().numpy()
    norms = np.linalg.norm(queries64, axis=1)[:, None] * np.linalg.norm(bank64, axis=1)
    similarities = queries64 @ bank64.T / norms
    for row, ranked in enumerate(np.argsort(-similarities, axis=1)[:, :k]):
        weights = np.exp((similarities[row, ranked] - similarities[row].max()) / 0.3)
        expected = np.bincount(ranked % 7, weights, 7)
        # not equal, since rounding may exchange the k-th image for the next
        np.testing.assert_allclose(actual[row], expected, rtol=1e-4)


def test_bfloat16_changes_few_predictions() -> None:
    (bank, labels), (queries, own) = clusters(5000, 0), clusters(3000, 1)

    def predict(dtype: torch.dtype) -> torch.Tensor:
        made = make_bank(bank, labels, 10, dtype)
        votes = knn_votes(made, queries, neighbours=100, temperature=0.1)
        return torch.cat([part.argmax(1) for part in votes])

    exact, rounded = predict(torch.float32), predict(torch.bfloat16)
    exact_accuracy = (exact == own).float().mean().item()
    rounded_accuracy = (rounded == own).float().mean().item()
    assert 0.7 < exact_accuracy < 0.99
    assert (exact == rounded).float().mean() > 0.985
    assert exact_accuracy == pytest.approx(rounded_accuracy, abs=0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_length_of_features_does_not_count(dtype: torch.dtype) -> None:
    (bank, labels), (queries, _) = clusters(300, 0), clusters(20, 1)
    lengths = torch.rand(300, 1, generator=torch.Generator().manual_seed(0)) + 1e-4

    def votes(features: torch.Tensor) -> torch.Tensor:
        made = make_bank(features, labels, 10, dtype)
        return next(knn_votes(made, queries, neighbours=9, temperature=0.1))

    tolerance = 0.3 if dtype == torch.bfloat16 else 1e-3
    torch.testing.assert_close(votes(bank), votes(bank * lengths), atol=tolerance, rtol=0)


def test_nearest_neighbour_of_an_image_is_itself() -> None:
    bank, labels = draw(50, 6), torch.arange(50) % 7
    assert knn_accuracy(bank, labels, bank * 3, labels, neighbours=1, temperature=0.1) == 1.0


def test_low_temperature_does_not_overflow() -> None:
    bank, labels = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1, 1])
    (votes,) = knn_votes(make_bank(bank, labels, 2), bank[:1], neighbours=3, temperature=1e-3)
    assert votes.argmax(dim=1).tolist() == [0]
    assert votes.isfinite().all()


@pytest.mark.parametrize("k", [0, 11])
def test_neighbours_must_be_in_the_bank(k: int) -> None:
    bank = make_bank(draw(10, 3), torch.zeros(10, dtype=torch.int64), 1)
    with pytest.raises(
        ConfigError, match=rf"knn.neighbours is {k}: it must be between 1 and the 10 images"
    ):
        next(knn_votes(bank, draw(2, 3), neighbours=k, temperature=0.1))


def test_temperature_must_be_positive() -> None:
    bank = make_bank(draw(10, 3), torch.zeros(10, dtype=torch.int64), 1)
    with pytest.raises(ConfigError, match=r"knn.temperature is 0"):
        next(knn_votes(bank, draw(2, 3), neighbours=1, temperature=0.0))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_images_find_themselves_and_the_backbone_stays_as_it_is(
    backbone: Backbone, precision: str
) -> None:
    def digest() -> str:
        tensors = backbone.state_dict().values()
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    before = digest()
    split = in_memory(noise_images(300), torch.arange(300) % 6, tuple("abcdef"))
    result = run_knn(KnnConfig(neighbours=1, precision=precision), backbone, split, split, 0)
    assert (result.metric, result.value) == ("top1", 1.0)
    assert result.metrics == {"top1": 1.0, "per_class_accuracy": 1.0, "top5": 1.0}
    assert result.files["confusion.csv"].startswith(
        b"class / predicted,a,b,c,d,e,f\na,50,0,0,0,0,0\nb,0,50"
    )
    assert digest() == before


def test_classes_without_votes_are_not_among_the_five(backbone: Backbone) -> None:
    train = in_memory(noise_images(12), torch.arange(12) % 6)
    wrong = in_memory(images_of(train), (train.labels + 1) % 6)
    result = run_knn(KnnConfig(neighbours=1), backbone, train, wrong, 0)
    assert result.metrics == {"top1": 0.0, "per_class_accuracy": 0.0, "top5": 0.0}


def test_test_classes_that_the_bank_lacks_are_refused(backbone: Backbone) -> None:
    train = in_memory(noise_images(6), torch.tensor([0, 1, 0, 1, 0, 1]))
    test = in_memory(images_of(train)[:4], torch.tensor([0, 1, 0, 2]), ("ant", "bee", "cat"))
    with pytest.raises(
        ShardError,
        match=r"test_split has 1 images of classes that .*lacks: 2 \(cat\): 1 images; pack",
    ):
        run_knn(KnnConfig(neighbours=1), backbone, train, test, 0)
