"""The part of a report about the pretrainings: health, loss, collapse, kNN and throughput.

The limits of a healthy training are those of MoCo (arXiv:1911.05722): constant embeddings have an
InfoNCE loss of ln(K + 1) for a queue of length K, and normalised embeddings that fill all C
dimensions evenly have a standard deviation of 1 / sqrt(C) in each.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

from hemoco.report.comparison_tables import number
from hemoco.report.data import ReportData, RunDetail
from hemoco.report.plots import (
    Panel,
    Plot,
    Point,
    Series,
    interval,
    line_plot,
    numbered,
    panels_plot,
)
from hemoco.results.cost import PAUSE_S
from hemoco.results.kinds import kind_of
from hemoco.results.records import Pretraining
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.unsent import MetricPoint

HEALTHY_LOSS = 0.85
"""Fraction of the chance loss ln(K + 1) below which the loss of a healthy training ends."""
HEALTHY_STD = 0.5
"""Embedding std x sqrt(C) above which a healthy training ends; 1 is isotropic, 0 collapsed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """A sign that a pretraining learned something; `passed` is None if its value is unknown."""

    name: str
    passed: bool | None
    finding: str


def health_checks(pretraining: Pretraining) -> list[HealthCheck]:
    """Checks the last loss and the last spread of the embeddings against their limits."""
    loss = pretraining.loss
    limit = HEALTHY_LOSS * pretraining.chance_loss
    std = pretraining.embedding_std
    return [
        HealthCheck(
            name="Loss well below chance",
            passed=None if math.isnan(loss - limit) else loss < limit,
            finding=(
                f"last value {number(loss)}; "
                f"must be below {HEALTHY_LOSS} x ln(K+1) = {number(limit)}"
            ),
        ),
        HealthCheck(
            name="Embeddings not collapsed",
            passed=None if math.isnan(std) else std > HEALTHY_STD,
            finding=(
                f"last std x sqrt(C) {number(std)}; must be above {HEALTHY_STD} (1 is isotropic)"
            ),
        ),
    ]


def training_plots(data: ReportData) -> list[Plot]:
    """Returns the plots of loss, collapse and throughput for which there are values."""
    return [plot for plot in (_loss(data), _collapse(data), _timeline(data)) if plot is not None]


def quality_plots(data: ReportData) -> list[Plot]:
    """Returns the plots of kNN and transfers over epochs for which there are values."""
    return [plot for plot in (_knn(data), _transfer_curve(data)) if plot is not None]


def _timeline(data: ReportData) -> Plot | None:
    """Plots images per second and the share of time spent waiting for data, over wall time."""
    rates = _series(data, "images_per_s", _since_start)
    if not rates:
        return None
    longest_s = max(point.x for series in rates for point in series.points)
    unit, unit_s = "s", 1
    if longest_s > 7200:
        unit, unit_s = "h", 3600
    elif longest_s > 120:
        unit, unit_s = "min", 60
    x_label = f"{unit} since the first record"
    scaled = [_scaled(series, 1 / unit_s, 1) for series in rates]
    panels = [Panel(series=scaled, x_label=x_label, y_label="images/s")]
    waits = _series(data, "data_wait", _since_start)
    if waits:
        percent = [_scaled(series, 1 / unit_s, 100) for series in waits]
        panels.append(Panel(series=percent, x_label=x_label, y_label="waiting for\ndata, %"))
    last = ", ".join(f"{series.points[-1].y:,.0f}" for series in rates)
    return Plot(
        title="Throughput and waiting for data",
        svg=panels_plot(panels),
        alt=f"Lines: throughput ends at {last} images per second",
        caption=(
            "Over wall time since the first record of each pretraining. A gap in a line is a pause "
            "of more than ten minutes."
        ),
    )


def _loss(data: ReportData) -> Plot | None:
    """Plots the loss with its chance level.

    Where all runs have the same queue, the healthy range and the filling of the queue are shown.
    """
    series = _series(data, "loss", _by_step)
    if not series:
        return None
    chances: set[tuple[float, str]] = set()
    fill_steps: set[float] = set()
    for detail in data.details:
        pretraining = detail.run.records.pretraining
        if pretraining is None or not detail.curves["loss"]:
            continue
        chance = _chance(pretraining)
        if chance is not None:
            chances.add(chance)
        fill_step = _fill_step(pretraining.params)
        if fill_step is not None:
            fill_steps.add(fill_step)
    good = until = None
    caption = "Constant embeddings have the chance loss."
    if len(chances) == len(fill_steps) == 1:
        ((chance_loss, _),) = chances
        (full_at,) = fill_steps
        limit = HEALTHY_LOSS * chance_loss
        lowest = min(point.y for curve in series for point in curve.points)
        good = (0.97 * min(limit, lowest), limit)
        if full_at < max(curve.points[-1].x for curve in series):
            until = (full_at, "queue full")
        caption = (
            "A healthy loss is low at first, while the queue still holds random vectors (grey), "
            "rises towards chance as the queue fills with keys, then falls into the green band and "
            "stays there. A loss that stays at chance means that nothing is learned."
        )
    panel = Panel(
        series=series,
        x_label="optimiser step",
        y_label="InfoNCE loss",
        limits=[(value, f"chance: {formula} = {value:.2f}") for value, formula in sorted(chances)],
        good=good,
        until=until,
    )
    points = series[0].points
    alt = f"Line: the loss goes from {points[0].y:.3f} to {points[-1].y:.3f}"
    alt += "".join(f"; chance is {value:.3f}" for value, _ in sorted(chances))
    return Plot("Loss", line_plot(panel), alt, caption)


def _collapse(data: ReportData) -> Plot | None:
    """Plots the signs of collapse over steps."""
    step = "optimiser step"
    gaps = [_similarity_gap(data, detail) for detail in data.details]
    wanted = [
        Panel(
            series=_series(data, "embedding_std", _by_step),
            x_label=step,
            y_label="spread",
            limits=[(HEALTHY_STD, f"healthy above {HEALTHY_STD}")],
        ),
        Panel(
            series=_series(data, "effective_rank", _by_step),
            x_label=step,
            y_label="effective\nrank",
        ),
        Panel(
            series=[gap for gap in gaps if gap.points],
            x_label=step,
            y_label="similarity,\npositive -\nnegative",
        ),
        Panel(
            series=_series(data, "pretext_top1", _by_step), x_label=step, y_label="pretext\ntop-1"
        ),
    ]
    panels = [panel for panel in wanted if panel.series]
    if not panels:
        return None
    spread = wanted[0].series
    alt = (
        "Lines over steps: spread, effective rank, similarity of positives minus negatives, "
        "pretext accuracy"
    )
    if spread:
        first, last = spread[0].points[0].y, spread[0].points[-1].y
        alt += f"; the spread goes from {first:.3f} to {last:.3f}"
    caption = (
        "Signs of collapse: the spread of the embeddings (std x sqrt(C), 1 is isotropic) falls "
        "towards 0, their effective rank falls towards 1, or positives are no more similar than "
        "negatives. Pretext top-1 is the share of queries whose positive is the nearest of all "
        "keys."
    )
    return Plot("Collapse", panels_plot(panels), alt, caption)


def _similarity_gap(data: ReportData, detail: RunDetail) -> Series:
    """Returns the similarity of positives minus that of negatives, at steps that have both."""
    negative = {point.step: point.value for point in detail.curves["negative_similarity"]}
    points = [
        Point(point.step, point.value - negative[point.step])
        for point in detail.curves["positive_similarity"]
        if point.step in negative
    ]
    return _run_series(data, detail, points)


def _knn(data: ReportData) -> Plot | None:
    series = []
    for detail in data.details:
        points = detail.curves["knn_top1"]
        if points:
            # Steps become epochs by the first evaluation, which is at the end of a known epoch.
            first_epoch = min(
                int(detail.params["pretrain.knn_every_epochs"]),
                int(detail.params["pretrain.epochs"]),
            )
            epochs_per_step = first_epoch / points[0].step
            by_epoch = [Point(point.step * epochs_per_step, point.value) for point in points]
            series.append(_run_series(data, detail, by_epoch))
    if not series:
        return None
    panel = Panel(series=series, x_label="epoch", y_label="kNN top-1 accuracy")
    first, last = series[0].points[0].y, series[0].points[-1].y
    alt = f"Line: kNN accuracy goes from {first:.3f} to {last:.3f}"
    caption = (
        "kNN on frozen features of the query encoder. Labels are used for this evaluation only, "
        "not for the pretraining."
    )
    return Plot("kNN during pretraining", line_plot(panel), alt, caption)


def _transfer_curve(data: ReportData) -> Plot | None:
    curve = data.comparison.curve
    cells = list(dict.fromkeys(cell for _, cell in curve))
    if not cells:
        return None
    several = len({cell.column for cell in cells}) > 1
    series = []
    for index, cell in enumerate(cells):
        points = []
        for epoch in sorted(epoch for epoch, other in curve if other == cell):
            value = interval(curve[epoch, cell])
            points.append(Point(epoch, value.mean, value.half_width))
        label = f"{cell.line} {cell.column}" if several else cell.line
        series.append(numbered(label, points, index))
    panel = Panel(series=series, x_label="epoch", y_label="headline metric", shares=True)
    ends = [f"{one.label} ends at {one.points[-1].y:.3f}" for one in series]
    caption = "Transfers from backbones exported during the pretraining, with 95% intervals."
    return Plot(
        title="Transfer over epochs of the pretraining",
        svg=line_plot(panel),
        alt=f"Lines: {'; '.join(ends)}",
        caption=caption,
    )


def _series(
    data: ReportData, name: str, to_points: Callable[[Sequence[MetricPoint]], list[Point]]
) -> list[Series]:
    """Returns a curve for each run that has the metric, in the run's colour."""
    return [
        _run_series(data, detail, to_points(detail.curves[name]))
        for detail in data.details
        if detail.curves[name]
    ]


def _run_series(data: ReportData, detail: RunDetail, points: Sequence[Point]) -> Series:
    """Returns a curve in the colour that the run's pretraining has in all plots."""
    run = detail.run
    for index, column in enumerate(data.comparison.pretrainings):
        if run in column.runs:
            return numbered(run.label, points, index, column.runs.index(run))
    raise AssertionError(f"run {run.name} is in no column")


def _by_step(points: Sequence[MetricPoint]) -> list[Point]:
    return [Point(point.step, point.value) for point in points]


def _since_start(points: Sequence[MetricPoint]) -> list[Point]:
    """Returns points by seconds since the first record; nan breaks the line at a pause."""
    placed: list[Point] = []
    for point in points:
        seconds = (point.timestamp - points[0].timestamp) / 1000
        if placed and seconds - placed[-1].x > PAUSE_S:
            placed.append(Point(seconds, math.nan))
        placed.append(Point(seconds, point.value))
    return placed


def _scaled(series: Series, x_factor: float, y_factor: float) -> Series:
    scaled = [Point(point.x * x_factor, point.y * y_factor) for point in series.points]
    return dataclasses.replace(series, points=scaled)


def _chance(pretraining: RunFacts) -> tuple[float, str] | None:
    """Returns the loss of constant embeddings and its formula; None if the method is unknown."""
    params = pretraining.params
    match kind_of(pretraining):
        case "moco_v1" | "moco_v2":
            return math.log(int(params["pretrain.moco.queue_length"]) + 1), "ln(K+1)"
        case "moco_v3":
            # the sum of both directions, each of which is 2T times a cross-entropy over the batch
            batch = int(params["pretrain.global_batch_size"])
            temperature = float(params["pretrain.moco.temperature"])
            return 4 * temperature * math.log(batch), "4T ln(G)"
    return None


def _fill_step(params: dict[str, str]) -> float | None:
    """Returns the step at which keys have replaced all random vectors of the queue.

    None if there is no queue.
    """
    length = params.get("pretrain.moco.queue_length")
    batch = params.get("pretrain.global_batch_size")
    return int(length) / int(batch) if length and batch else None
