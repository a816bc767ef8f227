"""Label efficiency: accuracy over the number of labels, from low-shot transfers up to all labels.

Low-shot transfers and linear classifiers on all labels are fitted differently, so the last point of
a curve is not strictly comparable with the others. Papers show both in one curve all the same.
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
    """Labels used: "1%", "5 a class" or "100%"."""
    images: float
    """Number of labelled images; nan if unknown."""
    line: Line


def label_curves(comparison: Comparison) -> list[list[LabelPoint]]:
    """Returns one curve for each data set with a low-shot transfer and at least one more point.

    The points of a curve are sorted by their number of labels.
    """
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
    """Returns the share of labels that a transfer uses; empty for kinds that have no curve."""
    kind = next((kind_of(facts) for facts in _transfer_runs(line)), "")
    if kind in ("linear_probe", "linear_classifier"):
        return "100%"
    if kind != "low_shot":
        return ""
    prefix = f"transfers.{line.transfer}"
    fraction = float(line.protocol[f"{prefix}.fraction"])
    if fraction:
        return f"{100 * fraction:g}%"
    return f"{line.protocol[f'{prefix}.shots']} a class"


def _images(line: Line) -> float:
    for facts in _transfer_runs(line):
        for row in done_values(facts, "labelled_images"):
            return row.value
    return math.nan


def _transfer_runs(line: Line) -> list[RunFacts]:
    """Returns the MLflow runs of a line, of the final backbones and of earlier epochs."""
    every = [facts for run in line.runs for facts in (*run.records.transfers, *run.records.curve)]
    return [facts for facts in every if facts.tags[Tag.TRANSFER] == line.transfer]


def _order(point: LabelPoint) -> tuple[bool, float, float]:
    share = float(point.labels[:-1]) if point.labels.endswith("%") else 0.0
    return share == 100, 0.0 if math.isnan(point.images) else point.images, share
