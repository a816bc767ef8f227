import math

import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    top_k_accuracy_score,
)

from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ShardError
from hemoco.transfer.classification.scores import (
    ClassCounts,
    check_labels,
    class_metrics,
    classification_result,
    count_predictions,
    sum_counts,
)
from tests.helpers.labelled import in_memory

PNG = b"\x89PNG\r\n"


def scored(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (M, C) that are right more often than by chance, and labels (M,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (images,), generator=generator)
    noise = torch.randn(images, classes, generator=generator)
    return noise + torch.nn.functional.one_hot(labels, classes), labels


def split(*labels: int, classes: tuple[str, ...] = ()) -> LabelledSplit:
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    return in_memory(images, torch.tensor(labels).long(), classes)


def test_metrics_are_those_of_scikit_learn() -> None:
    scores, labels = scored(300, 8)
    counts = count_predictions(scores, labels)
    predictions = scores.argmax(dim=1)
    assert counts.confusion.tolist() == confusion_matrix(labels, predictions).tolist()
    assert class_metrics(counts) == pytest.approx(
        {
            "top1": accuracy_score(labels, predictions),
            "per_class_accuracy": balanced_accuracy_score(labels, predictions),
            "top5": top_k_accuracy_score(labels, scores, k=5),
        }
    )


def test_counts_of_batches_add_up() -> None:
    scores, labels = scored(50, 6)
    parts = [
        count_predictions(*part) for part in zip(scores.split(7), labels.split(7), strict=True)
    ]
    whole, added = count_predictions(scores, labels), sum_counts(parts)
    assert torch.equal(whole.confusion, added.confusion)
    assert whole.top5 == added.top5


def test_classes_that_do_not_occur_are_in_no_mean() -> None:
    counts = count_predictions(torch.eye(4)[[0, 0, 1, 0]], torch.tensor([0, 0, 0, 2]))
    assert class_metrics(counts) == {
        "top1": 0.5,
        "per_class_accuracy": pytest.approx((2 / 3 + 0) / 2),
    }


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_given_where_there_are_more_than_five_classes(classes: int) -> None:
    metrics = class_metrics(count_predictions(*scored(20, classes)))
    assert ("top5" in metrics) == (classes > 5)
    assert metrics.get("top5", 1.0) >= metrics["top1"]


@pytest.mark.parametrize("score", [0.0, math.nan])
def test_equal_or_undefined_scores_are_no_hits_among_the_five(score: float) -> None:
    assert count_predictions(torch.full((10, 10), score), torch.arange(10)).top5 == 0


def test_files_have_a_line_for_each_class() -> None:
    counts = ClassCounts(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), 6)
    result = classification_result(
        counts, ("cat", "dog, wet"), also={"lr": 0.1}, history=[(1, {"top1": 0.5})]
    )
    assert result.files["confusion.csv"].decode() == (
        'class / predicted,cat,"dog, wet",2\ncat,3,1,0\n"dog, wet",0,2,0\n2,0,0,0\n'
    )
    assert result.files["classes.csv"].decode() == (
        "class,name,images,right,accuracy\n"
        '0,cat,4,3,0.750000\n1,"dog, wet",2,2,1.000000\n2,2,0,0,\n'
    )
    assert result.images["confusion"].startswith(PNG)
    assert (result.value, result.metrics["lr"]) == (5 / 6, 0.1)
    assert result.history == [(1, {"top1": 0.5})]


@pytest.mark.parametrize("names", [("$x^", "é" * 40, "long" * 40), ("鳥", "", "_")])
def test_any_names_can_be_drawn(names: tuple[str, ...]) -> None:
    result = classification_result(count_predictions(*scored(9, 3)), names, also={})
    assert result.images["confusion"].startswith(PNG)


@pytest.mark.parametrize(("classes", "drawn"), [(16, True), (100, True), (101, False)])
def test_confusion_of_very_many_classes_is_a_table_only(classes: int, drawn: bool) -> None:
    result = classification_result(count_predictions(*scored(50, classes)), (), also={})
    assert ("confusion" in result.images) == drawn
    assert result.files["confusion.csv"].count(b"\n") == classes + 1


def test_labels_that_fit_give_the_number_of_classes() -> None:
    assert check_labels(split(0, 4, 0), split(4, 4)) == 5


def test_classes_without_test_images_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    check_labels(split(0, 1, 1, classes=("ant", "bee")), split(0))
    assert "event=classes_without_test_images classes=1 (bee): 2 images" in caplog.text


def test_test_classes_that_training_lacks_are_named_and_counted() -> None:
    with pytest.raises(
        ShardError, match=r"has 3 images of classes .*lacks: 2 \(cow\): 2 images, 3: 1 images; pack"
    ):
        check_labels(split(0, 1), split(0, 2, 2, 3, classes=("ant", "bee", "cow")))


def test_of_many_lacking_classes_five_are_named() -> None:
    with pytest.raises(ShardError, match=r"2: 1 images, .*6: 1 images and 33 more; pack"):
        check_labels(split(0, 1), split(*range(40)))


def test_a_training_split_of_one_class_is_refused() -> None:
    with pytest.raises(
        ShardError,
        match=r"all 3 images are of class 1 \(bee\): 3 images; name a split with at least two",
    ):
        check_labels(split(1, 1, 1, classes=("ant", "bee")), split(1))


@pytest.mark.parametrize("name", ["train_split", "test_split"])
def test_empty_and_unlabelled_splits_are_refused(name: str) -> None:
    good = split(0, 1)
    cases = {"has no images": split(), "2 of 3 images have no label": split(0, -1, -1)}
    for message, bad in cases.items():
        train, test = (bad, good) if name == "train_split" else (good, bad)
        with pytest.raises(ShardError, match=rf"data.{name}:? {message}"):
            check_labels(train, test)
