"""One run, or several side by side, as one HTML file that needs nothing else."""

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hemoco.config import config_difference
from hemoco.report.comparison_tables import number
from hemoco.report.data import ReportData
from hemoco.report.features import drawn_confusions, drawn_detections, feature_views
from hemoco.report.files import sections
from hemoco.report.plots import (
    Panel,
    Plot,
    Point,
    Series,
    column_colours,
    interval,
    line_plot,
    transfer_bars,
)
from hemoco.report.training import HealthCheck, health_checks, quality_plots, training_plots
from hemoco.results.comparison import Cell, Comparison, Pair, Run
from hemoco.results.label_efficiency import LabelPoint, label_curves

if TYPE_CHECKING:
    from jinja2 import Template

_FIRST = ("pretrainings", "transfers", "differences")
_PLOTTED = ("label_efficiency", "curve")


def render_report(data: ReportData) -> str:
    """The report as HTML: what transfers, what was learned, how the training went, and where all of it comes from."""
    comparison, names = data.comparison, [run.name for run in data.comparison.runs]
    alone = len(names) == 1
    tables = {
        found.name: found
        for found in sections(comparison)
        if not (alone and found.name == "pretrainings")
    }
    return _template().render(
        title=names[0] if alone else f"{len(names)} runs: {', '.join(names)}",
        kind="run" if alone else "comparison",
        verdict=_verdict(comparison),
        first_tables=[tables[name] for name in _FIRST if name in tables],
        nothing_measured=not comparison.lines,
        quality_plots=[*_bars(comparison), *_label_efficiency(comparison), *quality_plots(data)],
        health=[_health(detail.run, alone=alone) for detail in data.details],
        training_plots=training_plots(data),
        features=feature_views(data),
        detections=drawn_detections(data),
        confusions=drawn_confusions(data),
        further_tables=[
            found
            for name, found in tables.items()
            if name not in _FIRST and not name.startswith(_PLOTTED)
        ],
        lineage=_lineage(data),
        differences=_differences(data),
        settings=_settings(data),
    )


def _template() -> "Template":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a report needs it

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment.get_template("report.html")


def _data_uri(data: bytes, kind: str) -> str:
    """A file as a URL that contains it."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _verdict(comparison: Comparison) -> str:
    ill = [
        run.label
        for run in comparison.runs
        if run.results.pretraining.status == "FINISHED"  # one that goes on may be on its way
        and any(check.passed is False for check in health_checks(run.results.pretraining))
    ]
    alone = len(comparison.runs) == 1
    warning = (
        ""
        if not ill
        else " But the pretraining is not healthy."
        if alone
        else f" Not healthy: {', '.join(ill)}."
    )
    failed = sum(len(run.results.failed) for run in comparison.runs)
    return _winner(comparison) + (f" {failed} failed." if failed else "") + warning


def _winner(comparison: Comparison) -> str:
    pretrainings = [column.label for column in comparison.pretrainings]
    theirs = pretrainings[1] if len(pretrainings) > 1 else _baseline(comparison, pretrainings[0])
    pairs = [
        pair for pair in comparison.pairs if (pair.ours, pair.theirs) == (pretrainings[0], theirs)
    ]
    measured = [pair for pair in pairs if not math.isnan(pair.difference.mean)]
    if not measured:
        return f"No transfer has been measured from both {pretrainings[0]} and {theirs} yet."
    better, clear = (
        sum(_beats(pair, clearly=clearly) for pair in measured) for clearly in (False, True)
    )
    noun = "transfer" if len(measured) == 1 else "transfers"
    beyond = (
        f", {clear} beyond the noise of seeds"
        if any(pair.difference.noise for pair in measured)
        else ""
    )
    if len(pretrainings) == 1:
        whom = "random initialisation" if theirs == "random" else theirs
        return f"Pretraining beats {whom} in {better} of {len(measured)} {noun}{beyond}."
    more = "" if len(pretrainings) == 2 else " All other pairs are in the tables."
    return f"{pretrainings[0]} beats {theirs} in {better} of {len(measured)} {noun}{beyond}.{more}"


def _baseline(comparison: Comparison, ours: str) -> str:
    """The random one, else the first that was measured beside the pretraining."""
    measured = [pair.theirs for pair in comparison.pairs if pair.ours == ours]
    random = [
        column.label
        for column in comparison.columns
        if column.baseline == "random" and column.label in measured
    ]
    return (*random, *measured, "random")[0]


def _beats(pair: Pair, *, clearly: bool) -> bool:
    return pair.difference.mean > 0 and (pair.difference.stands_out is True or not clearly)


def _bars(comparison: Comparison) -> list[Plot]:
    if not comparison.values:
        return []
    words = [
        f"{line.label} {line.metric}: "
        + ", ".join(
            f"{column.label} {number(interval(comparison.values[place]).mean)}"
            for column in comparison.columns
            if (place := Cell(line.label, column.label)) in comparison.values
        )
        for line in comparison.lines
    ]
    caption = "Means; the line is the 95% interval, a dot a single seed or pretraining. Higher is better, 1 is perfect."
    return [
        Plot(
            "Transfers against baselines",
            transfer_bars(comparison),
            f"Bars. {'; '.join(words)}",
            caption,
        )
    ]


def _label_efficiency(comparison: Comparison) -> list[Plot]:
    plots = []
    for place, points in enumerate(label_curves(comparison), start=1):
        measured = [
            (column.label, _label_points(comparison, points, column.label))
            for column in comparison.columns
        ]
        colours = column_colours(comparison)
        series = [
            Series(label=label, points=found, colour=colours[label])
            for label, found in measured
            if found
        ]
        if not series:
            continue
        ticks = [(float(order), _tick(point)) for order, point in enumerate(points)]
        panel = Panel(
            series=series, x_label="labels", y_label=points[0].line.metric, shares=True, ticks=ticks
        )
        alt = "Lines: " + "; ".join(f"{one.label} ends at {one.points[-1].y:.3f}" for one in series)
        caption = "Low-shot transfers up to a linear classifier on all labels; 95% intervals."
        title = "Label efficiency" if place == 1 else f"Label efficiency, data set {place}"
        plots.append(Plot(title, line_plot(panel), alt, caption))
    return plots


def _label_points(comparison: Comparison, points: list[LabelPoint], column: str) -> list[Point]:
    places = [(order, Cell(point.line.label, column)) for order, point in enumerate(points)]
    found = [
        (order, interval(comparison.values[place]))
        for order, place in places
        if place in comparison.values
    ]
    return [Point(order, value.mean, value.half_width) for order, value in found]


def _tick(point: LabelPoint) -> str:
    images = "" if math.isnan(point.images) else f"\n{point.images:,.0f} images"
    return f"{point.labels}{images}"


class _Health(NamedTuple):
    """Health of one pretraining."""

    label: str
    """Empty where it is the only run."""
    checks: Sequence[HealthCheck]
    knn_top1: str
    """A dash where it was not measured."""


def _health(run: Run, *, alone: bool) -> _Health:
    pretraining = run.results.pretraining
    return _Health(
        "" if alone else run.label, health_checks(pretraining), number(pretraining.knn_top1)
    )


def _lineage(data: ReportData) -> list[tuple[str, str]]:
    entries: list[tuple[str, str]] = []
    for detail in data.details:
        facts, of = (
            detail.run.results.pretraining,
            "" if len(data.details) == 1 else f"{detail.run.label}: ",
        )
        entries += [
            (f"{of}recipe", facts.recipe),
            (f"{of}data digest", facts.data_digest),
            (f"{of}pretraining run", facts.run_id),
            (f"{of}backbone", facts.backbone_url),
        ]
        runs = dict.fromkeys((row.transfer, row.run_id) for row in detail.run.results.rows)
        entries += [(f"{of}run of {name}", run) for name, run in runs]
    return entries


def _differences(data: ReportData) -> list[tuple[str, list[str]]]:
    """Settings in which the examples differ from the first one."""
    first, *others = data.examples
    return [
        (
            f"Differences of settings, {first.run.label} -> {other.run.label}",
            config_difference(first.params, other.params),
        )
        for other in others
    ]


def _settings(data: ReportData) -> list[tuple[str, dict[str, str]]]:
    alone = len(data.details) == 1
    return [
        ("Settings" if alone else f"Settings of {detail.run.label}", detail.params)
        for detail in data.examples
        if detail.params
    ]
