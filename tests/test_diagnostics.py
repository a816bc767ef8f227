import math

import pytest
import torch
from torch.nn import functional

from hemoco.diagnostics import COLLAPSED_STD, contrast_values, embedding_std, gradient_norm, pretext_accuracy


def test_isotropic_embeddings_have_std_one() -> None:
    embeddings = functional.normalize(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    assert embedding_std(embeddings).item() == pytest.approx(1, abs=0.02)


def test_constant_embeddings_raise_the_alarm() -> None:
    embeddings = functional.normalize(torch.ones(32, 64), dim=1)
    assert embedding_std(embeddings).item() < COLLAPSED_STD


def test_embedding_std_is_the_mean_over_components_times_root_size() -> None:
    rows = [[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]
    columns = list(zip(*rows, strict=True))
    stds = [math.sqrt(sum((x - sum(c) / 3) ** 2 for x in c) / 3) for c in columns]
    assert embedding_std(torch.tensor(rows)).item() == pytest.approx(sum(stds) / 2 * math.sqrt(2))


def test_pretext_accuracy_counts_positives_among_the_top() -> None:
    logits = torch.tensor([[5.0, 1, 2, 3], [2.5, 1, 2, 3], [0.0, 1, 2, 3], [3.0, 3, 3, 3]])  # the last one ties
    assert [pretext_accuracy(logits, top).item() for top in (1, 2, 4)] == [0.25, 0.5, 1.0]


def test_similarities_are_logits_times_temperature() -> None:
    values = contrast_values(torch.tensor([[4.0, 1.0, 3.0], [2.0, -1.0, -3.0]]), torch.eye(2), temperature=0.5)
    assert values["positive_similarity"].item() == 1.5
    assert values["negative_similarity"].item() == 0.0


def test_gradient_norm_is_over_all_parameters_that_have_one() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0])
    assert gradient_norm(parameters).item() == 5.0
