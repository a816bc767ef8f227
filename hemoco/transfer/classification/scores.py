"""What all classification transfers measure: predictions counted by class, metrics of the counts, files for readers.

Counts add up, over batches, processes and draws; nothing else is needed of the scores.

Shapes: M images, C classes.
"""

import csv
import io
import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hemoco.data.labelled import LabelledSplit
from hemoco.errors import ShardError
from hemoco.transfer.result import TransferResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

_TOP = 5
_DRAWN, _NUMBERED = (
    100,
    15,
)  # classes up to which the confusion is drawn, and its cells have numbers
_LETTERS = 16  # of a name beside the confusion
_LISTED = 5  # classes that a message names


class ClassCounts(NamedTuple):
    """What came out for images of known classes."""

    confusion: Tensor
    """Images by class (row) and predicted class (column), int64 (C, C) on the CPU."""
    top5: int
    """Images whose class is among the five of highest scores."""


def check_labels(train: LabelledSplit, test: LabelledSplit) -> int:
    """C, the number of classes, after making sure that the training split can teach all that the test split asks.

    Classes without test images are logged and count in no mean over classes.

    Raises:
        ShardError: a split is empty or has images without a label; all training images are of one class; the test
            split has classes that the training split lacks.
    """
    for name, split in (("train_split", train), ("test_split", test)):
        if not len(split.labels):
            raise ShardError(f"data.{name} has no images: name another split")
        if unlabelled := int((split.labels < 0).sum()):
            raise ShardError(
                f"data.{name}: {unlabelled} of {len(split.labels)} images have no label; pack it from class folders"
            )
    classes = int(torch.cat([train.labels, test.labels]).max()) + 1
    taught, asked = (
        split.labels.cpu().bincount(minlength=classes) for split in (train, test)
    )  # (C,)
    if taught.count_nonzero() < 2:
        raise ShardError(
            f"data.train_split: all {len(train.labels)} images are of class {_labels(taught, train.classes)}: there is "
            "nothing to tell apart; name a split with at least two classes"
        )
    if (lacking := asked.where(taught == 0, 0)).any():
        raise ShardError(
            f"data.test_split has {int(lacking.sum())} images of classes that data.train_split lacks: "
            f"{_labels(lacking, test.classes)}; pack both splits from the same class folders"
        )
    if (unasked := taught.where(asked == 0, 0)).any():
        logger.warning(
            "event=classes_without_test_images classes=%s", _labels(unasked, train.classes)
        )
    return classes


def count_predictions(scores: Tensor, labels: Tensor) -> ClassCounts:
    """Counts the predictions, which are the classes of the highest scores.

    A class that ties with others around the fifth place does not count as among the five.

    Args:
        scores: (M, C), higher is likelier.
        labels: (M,), on the same device.
    """
    classes = scores.shape[1]
    cells = labels * classes + scores.argmax(dim=1)
    own = scores.gather(1, labels[:, None])  # (M, 1)
    # not below, rather than above: so nan, which is neither, counts against the class
    rivals = (~(scores < own)).sum(dim=1) - 1  # (M,)
    return ClassCounts(
        cells.cpu().bincount(minlength=classes**2).view(classes, classes),
        int((rivals < _TOP).sum().item()),
    )


def sum_counts(parts: Iterable[ClassCounts]) -> ClassCounts:
    """Those of several batches, processes or draws together, one at least."""
    confusions, tops = zip(*parts, strict=True)
    return ClassCounts(torch.stack(confusions).sum(dim=0), sum(tops))


def class_metrics(counts: ClassCounts) -> dict[str, float]:
    """Share of images whose predicted class is theirs (`top1`), or is one of five (`top5`), and the mean over classes.

    `per_class_accuracy` is over the classes that occur. `top5` is left out where there are not more than five classes.
    """
    images = int(counts.confusion.sum())
    accuracies = class_accuracies(counts.confusion)
    metrics = {
        "top1": int(counts.confusion.trace()) / images,
        "per_class_accuracy": accuracies[~accuracies.isnan()].mean().item(),
    }
    return metrics | ({"top5": counts.top5 / images} if len(accuracies) > _TOP else {})


def class_accuracies(confusion: Tensor) -> Tensor:
    """Share of each class's images that are predicted as it, float64 (C,); nan where there are none."""
    return confusion.diagonal().double() / confusion.sum(dim=1)


def classification_result(
    counts: ClassCounts,
    classes: Sequence[str],
    *,
    also: dict[str, float],
    history: Sequence[tuple[int, dict[str, float]]] = (),
) -> TransferResult:
    """The result whose headline is top1.

    Files: `classes.csv` (accuracy of each class) and `confusion.csv`; up to 100 classes also the picture
    `confusion.png`.

    Args:
        counts: of the test images.
        classes: names by label; where they are missing the labels stand for them.
        also: further metrics.
        history: of the training, if there was any.
    """
    metrics = class_metrics(counts) | also
    labels = range(len(counts.confusion))
    names = [classes[label] if label < len(classes) else str(label) for label in labels]
    return TransferResult(
        metric="top1",
        value=metrics["top1"],
        metrics=metrics,
        history=list(history),
        images={"confusion": confusion_picture(counts.confusion, names)}
        if len(names) <= _DRAWN
        else {},
        files={
            "classes.csv": _class_table(counts.confusion, names),
            "confusion.csv": _cells(counts.confusion, names),
        },
    )


def confusion_picture(confusion: Tensor, names: Sequence[str]) -> bytes:
    """A PNG of a confusion (C, C): a row per class, each cell the share of its images; names (C,) at the sides."""
    from matplotlib.figure import Figure

    shares = (confusion / confusion.sum(dim=1, keepdim=True)).nan_to_num()
    side = min(2.5 + 0.3 * len(names), 14.0)  # inches
    figure = Figure(figsize=(side, side), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class (numbers: % of its images)" if len(names) <= _NUMBERED else "class")
    _write_names(axes, names)
    if len(names) <= _NUMBERED:
        for row, line in enumerate(shares.tolist()):
            for column, share in enumerate(line):
                colour = "white" if share > 0.5 else "#333333"
                axes.text(
                    column,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color=colour,
                )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _write_names(axes: "Axes", names: Sequence[str]) -> None:
    # matplotlib's font lacks most letters beyond ASCII
    shown = [name[:_LETTERS] if name.isascii() else str(label) for label, name in enumerate(names)]
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(len(names)), shown, fontsize=8, parse_math=False)


def _class_table(confusion: Tensor, names: Sequence[str]) -> bytes:
    accuracies = class_accuracies(confusion).tolist()
    lines: list[list[object]] = [["class", "name", "images", "right", "accuracy"]]
    for label, (name, row) in enumerate(zip(names, confusion, strict=True)):
        images = int(row.sum())
        lines.append(
            [label, name, images, int(row[label]), f"{accuracies[label]:.6f}" if images else ""]
        )
    return _csv(lines)


def _cells(confusion: Tensor, names: Sequence[str]) -> bytes:
    """A line per class, a column per predicted class."""
    lines = zip(names, confusion.tolist(), strict=True)
    return _csv([["class / predicted", *names], *([name, *row] for name, row in lines)])


def _csv(lines: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def _labels(counts: Tensor, names: Sequence[str]) -> str:
    """The classes of which there are images (C,), to print: number, name and count of the first few."""
    present = counts.nonzero().flatten().tolist()
    shown = [
        f"{label}{f' ({names[label]})' if label < len(names) else ''}: {counts[label]} images"
        for label in present[:_LISTED]
    ]
    return ", ".join(shown) + (
        f" and {len(present) - _LISTED} more" if len(present) > _LISTED else ""
    )
