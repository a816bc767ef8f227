"""Diagnostics on embeddings whose values are known."""

import math
import statistics

import pytest
import torch
from torch.nn import functional

from hemoco.models.diagnostics import (
    COLLAPSED_STD,
    alignment,
    effective_rank,
    embedding_std,
    gradient_norm,
    pretext_accuracy,
    uniformity,
)


def test_isotropic_embeddings_have_std_one() -> None:
    embeddings = functional.normalize(
        torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert embedding_std(embeddings).item() == pytest.approx(1, abs=0.02)


def test_constant_embeddings_raise_the_alarm() -> None:
    embeddings = functional.normalize(torch.ones(32, 64), dim=1)
    assert embedding_std(embeddings).item() < COLLAPSED_STD


def test_embedding_std_is_the_mean_over_components_times_root_size() -> None:
    rows = [[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]
    stds = [statistics.pstdev(component) for component in zip(*rows, strict=True)]
    assert embedding_std(torch.tensor(rows)).item() == pytest.approx(sum(stds) / 2 * math.sqrt(2))


def test_pretext_accuracy_counts_positives_among_the_top() -> None:
    ahead = torch.tensor([0, 1, 3, 4])
    assert [pretext_accuracy(ahead, top).item() for top in (1, 2, 4)] == [0.25, 0.5, 0.75]


def test_alignment_uniformity_and_effective_rank_of_known_embeddings() -> None:
    corners = torch.eye(4)
    assert alignment(corners, corners).item() == 0
    assert alignment(corners, -corners).item() == pytest.approx(4)
    assert uniformity(corners).item() == pytest.approx(-4)  # all pairs at squared distance 2
    assert uniformity(torch.ones(4, 4) / 2).item() == 0
    assert effective_rank(corners).item() == pytest.approx(4)
    assert effective_rank(torch.ones(4, 4) / 2).item() == pytest.approx(1, abs=1e-3)
    assert effective_rank(corners[:, :2]).item() == pytest.approx(2)


def test_gradient_norm_is_over_all_parameters_that_have_one() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 2.0])
    assert gradient_norm(parameters).item() == 5.0
