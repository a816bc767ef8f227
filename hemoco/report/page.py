"""report.html: one run, or several side by side, as one file without scripts or outside links."""

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
from hemoco.results.comparison import Cell, Comparison, Run
from hemoco.results.label_efficiency import LabelPoint, label_curves

if TYPE_CHECKING:
    from jinja2 import Template

_FIRST = ("pretrainings", "transfers", "differences")
_PLOTTED = ("label_efficiency", "curve")


def render_report(data: ReportData) -> str:
    """Returns the report as HTML: results, training curves, features, cost, lineage, settings."""
    comparison = data.comparison
    names = [run.name for run in comparison.runs]
    alone = len(names) == 1
    tables = {section.name: section for section in sections(comparison)}
    if alone:
        tables.pop("pretrainings", None)  # health and lineage show the same
    further_tables = [
        section
        for name, section in tables.items()
        if name not in _FIRST and not name.startswith(_PLOTTED)
    ]
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
        further_tables=further_tables,
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
    """Returns a URL that contains a file."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _verdict(comparison: Comparison) -> str:
    """Returns the sentences at the top: which side is better, what failed, what is not healthy."""
    sentences = [_winner(comparison)]
    failed = sum(len(run.results.failed) for run in comparison.runs)
    if failed:
        sentences.append(f"{failed} {'transfer' if failed == 1 else 'transfers'} failed.")
    unhealthy = []
    for run in comparison.runs:
        checks = health_checks(run.results.pretraining)
        # only of finished pretrainings: one that is running may still become healthy
        is_finished = run.results.pretraining.status == "FINISHED"
        if is_finished and any(check.passed is False for check in checks):
            unhealthy.append(run.label)
    if unhealthy and len(comparison.runs) == 1:
        sentences.append("The pretraining is not healthy.")
    elif unhealthy:
        sentences.append(f"Pretrainings that are not healthy: {', '.join(unhealthy)}.")
    return " ".join(sentences)


def _winner(comparison: Comparison) -> str:
    """Returns in how many transfers the first pretraining beats the second, or its baseline."""
    ours, *others = [column.label for column in comparison.pretrainings]
    theirs = others[0] if others else _baseline(comparison, ours)
    differences = [
        pair.difference
        for pair in comparison.pairs
        if (pair.ours, pair.theirs) == (ours, theirs) and not math.isnan(pair.difference.mean)
    ]
    if not differences:
        return f"No transfer has been measured from both {ours} and {theirs} yet."
    better = [difference for difference in differences if difference.mean > 0]
    significant = sum(difference.stands_out is True for difference in better)
    noun = "transfer" if len(differences) == 1 else "transfers"
    score = f"in {len(better)} of {len(differences)} {noun}"
    if better and any(difference.noise for difference in differences):
        score += f", in {significant} of them significantly (95%)"
    if not others:
        opponent = "random initialisation" if theirs == "random" else theirs
        return f"Pretraining beats {opponent} {score}."
    more = "" if len(others) == 1 else " All other pairs are in the tables."
    return f"{ours} beats {theirs} {score}.{more}"


def _baseline(comparison: Comparison, ours: str) -> str:
    """Returns the random baseline if it was measured, else the first one that was."""
    measured = [pair.theirs for pair in comparison.pairs if pair.ours == ours]
    for column in comparison.columns:
        if column.baseline == "random" and column.label in measured:
            return column.label
    return measured[0] if measured else "random"


def _bars(comparison: Comparison) -> list[Plot]:
    if not comparison.values:
        return []
    descriptions = []
    for line in comparison.lines:
        means = []
        for column in comparison.columns:
            measured = comparison.values.get(Cell(line.label, column.label))
            if measured:
                means.append(f"{column.label} {number(interval(measured).mean)}")
        descriptions.append(f"{line.label} {line.metric}: {', '.join(means)}")
    caption = (
        "Bars are means, lines their 95% intervals, dots single seeds or pretrainings. "
        "Higher is better; 1 is perfect."
    )
    alt = f"Bars. {'; '.join(descriptions)}"
    return [Plot("Transfers against baselines", transfer_bars(comparison), alt, caption)]


def _label_efficiency(comparison: Comparison) -> list[Plot]:
    """Returns a plot for each data set with low-shot transfers."""
    plots = []
    colours = column_colours(comparison)
    for index, points in enumerate(label_curves(comparison), start=1):
        series = []
        for column in comparison.columns:
            curve = _label_points(comparison, points, column.label)
            if curve:
                series.append(
                    Series(label=column.label, points=curve, colour=colours[column.label])
                )
        if not series:
            continue
        ticks = [(float(x), _tick(point)) for x, point in enumerate(points)]
        panel = Panel(
            series=series, x_label="labels", y_label=points[0].line.metric, shares=True, ticks=ticks
        )
        ends = [f"{curve.label} ends at {curve.points[-1].y:.3f}" for curve in series]
        caption = (
            "Low-shot transfers from few labels on, and a linear classifier on all of them; "
            "95% intervals."
        )
        title = "Label efficiency" if index == 1 else f"Label efficiency, data set {index}"
        plots.append(Plot(title, line_plot(panel), f"Lines: {'; '.join(ends)}", caption))
    return plots


def _label_points(comparison: Comparison, points: list[LabelPoint], column: str) -> list[Point]:
    curve = []
    for x, point in enumerate(points):
        measured = comparison.values.get(Cell(point.line.label, column))
        if measured:
            value = interval(measured)
            curve.append(Point(x, value.mean, value.half_width))
    return curve


def _tick(point: LabelPoint) -> str:
    images = "" if math.isnan(point.images) else f"\n{point.images:,.0f} images"
    return f"{point.labels}{images}"


class _Health(NamedTuple):
    """Health of one pretraining."""

    label: str
    """Label of the run; empty if it is the only one."""
    checks: Sequence[HealthCheck]
    knn_top1: str
    """A dash if it was not measured."""


def _health(run: Run, *, alone: bool) -> _Health:
    pretraining = run.results.pretraining
    return _Health(
        "" if alone else run.label, health_checks(pretraining), number(pretraining.knn_top1)
    )


def _lineage(data: ReportData) -> list[tuple[str, str]]:
    """Returns names and values: recipe, data, MLflow runs and backbone of each run."""
    entries: list[tuple[str, str]] = []
    for detail in data.details:
        prefix = "" if len(data.details) == 1 else f"{detail.run.label}: "
        facts = detail.run.results.pretraining
        entries += [
            (f"{prefix}recipe", facts.recipe),
            (f"{prefix}data digest", facts.data_digest),
            (f"{prefix}pretraining run", facts.run_id),
            (f"{prefix}backbone", facts.backbone_url),
        ]
        runs = dict.fromkeys((row.transfer, row.run_id) for row in detail.run.results.rows)
        entries += [(f"{prefix}run of {name}", run_id) for name, run_id in runs]
    return entries


def _differences(data: ReportData) -> list[tuple[str, list[str]]]:
    """Returns the settings in which the other examples differ from the first one, with titles."""
    first, *others = data.examples
    differences = []
    for other in others:
        title = f"Differences of settings, {first.run.label} -> {other.run.label}"
        differences.append((title, config_difference(first.params, other.params)))
    return differences


def _settings(data: ReportData) -> list[tuple[str, dict[str, str]]]:
    alone = len(data.details) == 1
    return [
        ("Settings" if alone else f"Settings of {detail.run.label}", detail.params)
        for detail in data.examples
        if detail.params
    ]
