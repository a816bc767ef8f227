import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hemoco.models import info_nce as contrast
from hemoco.models.info_nce import batch_contrast, queue_contrast


def unit_rows(count: int, size: int, seed: int) -> Tensor:
    return functional.normalize(
        torch.randn(count, size, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def plain_loss(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """All logits in memory, as the paper's algorithm 1."""
    logits = (
        torch.cat([(queries * keys).sum(1, keepdim=True), queries @ queue], dim=1) / temperature
    )
    return functional.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_loss_and_gradient_equal_the_plain_form(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast, "_CHUNK_LOGITS", chunk * 5)
    raw = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    keys, queue = unit_rows(5, 16, 1).double(), unit_rows(100, 16, 2).T.double()
    ours = queue_contrast(functional.normalize(raw, dim=1), keys, queue, temperature).loss
    theirs = plain_loss(functional.normalize(raw, dim=1), keys, queue, temperature)
    (our_gradient,), (their_gradient,) = (
        torch.autograd.grad(3 * loss, raw) for loss in (ours, theirs)
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-6, atol=1e-9)


def test_the_papers_sizes_agree_to_a_millionth_in_float32() -> None:
    queries, keys, queue = (
        unit_rows(32, 128, 0).requires_grad_(),
        unit_rows(32, 128, 1),
        unit_rows(65536, 128, 2).T,
    )
    ours, theirs = (
        queue_contrast(queries, keys, queue, 0.07).loss,
        plain_loss(queries, keys, queue, 0.07),
    )
    (our_gradient,), (their_gradient,) = (
        torch.autograd.grad(loss, queries) for loss in (ours, theirs)
    )
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert (
        our_gradient - their_gradient
    ).norm() / their_gradient.norm() < 1e-5  # sums of 65,536 in another order


def test_logits_equal_a_loop_over_pairs() -> None:
    queries, keys, queue = unit_rows(3, 4, 0), unit_rows(3, 4, 1), unit_rows(5, 4, 2).T
    found = queue_contrast(queries, keys, queue, 0.2)
    for row in range(3):
        similarities = [
            sum(a * b for a, b in zip(queries[row].tolist(), k, strict=True))
            for k in queue.T.tolist()
        ]
        positive = sum(
            a * b for a, b in zip(queries[row].tolist(), keys[row].tolist(), strict=True)
        )
        assert found.positives[row].item() == pytest.approx(positive, abs=1e-6)
        assert found.negatives_ahead[row].item() == sum(s >= positive for s in similarities)
    assert found.negative_similarity.item() == pytest.approx(
        (queries @ queue).mean().item(), abs=1e-6
    )


@pytest.mark.parametrize(("count", "loss"), [(4096, 33.271), (256, 22.181)])
def test_equal_embeddings_cost_v3_four_t_log_n(count: int, loss: float) -> None:
    same = functional.normalize(torch.ones(count, 8), dim=1)
    both = 2 * batch_contrast(same, same, 0, 1.0).loss  # two directions
    assert both.item() == pytest.approx(loss, abs=1e-3)
    assert 2 * batch_contrast(same, same, 0, 0.2).loss.item() == pytest.approx(
        4 * 0.2 * math.log(count), rel=1e-5
    )


def test_v3s_positives_begin_at_the_ranks_first_key() -> None:
    queries, keys = unit_rows(2, 4, 0), unit_rows(6, 4, 1)
    found = batch_contrast(queries, keys, 4, 0.5)
    losses = []
    for row in range(2):
        similarities = [
            sum(a * b for a, b in zip(queries[row].tolist(), k, strict=True)) for k in keys.tolist()
        ]
        terms = [math.exp(s / 0.5) for s in similarities]
        losses.append(-math.log(terms[4 + row] / sum(terms)))
        assert found.positives[row].item() == pytest.approx(similarities[4 + row], abs=1e-6)
        assert found.negatives_ahead[row].item() == sum(s > similarities[4 + row] for s in similarities)
    assert found.loss.item() == pytest.approx(2 * 0.5 * sum(losses) / 2, rel=1e-5)
    others = [
        (queries[row] @ keys[column]).item()
        for row in range(2)
        for column in range(6)
        if column != 4 + row
    ]
    assert found.negative_similarity.item() == pytest.approx(sum(others) / 10, abs=1e-6)
