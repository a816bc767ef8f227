"""Further tables of compared runs (quality over epochs, label efficiency, cost), and of sweeps."""

import math

from hemoco.intervals import repeated_spread
from hemoco.report.comparison_tables import (
    known,
    line_records,
    mean_record,
    number,
    spread_cell,
    value_cell,
)
from hemoco.report.tables import Section, Value
from hemoco.results.comparison import Cell, Comparison, Run
from hemoco.results.label_efficiency import label_curves
from hemoco.results.sweep import SweepResult


def extra_sections(comparison: Comparison) -> list[Section]:
    """Returns the further tables that have rows."""
    sections = [
        _curve(comparison),
        *_label_efficiency(comparison),
        _pretraining_cost(comparison),
        _transfer_times(comparison),
    ]
    return [section for section in sections if section.rows]


def duration(seconds: float) -> str:
    """Formats a duration in seconds, minutes or hours; nan becomes a dash."""
    if math.isnan(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _pretraining_cost(comparison: Comparison) -> Section:
    notes = [
        "active: training steps, and the time between two records unless it is more than "
        "10 minutes; device hours: active time of the devices requested at the start; "
        "images: repeated steps count once"
    ]
    paused = [f"{run.label} {run.cost.pauses}" for run in comparison.runs if run.cost.pauses]
    if paused:
        notes.append(f"pauses, not counted: {', '.join(paused)}")
    rows = [(run.label, *_cost_cells(run)) for run in comparison.runs if run.cost.images]
    return Section(
        name="cost",
        title="Cost of the pretraining",
        columns=("run", "active", "device hours", "images", "images/s"),
        rows=tuple(rows),
        notes=tuple(notes),
        records=tuple(_cost_record(run) for run in comparison.runs),
    )


def _cost_cells(run: Run) -> tuple[str, ...]:
    cost = run.cost
    hours = "-" if math.isnan(cost.device_hours) else f"{cost.device_hours:.3g} {cost.device} h"
    rate = "-" if math.isnan(cost.images_per_s) else f"{cost.images_per_s:,.0f}"
    return duration(cost.active_s), hours, f"{cost.images:,}", rate


def _cost_record(run: Run) -> dict[str, Value]:
    cost = run.cost
    return {
        "label": run.label,
        "run": run.name,
        "device": cost.device,
        "devices": cost.devices,
        "active_s": known(cost.active_s),
        "device_hours": known(cost.device_hours),
        "images": float(cost.images) if cost.images else None,
        "images_per_s": known(cost.images_per_s),
        "pauses": cost.pauses,
    }


def _transfer_times(comparison: Comparison) -> Section:
    cells = {}
    records: list[dict[str, Value]] = []
    for run in comparison.runs:
        for time in run.cost.transfers:
            restarted = " +" if time.again else ""
            cells[run.label, time.transfer] = f"{duration(time.wall_s)}{restarted}"
            records.append(
                {
                    "transfer": time.transfer,
                    "label": run.label,
                    "run": run.name,
                    "wall_s": known(time.wall_s),
                    "started_again": time.again,
                }
            )
    notes = ["from the first start to the last end, pauses included; all inits and seeds"]
    if any(record["started_again"] for record in records):
        notes.append("+: part of it was started more than once")
    labels = [run.label for run in comparison.runs]
    rows = []
    for transfer in dict.fromkeys(transfer for _, transfer in cells):
        times = [cells.get((label, transfer), "-") for label in labels]
        rows.append((transfer, *times))
    return Section(
        name="transfer_times",
        title="Wall time of the transfers",
        columns=("transfer", *labels),
        rows=tuple(rows),
        notes=tuple(notes),
        records=tuple(records),
    )


def _curve(comparison: Comparison) -> Section:
    curve = comparison.curve
    with_curve = {cell for _, cell in curve}
    cells = []
    for line in comparison.lines:
        for column in comparison.columns:
            cell = Cell(line.label, column.label)
            if cell in with_curve:
                cells.append(cell)
    several = len({cell.column for cell in cells}) > 1
    rows = []
    for epoch in sorted({epoch for epoch, _ in curve}):
        row = [str(epoch)]
        for cell in cells:
            row.append(spread_cell(curve[epoch, cell]) if (epoch, cell) in curve else "-")
        rows.append(tuple(row))
    metrics = {line.label: line.metric for line in comparison.lines}
    records = []
    for (epoch, cell), measured in sorted(curve.items()):
        spread = repeated_spread(measured)
        record = mean_record(cell.line, metrics[cell.line], cell.column, spread)
        records.append({"epoch": epoch} | record)
    return Section(
        name="curve",
        title="Transfer over epochs of the pretraining",
        columns=(
            "epoch",
            *(f"{cell.line} {cell.column}" if several else cell.line for cell in cells),
        ),
        rows=tuple(rows),
        records=tuple(records),
    )


def _label_efficiency(comparison: Comparison) -> list[Section]:
    """Returns a table for each data set with low-shot transfers."""
    sections = []
    for index, points in enumerate(label_curves(comparison), start=1):
        rows, records = [], []
        for labels, images, line in points:
            cells = [value_cell(comparison, line, column) for column in comparison.columns]
            rows.append((labels, number(images, 0), line.label, *cells))
            for record in line_records(comparison, line):
                records.append({"labels": labels, "images": known(images)} | record)
        labels_of_columns = [column.label for column in comparison.columns]
        section = Section(
            name="label_efficiency" if index == 1 else f"label_efficiency_{index}",
            title="Label efficiency" if index == 1 else f"Label efficiency, data set {index}",
            columns=("labels", "images", "transfer", *labels_of_columns),
            heads=3,
            rows=tuple(rows),
            records=tuple(records),
        )
        sections.append(section)
    return sections


def sweep_section(result: SweepResult) -> Section:
    """Returns a table of a sweep's trials, best first."""
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.settings))
    rows = []
    for trial in result.trials:
        settings = [trial.settings.get(name, "") for name in names]
        objective = "" if math.isnan(trial.objective) else f"{trial.objective:.4f}"
        rows.append(
            (
                str(trial.trial),
                *settings,
                objective,
                str(trial.epochs),
                trial.outcome,
                trial.reason,
            )
        )
    watched = f"early stops by {result.watch}" if result.watch else "no early stops"
    short_names = [name.removeprefix("pretrain.") for name in names]
    return Section(
        name="sweep",
        title=f"{result.sweep}: {len(rows)} trials of {result.recipe}, {watched}",
        columns=("trial", *short_names, result.objective, "epochs", "outcome", "reason"),
        rows=tuple(rows),
        best=frozenset({(0, 1 + len(names))} if result.best else ()),
    )
