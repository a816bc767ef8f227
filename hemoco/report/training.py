"""The part of a report that says how the pretrainings went: loss, collapse, kNN, throughput."""

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
from hemoco.results.kinds import kind_of
from hemoco.results.records import Pretraining
from hemoco.tracking.runs import RunFacts
from hemoco.tracking.unsent import MetricPoint

HEALTHY_LOSS = 0.85
"""Fraction of the chance loss ln(K + 1) that a training which learned something stays below."""
HEALTHY_STD = 0.5
"""Embedding std x sqrt(C) that it stays above; 1 is isotropic, 0 collapsed."""
_GAP_S = 600.0  # between two records: nobody was at work


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """One sign that pretraining learned something; `passed` is None where the value is unknown."""

    name: str
    passed: bool | None
    finding: str


def health_checks(pretraining: Pretraining) -> list[HealthCheck]:
    """Whether loss and embeddings say that something was learned."""
    loss, limit, std = (
        pretraining.loss,
        HEALTHY_LOSS * pretraining.chance_loss,
        pretraining.embedding_std,
    )
    return [
        HealthCheck(
            name="Loss well below chance",
            passed=None if math.isnan(loss - limit) else loss < limit,
            finding=f"last value {number(loss)}; must be below {HEALTHY_LOSS} x ln(K+1) = {number(limit)}",
        ),
        HealthCheck(
            name="Embeddings not collapsed",
            passed=None if math.isnan(std) else std > HEALTHY_STD,
            finding=f"last std x sqrt(C) {number(std)}; must be above {HEALTHY_STD} (1 is isotropic)",
        ),
    ]


def training_plots(data: ReportData) -> list[Plot]:
    """Loss, signs of collapse and throughput, where there are values."""
    return [plot for plot in (_loss(data), _collapse(data), _timeline(data)) if plot is not None]


def quality_plots(data: ReportData) -> list[Plot]:
    """kNN and transfers over the epochs of the pretraining."""
    return [plot for plot in (_knn(data), _transfer_curve(data)) if plot is not None]


def _timeline(data: ReportData) -> Plot | None:
    """Images per second and the share of time spent waiting for data, over the hours of the training."""
    rates = _series(data, "images_per_s", _since_start)
    if not rates:
        return None
    longest = max(point.x for one in rates for point in one.points)
    unit, seconds = ("h", 3600) if longest > 7200 else ("min", 60) if longest > 120 else ("s", 1)
    scaled = [_scaled(one, 1 / seconds, 1) for one in rates]
    waits = [_scaled(one, 1 / seconds, 100) for one in _series(data, "data_wait", _since_start)]
    panels = [Panel(series=scaled, x_label=f"{unit} since the first record", y_label="images/s")]
    if waits:
        panels.append(
            Panel(series=waits, x_label=panels[0].x_label, y_label="waiting for\ndata, %")
        )
    last = [one.points[-1].y for one in rates]
    alt = f"Lines: throughput ends at {', '.join(f'{value:,.0f}' for value in last)} images per second"
    return Plot(
        "Throughput and waiting for data",
        panels_plot(panels),
        alt,
        "Over wall time, each pretraining from its own first record; a break is a pause of more than ten minutes.",
    )


def _loss(data: ReportData) -> Plot | None:
    series = _series(data, "loss", _by_step)
    if not series:
        return None
    sources = [detail.run.records.pretraining for detail in data.details if detail.curves["loss"]]
    trained = [facts for facts in sources if facts is not None]
    chances = {chance for facts in trained if (chance := _chance(facts)) is not None}
    fills = {fill for facts in trained if (fill := _fill_step(facts.params)) is not None}
    queue = len(fills) == 1 and len(chances) == 1
    panel = Panel(
        series=series,
        x_label="optimiser step",
        y_label="InfoNCE loss",
        limits=[(value, f"chance: {words} = {value:.2f}") for value, words in sorted(chances)],
        good=_good_band(series, HEALTHY_LOSS * next(iter(chances))[0]) if queue else None,
        until=(next(iter(fills)), "queue full")
        if queue and next(iter(fills)) < _last_step(series)
        else None,
    )
    points = series[0].points
    alt = f"Line: the loss goes from {points[0].y:.3f} to {points[-1].y:.3f}"
    alt += "".join(f"; chance is {value:.3f}" for value, _ in sorted(chances))
    caption = (
        "Normal: low at first, while the queue holds random vectors (grey); then up towards chance as it fills with "
        "keys; then down into the green band, and there for good. At chance, nothing is learned."
        if queue
        else "Constant embeddings give the chance loss."
    )
    return Plot("Loss", line_plot(panel), alt, caption)


def _good_band(series: Sequence[Series], limit: float) -> tuple[float, float]:
    return min(limit, *(point.y for one in series for point in one.points)) * 0.97, limit


def _last_step(series: Sequence[Series]) -> float:
    return max(one.points[-1].x for one in series)


def _collapse(data: ReportData) -> Plot | None:
    step = "optimiser step"
    gaps = [_gap(data, detail) for detail in data.details]
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
            series=[one for one in gaps if one.points],
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
    alt = "Lines over steps: spread, effective rank, similarity of positives over negatives, pretext accuracy"
    if spread:
        alt += f"; the spread goes from {spread[0].points[0].y:.3f} to {spread[0].points[-1].y:.3f}"
    caption = (
        "Collapse is a spread (std x sqrt(C), 1 is isotropic) or an effective rank that falls towards 0 or 1, and "
        "positives no more alike than negatives. Pretext top-1: how often the positive is nearest of all keys."
    )
    return Plot("Collapse", panels_plot(panels), alt, caption)


def _gap(data: ReportData, detail: RunDetail) -> Series:
    negative = {point.step: point.value for point in detail.curves["negative_similarity"]}
    both = [point for point in detail.curves["positive_similarity"] if point.step in negative]
    points = [Point(point.step, point.value - negative[point.step]) for point in both]
    return _of_run(data, detail, points)


def _knn(data: ReportData) -> Plot | None:
    series = []
    for detail in data.details:
        points = detail.curves["knn_top1"]
        if points:
            # the first measurement is at the end of this epoch
            first = min(
                int(detail.params["pretrain.knn_every_epochs"]),
                int(detail.params["pretrain.epochs"]),
            )
            by_epoch = [Point(point.step * first / points[0].step, point.value) for point in points]
            series.append(_of_run(data, detail, by_epoch))
    if not series:
        return None
    panel = Panel(series=series, x_label="epoch", y_label="kNN top-1 accuracy")
    ends = series[0].points
    alt = f"Line: kNN accuracy goes from {ends[0].y:.3f} to {ends[-1].y:.3f}"
    caption = "Frozen features of the query encoder; pretraining itself sees no labels."
    return Plot("kNN during pretraining", line_plot(panel), alt, caption)


def _transfer_curve(data: ReportData) -> Plot | None:
    comparison = data.comparison
    places = list(dict.fromkeys(place for _, place in comparison.curve))
    series = []
    for order, place in enumerate(places):
        found = [
            (epoch, interval(comparison.curve[epoch, place]))
            for epoch, at in sorted(comparison.curve)
            if at == place
        ]
        points = [Point(epoch, value.mean, value.half_width) for epoch, value in found]
        label = (
            place.line if len({at.column for at in places}) == 1 else f"{place.line} {place.column}"
        )
        series.append(numbered(label, points, order))
    if not series:
        return None
    panel = Panel(series=series, x_label="epoch", y_label="headline metric", shares=True)
    alt = "Lines: " + "; ".join(f"{one.label} ends at {one.points[-1].y:.3f}" for one in series)
    caption = "Transfers of the backbones that were exported on the way, with their 95% intervals."
    return Plot("Transfer over epochs of the pretraining", line_plot(panel), alt, caption)


def _series(
    data: ReportData, name: str, place: Callable[[Sequence[MetricPoint]], list[Point]]
) -> list[Series]:
    """One curve for each run that has the metric, in its run's colour."""
    return [
        _of_run(data, detail, place(detail.curves[name]))
        for detail in data.details
        if detail.curves[name]
    ]


def _of_run(data: ReportData, detail: RunDetail, points: Sequence[Point]) -> Series:
    """A curve in the colour that its pretraining has in all plots; repetitions differ by their dashes."""
    run = detail.run
    number, column = next(
        each for each in enumerate(data.comparison.pretrainings) if run in each[1].runs
    )
    return numbered(run.label, points, number, column.runs.index(run))


def _by_step(points: Sequence[MetricPoint]) -> list[Point]:
    return [Point(point.step, point.value) for point in points]


def _since_start(points: Sequence[MetricPoint]) -> list[Point]:
    """By seconds since the first record; a pause breaks the line."""
    first, placed = points[0].timestamp, list[Point]()
    for point in points:
        seconds = (point.timestamp - first) / 1000
        if placed and seconds - placed[-1].x > _GAP_S:
            placed.append(Point(seconds, math.nan))
        placed.append(Point(seconds, point.value))
    return placed


def _scaled(series: Series, x: float, y: float) -> Series:
    return dataclasses.replace(
        series, points=[Point(point.x * x, point.y * y) for point in series.points]
    )


def _chance(pretraining: RunFacts) -> tuple[float, str] | None:
    """The loss of constant embeddings, and its formula; None where the method is unknown."""
    params = pretraining.params
    match kind_of(pretraining):
        case "moco_v1" | "moco_v2":
            return math.log(int(params["pretrain.moco.queue_length"]) + 1), "ln(K+1)"
        case "moco_v3":  # both directions, each 2T times the cross-entropy
            batch, temperature = (
                int(params["pretrain.global_batch_size"]),
                float(params["pretrain.moco.temperature"]),
            )
            return 4 * temperature * math.log(batch), "4T ln(G)"
    return None


def _fill_step(params: dict[str, str]) -> float | None:
    """The step after which no key of the queue is a random vector; None where there is no queue."""
    length, batch = (
        params.get("pretrain.moco.queue_length"),
        params.get("pretrain.global_batch_size"),
    )
    return int(length) / int(batch) if length and batch else None
