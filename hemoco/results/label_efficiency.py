"""Label efficiency: how well few labels do, as a curve from the low-shot transfers up to all labels of the same data.

Low-shot classification and linear classifiers on all labels fit differently, so that the last point of a curve is not
quite of its kind; both are what papers show.
"""

import math
from typing import NamedTuple

from hemoco.results.comparison import Line, ManyComparison
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


def label_curves(many: ManyComparison) -> list[list[LabelPoint]]:
    """One curve for each data set that has a low-shot transfer and at least one more point; fewest labels first."""
    by_data: dict[tuple[str, ...], list[LabelPoint]] = {}
    for line in many.lines:
        labels = _labels(line)
        if labels:
            data = tuple(line.protocol[name] for name in ("data digest", "train_split", "test_split", "metric"))
            by_data.setdefault(data, []).append(LabelPoint(labels, _images(line), line))
    curves = [sorted(points, key=_order) for points in by_data.values()]
    return [points for points in curves if len(points) > 1 and points[0].labels != "100%"]


def _labels(line: Line) -> str:
    """How many labels a transfer sees, told by the settings that only its kind has; empty for those of other kinds."""
    settings = {name.removeprefix(f"transfers.{line.transfer}."): value for name, value in line.protocol.items()}
    if "fraction" in settings:
        share = float(settings["fraction"])
        return f"{100 * share:g}%" if share else f"{settings['shots']} a class"
    linear = "lbfgs_check" in settings or ("schedule" in settings and "backbone_lr" not in settings)
    return "100%" if linear else ""


def _images(line: Line) -> float:
    runs = (facts for run in line.runs for facts in run.records.transfers)
    found = (row.value for facts in runs if _is(facts, line) for row in done_values(facts, "labelled_images"))
    return next(found, math.nan)


def _is(facts: RunFacts, line: Line) -> bool:
    return facts.tags[Tag.TRANSFER] == line.transfer


def _order(point: LabelPoint) -> tuple[bool, float, float]:
    share = float(point.labels[:-1]) if point.labels.endswith("%") else 0.0
    return share == 100, 0.0 if math.isnan(point.images) else point.images, share
