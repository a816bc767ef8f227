"""The fused loss against the plain form in float64, and both losses against loops over pairs."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hemoco.models import info_nce
from hemoco.models.info_nce import batch_contrast, queue_contrast


def unit_rows(count: int, size: int, seed: int) -> Tensor:
    return functional.normalize(
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def plain_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """All logits in memory, as the paper's algorithm 1."""
    positives = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positives, queries @ queue], dim=1) / temperature
    return functional.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_loss_and_gradient_equal_the_plain_form(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info_nce, "_CHUNK_LOGITS", chunk * 5)
    raw = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    keys, queue = unit_rows(5, 16, 1).double(), unit_rows(100, 16, 2).T.double()
    ours = queue_contrast(functional.normalize(raw, dim=1), keys, queue, temperature).loss
    theirs = plain_loss(functional.normalize(raw, dim=1), keys, queue, temperature)
    (our_gradient,) = torch.autograd.grad(3 * ours, raw)
    (their_gradient,) = torch.autograd.grad(3 * theirs, raw)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-9)


def test_the_papers_sizes_agree_to_a_millionth_in_float32() -> None:
    queries = unit_rows(32, 128, 0).requires_grad_()
    keys = unit_rows(32, 128, 1)
    queue = unit_rows(65536, 128, 2).T
    ours = queue_contrast(queries, keys, queue, 0.07).loss
    theirs = plain_loss(queries, keys, queue, 0.07)
    (our_gradient,) = torch.autograd.grad(ours, queries)
    (their_gradient,) = torch.autograd.grad(theirs, queries)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    # sums of 65,536 terms in another order
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5


def dot(first: Tensor, second: Tensor) -> float:
    return sum(a * b for a, b in zip(first.tolist(), second.tolist(), strict=True))


def test_logits_equal_a_loop_over_pairs() -> None:
    queries, keys, queue = unit_rows(3, 4, 0), unit_rows(3, 4, 1), unit_rows(5, 4, 2).T
    contrast = queue_contrast(queries, keys, queue, 0.2)
    for row in range(3):
        similarities = [dot(queries[row], negative) for negative in queue.T]
        positive = dot(queries[row], keys[row])
        assert contrast.positives[row].item() == pytest.approx(positive, abs=1e-6)
        assert contrast.negatives_ahead[row].item() == sum(s >= positive for s in similarities)
    mean = (queries @ queue).mean().item()
    assert contrast.negative_similarity.item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(("count", "loss"), [(4096, 33.271), (256, 22.181)])
def test_equal_embeddings_cost_v3_four_t_log_n(count: int, loss: float) -> None:
    same = functional.normalize(torch.ones(count, 8), dim=1)
    both = 2 * batch_contrast(same, same, 0, 1.0).loss  # two directions
    assert both.item() == pytest.approx(loss, abs=1e-3)
    both = 2 * batch_contrast(same, same, 0, 0.2).loss
    assert both.item() == pytest.approx(4 * 0.2 * math.log(count), rel=1e-5)


def test_v3s_positives_begin_at_the_ranks_first_key() -> None:
    queries, keys = unit_rows(2, 4, 0), unit_rows(6, 4, 1)
    contrast = batch_contrast(queries, keys, 4, 0.5)
    losses, negatives = [], []
    for row in range(2):
        similarities = [dot(queries[row], key) for key in keys]
        positive = similarities.pop(4 + row)
        negatives += similarities
        terms = [math.exp(s / 0.5) for s in (positive, *similarities)]
        losses.append(-math.log(terms[0] / sum(terms)))
        assert contrast.positives[row].item() == pytest.approx(positive, abs=1e-6)
        assert contrast.negatives_ahead[row].item() == sum(s > positive for s in similarities)
    assert contrast.loss.item() == pytest.approx(2 * 0.5 * sum(losses) / 2, rel=1e-5)
    assert contrast.negative_similarity.item() == pytest.approx(sum(negatives) / 10, abs=1e-6)
