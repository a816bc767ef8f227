"""Label efficiency: how well few labels do, as a curve from the low-shot transfers up to all labels of the same data.

Low-shot classification and linear classifiers on all labels fit differently, so that the last point of a curve is not
quite of its kind; both are what papers show.
"""

import math
from typing import NamedTuple

from hemoco.results.comparison import Comparison, Line
from hemoco.results.kinds import kind_of
from hemoco.results.records import done_values
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.tags import Tag


class LabelPoint(NamedTuple):
    """One point of a curve."""

    labels: str
    """1%, 5 a class, 100%."""
    images: float
    """Labelled images; nan where unknown."""
    line: Line


def label_curves(comparison: Comparison) -> list[list[LabelPoint]]:
    """One curve for each data set that has a low-shot transfer and at least one more point; fewest labels first."""
    by_data: dict[tuple[str, ...], list[LabelPoint]] = {}
    for line in comparison.lines:
        labels = _labels(line)
        if labels:
            data = tuple(
                line.protocol[name]
                for name in ("data digest", "train_split", "test_split", "metric")
            )
            by_data.setdefault(data, []).append(LabelPoint(labels, _images(line), line))
    curves = [sorted(points, key=_order) for points in by_data.values()]
    return [points for points in curves if len(points) > 1 and points[0].labels != "100%"]


def _labels(line: Line) -> str:
    """The share of labels that a transfer sees; empty for kinds that are not part of a curve."""
    kind = next((kind_of(facts) for facts in _transfers(line)), "")
    if kind in ("linear_probe", "linear_classifier"):
        return "100%"
    if kind != "low_shot":
        return ""
    fraction = float(line.protocol[f"transfers.{line.transfer}.fraction"])
    return (
        f"{100 * fraction:g}%"
        if fraction
        else f"{line.protocol[f'transfers.{line.transfer}.shots']} a class"
    )


def _images(line: Line) -> float:
    found = (
        row.value for facts in _transfers(line) for row in done_values(facts, "labelled_images")
    )
    return next(found, math.nan)


def _transfers(line: Line) -> list[RunFacts]:
    """The MLflow runs of a line, measured from final backbones or on the way."""
    every = [facts for run in line.runs for facts in (*run.records.transfers, *run.records.curve)]
    return [facts for facts in every if facts.tags[Tag.TRANSFER] == line.transfer]


def _order(point: LabelPoint) -> tuple[bool, float, float]:
    share = float(point.labels[:-1]) if point.labels.endswith("%") else 0.0
    return share == 100, 0.0 if math.isnan(point.images) else point.images, share
