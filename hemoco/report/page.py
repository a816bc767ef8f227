"""One run, or several side by side, as one HTML file that needs nothing else."""

import math
from html import escape

from hemoco.config import config_difference
from hemoco.report.comparison_tables import main_sections, number
from hemoco.report.data import ReportData, RunDetail
from hemoco.report.extra_tables import extra_sections
from hemoco.report.features import feature_sections, image_sections
from hemoco.report.html import columns, folded, page, plot, section, table
from hemoco.report.plots import Panel, Point, Series, column_colours, interval, line_plot, transfer_bars
from hemoco.report.tables import Section
from hemoco.report.training import health_checks, quality_plots, timeline, training_plots
from hemoco.results.comparison import Comparison, Pair, Place
from hemoco.results.label_efficiency import LabelPoint, label_curves
from hemoco.results.records import Pretraining


def render_report(data: ReportData) -> str:
    """The report as HTML: what transfers, what was learned, how the training went, and where all of it comes from."""
    many, names = data.many, [run.name for run in data.many.runs]
    title = names[0] if len(names) == 1 else f"{len(names)} runs: {', '.join(names)}"
    header = (
        f'<header><p class="kicker">hemoco {"run" if len(names) == 1 else "comparison"}</p><h1>{escape(title)}</h1>'
        f'<p class="verdict">{escape(_verdict(many))}</p></header>'
    )
    tables = {found.name: found for found in [*main_sections(many), *extra_sections(many)]}
    wide = [tables.pop(name) for name in ("pretrainings", "transfers", "differences") if name in tables]
    parts = [
        *(_table(found) for found in wide if found.name != "pretrainings" or len(names) > 1),
        "" if many.lines else section("Transfers", "<p>No transfer has been measured yet.</p>"),
        columns(
            [
                *(_bars(many), *_label_efficiency(many), *quality_plots(data)),
                *(_health(data), *training_plots(data), timeline(data)),
            ]
        ),
        *feature_sections(data),
        *image_sections(data),
        *(_table(found) for name, found in tables.items() if not name.startswith(("label_efficiency", "curve"))),
        _lineage(data),
        *_settings(data),
    ]
    return page(title, header, parts)


def _verdict(many: Comparison) -> str:
    ill = [
        run.label
        for run in many.runs
        if run.found.pretraining.status == "FINISHED"  # one that goes on may be on its way
        and any(check.passed is False for check in health_checks(run.found.pretraining))
    ]
    alone = len(many.runs) == 1
    warning = "" if not ill else " But the pretraining is not healthy." if alone else f" Not healthy: {', '.join(ill)}."
    failed = sum(len(run.found.failed) for run in many.runs)
    return _winner(many) + (f" {failed} failed." if failed else "") + warning


def _winner(many: Comparison) -> str:
    pretrainings = [column.label for column in many.columns if not column.baseline]
    theirs = pretrainings[1] if len(pretrainings) > 1 else _baseline(many, pretrainings[0])
    pairs = [pair for pair in many.pairs if (pair.ours, pair.theirs) == (pretrainings[0], theirs)]
    measured = [pair for pair in pairs if not math.isnan(pair.difference.mean)]
    if not measured:
        return f"No transfer has been measured from both {pretrainings[0]} and {theirs} yet."
    better, clear = (sum(_beats(pair, clearly=clearly) for pair in measured) for clearly in (False, True))
    noun = "transfer" if len(measured) == 1 else "transfers"
    beyond = f", {clear} beyond the noise of seeds" if any(pair.difference.noise for pair in measured) else ""
    if len(pretrainings) == 1:
        whom = "random initialisation" if theirs == "random" else theirs
        return f"Pretraining beats {whom} in {better} of {len(measured)} {noun}{beyond}."
    more = "" if len(pretrainings) == 2 else " All other pairs are in the tables."
    return f"{pretrainings[0]} beats {theirs} in {better} of {len(measured)} {noun}{beyond}.{more}"


def _baseline(many: Comparison, ours: str) -> str:
    """The random one, else the first that was measured beside the pretraining."""
    measured = [pair.theirs for pair in many.pairs if pair.ours == ours]
    random = [column.label for column in many.columns if column.baseline == "random" and column.label in measured]
    return (*random, *measured, "random")[0]


def _beats(pair: Pair, *, clearly: bool) -> bool:
    return pair.difference.mean > 0 and (pair.difference.stands_out is True or not clearly)


def _table(found: Section) -> str:
    return section(found.title, table(found))


def _bars(many: Comparison) -> str:
    if not many.values:
        return ""
    words = [
        f"{line.label} {line.metric}: "
        + ", ".join(
            f"{column.label} {number(interval(many.values[place]).mean)}"
            for column in many.columns
            if (place := Place(line.label, column.label)) in many.values
        )
        for line in many.lines
    ]
    caption = "Means; the line is the 95% interval, a dot a single seed or pretraining. Higher is better, 1 is perfect."
    return plot("Transfers against baselines", transfer_bars(many), f"Bars. {'; '.join(words)}", caption)


def _label_efficiency(many: Comparison) -> list[str]:
    plots = []
    for place, points in enumerate(label_curves(many), start=1):
        measured = [(column.label, _label_points(many, points, column.label)) for column in many.columns]
        colours = column_colours(many)
        series = [Series(label=label, points=found, colour=colours[label]) for label, found in measured if found]
        if not series:
            continue
        ticks = [(float(order), _tick(point)) for order, point in enumerate(points)]
        panel = Panel(series=series, x_label="labels", y_label=points[0].line.metric, shares=True, ticks=ticks)
        alt = "Lines: " + "; ".join(f"{one.label} ends at {one.points[-1].y:.3f}" for one in series)
        caption = "Low-shot transfers up to a linear classifier on all labels; 95% intervals."
        title = "Label efficiency" if place == 1 else f"Label efficiency, data set {place}"
        plots.append(plot(title, line_plot(panel), alt, caption))
    return plots


def _label_points(many: Comparison, points: list[LabelPoint], column: str) -> list[Point]:
    places = [(order, Place(point.line.label, column)) for order, point in enumerate(points)]
    found = [(order, interval(many.values[place])) for order, place in places if place in many.values]
    return [Point(order, value.mean, value.half_width) for order, value in found]


def _tick(point: LabelPoint) -> str:
    images = "" if math.isnan(point.images) else f"\n{point.images:,.0f} images"
    return f"{point.labels}{images}"


def _health(data: ReportData) -> str:
    alone = len(data.details) == 1
    parts = [
        ("" if alone else f"<h3>{escape(detail.run.label)}</h3>") + _checks(detail.run.found.pretraining)
        for detail in data.details
    ]
    return section("Health of the pretraining", "".join(parts))


def _checks(pretraining: Pretraining) -> str:
    marks = {True: ("pass", "PASS"), False: ("fail", "FAIL"), None: ("unknown", "?")}
    items = []
    for check in health_checks(pretraining):
        style, word = marks[check.passed]
        items.append(
            f'<li><span class="mark {style}">{word}</span>{escape(check.name)} '
            f'<span class="note finding">{escape(check.finding)}</span></li>'
        )
    if not math.isnan(pretraining.knn_top1):
        items.append(
            f"<li>kNN top-1 accuracy of the last measurement: <strong>{number(pretraining.knn_top1)}</strong></li>"
        )
    return f"<ul>{''.join(items)}</ul>"


def _lineage(data: ReportData) -> str:
    alone = len(data.details) == 1
    entries: list[tuple[str, str]] = []
    for detail in data.details:
        facts, of = detail.run.found.pretraining, "" if alone else f"{detail.run.label}: "
        entries += [
            (f"{of}recipe", facts.recipe),
            (f"{of}data digest", facts.data_digest),
            (f"{of}pretraining run", facts.run_id),
            (f"{of}backbone", facts.backbone_url),
        ]
        runs = dict.fromkeys((row.transfer, row.run_id) for row in detail.run.found.rows)
        entries += [(f"{of}run of {name}", run) for name, run in runs]
    items = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value or '-')}</code></dd>" for name, value in entries)
    return section("Lineage", f"<dl>{items}</dl>")


def _settings(data: ReportData) -> list[str]:
    first, *others = data.examples
    found = [_difference(first, other) for other in others]
    alone = len(data.details) == 1
    for detail in data.examples:
        if detail.params:
            title = "Settings" if alone else f"Settings of {detail.run.label}"
            found.append(section(title, folded(f"All {len(detail.params)}", _params(detail.params))))
    return found


def _difference(first: RunDetail, other: RunDetail) -> str:
    changed = config_difference(first.params, other.params)
    items = "".join(f"<li><code>{escape(change)}</code></li>" for change in changed)
    body = f"<ul>{items}</ul>" if changed else "<p>None that changes a result.</p>"
    return section(f"Differences of settings, {first.run.label} -> {other.run.label}", body)


def _params(params: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td><code>{escape(value)}</code></td></tr>'
        for name, value in sorted(params.items())
    )
    head = '<thead><tr><th scope="col">name</th><th scope="col">value</th></tr></thead>'
    return f"<table>{head}<tbody>{rows}</tbody></table>"
