"""Metrics and files common to all classification transfers.

Scores are reduced to counts of predictions by class. Counts of batches, processes and draws can be
added, and all metrics follow from them.

Shapes: M images, C classes.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ShardError
from hemoco.transfer.result import TransferResult

logger = logging.getLogger(__name__)

_TOP = 5
_MAX_CLASSES_DRAWN = 100  # with more classes there is no picture of the confusion
_MAX_CLASSES_NUMBERED = 15  # with more classes the cells of the picture have no numbers
_NAME_LETTERS = 16  # of a class name beside the picture
_CLASSES_LISTED = 5  # classes that a message names


class ClassCounts(NamedTuple):
    """Counts of predictions for labelled images."""

    confusion: Tensor
    """Images by class (row) and predicted class (column), int64 (C, C) on the CPU."""
    top5: int
    """Images whose class is among the five with the highest scores."""


def check_labels(train: LabelledSplit, test: LabelledSplit) -> int:
    """Checks that the labels of the two splits fit each other and returns C, the number of classes.

    Classes without test images are logged; means over classes leave them out.

    Raises:
        ShardError: a split is empty or has unlabelled images; all training images are of one class;
            the test split has classes that the training split lacks.
    """
    for name, split in (("train_split", train), ("test_split", test)):
        if not len(split.labels):
            raise ShardError(f"data.{name} has no images: name another split")
        unlabelled = int((split.labels < 0).sum())
        if unlabelled:
            raise ShardError(
                f"data.{name}: {unlabelled} of {len(split.labels)} images have no label; pack it "
                "from class folders"
            )
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    train_counts = train.labels.cpu().bincount(minlength=classes)  # (C,)
    test_counts = test.labels.cpu().bincount(minlength=classes)  # (C,)
    if train_counts.count_nonzero() < 2:
        raise ShardError(
            f"data.train_split: all {len(train.labels)} images are of class "
            f"{_describe_classes(train_counts, train.classes)}; name a split with at least two "
            "classes, so that there is something to learn"
        )
    only_in_test = test_counts.where(train_counts == 0, 0)
    if only_in_test.any():
        raise ShardError(
            f"data.test_split has {int(only_in_test.sum())} images of classes that "
            f"data.train_split lacks: {_describe_classes(only_in_test, test.classes)}; pack both "
            "splits from the same class folders"
        )
    only_in_train = train_counts.where(test_counts == 0, 0)
    if only_in_train.any():
        logger.warning(
            "event=classes_without_test_images classes=%s",
            _describe_classes(only_in_train, train.classes),
        )
    return classes


def count_predictions(scores: Tensor, labels: Tensor) -> ClassCounts:
    """Counts the predictions; the predicted class is the one with the highest score.

    An image counts for `top5` if fewer than five other classes score at least as high as its own.

    Args:
        scores: (M, C), higher is more likely.
        labels: (M,), on the same device.
    """
    classes = scores.shape[1]
    cells = labels * classes + scores.argmax(dim=1)  # (M,), index into the flat confusion
    label_scores = scores.gather(1, labels[:, None])  # (M, 1)
    # `not <` instead of `>=`, so that a nan score counts against the image.
    rivals = (~(scores < label_scores)).sum(dim=1) - 1  # (M,)
    return ClassCounts(
        confusion=cells.cpu().bincount(minlength=classes**2).view(classes, classes),
        top5=int((rivals < _TOP).sum().item()),
    )


def sum_counts(parts: Iterable[ClassCounts]) -> ClassCounts:
    """Adds the counts of batches, processes or draws; needs at least one."""
    confusions, tops = zip(*parts, strict=True)
    return ClassCounts(torch.stack(confusions).sum(dim=0), sum(tops))


def class_metrics(counts: ClassCounts) -> dict[str, float]:
    """Computes `top1`, `top5` and `per_class_accuracy`, all in [0, 1].

    `per_class_accuracy` is the mean over the classes that occur. `top5` is left out with five
    classes or fewer.
    """
    images = int(counts.confusion.sum())
    accuracies = class_accuracies(counts.confusion)
    metrics = {
        "top1": int(counts.confusion.trace()) / images,
        "per_class_accuracy": accuracies[~accuracies.isnan()].mean().item(),
    }
    if len(accuracies) > _TOP:
        metrics["top5"] = counts.top5 / images
    return metrics


def class_accuracies(confusion: Tensor) -> Tensor:
    """The accuracy of each class, float64 (C,); nan for a class without images."""
    return confusion.diagonal().double() / confusion.sum(dim=1)


def classification_result(
    counts: ClassCounts,
    classes: Sequence[str],
    *,
    also: dict[str, float],
    history: Sequence[tuple[int, dict[str, float]]] = (),
) -> TransferResult:
    """The result of a classification transfer; its headline is top1.

    Files: `classes.csv` (accuracy of each class) and `confusion.csv`, for up to 100 classes also
    the picture `confusion.png`.

    Args:
        counts: counts of the test images.
        classes: class names by label; a label without a name is shown as its number.
        also: further metrics.
        history: values by epoch or step of the training, if there was any.
    """
    metrics = class_metrics(counts) | also
    labels = range(len(counts.confusion))
    names = [classes[label] if label < len(classes) else str(label) for label in labels]
    images = {}
    if len(names) <= _MAX_CLASSES_DRAWN:
        images["confusion"] = confusion_picture(counts.confusion, names)
    return TransferResult(
        metric="top1",
        value=metrics["top1"],
        metrics=metrics,
        history=list(history),
        images=images,
        files={
            "classes.csv": _class_table(counts.confusion, names),
            "confusion.csv": _confusion_table(counts.confusion, names),
        },
    )


def confusion_picture(confusion: Tensor, names: Sequence[str]) -> bytes:
    """Draws a confusion (C, C) as a PNG.

    A row is a class, and each cell the share of the class's images that were predicted as the
    column's class. Cells have numbers for up to 15 classes.
    """
    from matplotlib.figure import Figure

    shares = (confusion / confusion.sum(dim=1, keepdim=True)).nan_to_num()
    side = min(2.5 + 0.3 * len(names), 14.0)  # inches
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    # matplotlib's font lacks most letters beyond ASCII and draws empty boxes for them
    shown = [
        name[:_NAME_LETTERS] if name.isascii() else str(label) for label, name in enumerate(names)
    ]
    # parse_math=False: a dollar sign in a name would start a formula and may fail to parse
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)
    if len(names) <= _MAX_CLASSES_NUMBERED:
        axes.set_ylabel("class (numbers: % of its images)")
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8}
        for row, line in enumerate(shares.tolist()):
            for column, share in enumerate(line):
                colour = "white" if share > 0.5 else "#333333"
                axes.text(column, row, f"{100 * share:.0f}", color=colour, **style)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _class_table(confusion: Tensor, names: Sequence[str]) -> bytes:
    accuracies = class_accuracies(confusion).tolist()
    lines: list[list[object]] = [["class", "name", "images", "right", "accuracy"]]
    for label, (name, row) in enumerate(zip(names, confusion, strict=True)):
        images = int(row.sum())
        accuracy = f"{accuracies[label]:.6f}" if images else ""
        lines.append([label, name, images, int(row[label]), accuracy])
    return _csv(lines)


def _confusion_table(confusion: Tensor, names: Sequence[str]) -> bytes:
    """One line per class, one column per predicted class."""
    lines: list[list[object]] = [["class / predicted", *names]]
    for name, row in zip(names, confusion.tolist(), strict=True):
        lines.append([name, *row])
    return _csv(lines)


def _csv(lines: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _describe_classes(counts: Tensor, names: Sequence[str]) -> str:
    """The classes with images in `counts` (C,), for a message: number, name and count."""
    present = counts.nonzero().flatten().tolist()
    shown = []
    for label in present[:_CLASSES_LISTED]:
        name = f" ({names[label]})" if label < len(names) else ""
        shown.append(f"{label}{name}: {counts[label]} images")
    text = ", ".join(shown)
    if len(present) > _CLASSES_LISTED:
        text += f" and {len(present) - _CLASSES_LISTED} more"
    return text
