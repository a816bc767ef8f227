"""Runs side by side as tables, beyond their results: quality over epochs, by labels, and what they took."""

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
    """Those that there is something for."""
    found = [
        _curve(comparison),
        *_label_efficiency(comparison),
        _pretraining_cost(comparison),
        _transfer_times(comparison),
    ]
    return [section for section in found if section.rows]


def duration(seconds: float) -> str:
    """In the unit that suits it; a dash where it is unknown."""
    if math.isnan(seconds):
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _pretraining_cost(comparison: Comparison) -> Section:
    notes = [
        "active: training steps, and what lies between two records unless it is more than 10 minutes; device hours: "
        "active time of the devices asked for at the start; images: repeated steps count once"
    ]
    paused = [f"{run.label} {run.cost.pauses}" for run in comparison.runs if run.cost.pauses]
    if paused:
        notes.append(f"pauses, not counted: {', '.join(paused)}")
    return Section(
        name="cost",
        title="Cost of the pretraining",
        columns=("run", "active", "device hours", "images", "images/s"),
        rows=tuple((run.label, *_cost_cells(run)) for run in comparison.runs if run.cost.images),
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
    record: dict[str, Value] = {
        "label": run.label,
        "run": run.name,
        "device": cost.device,
        "devices": cost.devices,
    }
    numbers = {
        "active_s": cost.active_s,
        "device_hours": cost.device_hours,
        "images": float(cost.images) if cost.images else math.nan,
        "images_per_s": cost.images_per_s,
    }
    return (
        record | {name: known(value) for name, value in numbers.items()} | {"pauses": cost.pauses}
    )


def _transfer_times(comparison: Comparison) -> Section:
    transfers = list(
        dict.fromkeys(time.transfer for run in comparison.runs for time in run.cost.transfers)
    )
    cells = {
        (run.label, time.transfer): time for run in comparison.runs for time in run.cost.transfers
    }
    rows = []
    for transfer in transfers:
        times = [cells.get((run.label, transfer)) for run in comparison.runs]
        shown = (
            "-" if time is None else duration(time.wall_s) + (" +" if time.again else "")
            for time in times
        )
        rows.append((transfer, *shown))
    notes = ["from the first start to the last end, pauses included; all inits and seeds"]
    if any(time.again for time in cells.values()):
        notes.append("+: some of it was started more than once")
    return Section(
        name="transfer_times",
        title="Wall time of the transfers",
        columns=("transfer", *(run.label for run in comparison.runs)),
        rows=tuple(rows),
        notes=tuple(notes),
        records=tuple(
            {
                "transfer": time.transfer,
                "label": run.label,
                "run": run.name,
                "wall_s": known(time.wall_s),
                "started_again": time.again,
            }
            for run in comparison.runs
            for time in run.cost.transfers
        ),
    )


def _curve(comparison: Comparison) -> Section:
    places = [
        place for place in _places(comparison) if any(at == place for _, at in comparison.curve)
    ]
    epochs = sorted({epoch for epoch, _ in comparison.curve})
    metrics = {line.label: line.metric for line in comparison.lines}
    alone = len({place.column for place in places}) == 1
    return Section(
        name="curve",
        title="Transfer over epochs of the pretraining",
        columns=(
            "epoch",
            *(place.line if alone else f"{place.line} {place.column}" for place in places),
        ),
        rows=tuple(
            (
                str(e),
                *(
                    spread_cell(comparison.curve[e, p]) if (e, p) in comparison.curve else "-"
                    for p in places
                ),
            )
            for e in epochs
        ),
        records=tuple(
            {"epoch": epoch}
            | mean_record(place.line, metrics[place.line], place.column, repeated_spread(values))
            for (epoch, place), values in sorted(comparison.curve.items())
        ),
    )


def _places(comparison: Comparison) -> list[Cell]:
    return [
        Cell(line.label, column.label) for line in comparison.lines for column in comparison.columns
    ]


def _label_efficiency(comparison: Comparison) -> list[Section]:
    found = []
    for place, points in enumerate(label_curves(comparison), start=1):
        rows, records = [], []
        for labels, images, line in points:
            cells = [value_cell(comparison, line, column) for column in comparison.columns]
            rows.append((labels, number(images, 0), line.label, *cells))
            records += [
                {"labels": labels, "images": known(images)} | record
                for record in line_records(comparison, line)
            ]
        section = Section(
            name="label_efficiency" if place == 1 else f"label_efficiency_{place}",
            title="Label efficiency" if place == 1 else f"Label efficiency, data set {place}",
            columns=(
                "labels",
                "images",
                "transfer",
                *(column.label for column in comparison.columns),
            ),
            heads=3,
            rows=tuple(rows),
            records=tuple(records),
        )
        found.append(section)
    return found


def sweep_section(result: SweepResult) -> Section:
    """A line for each trial, the best first."""
    names = list(dict.fromkeys(name for trial in result.trials for name in trial.settings))
    short = {name: name.removeprefix("pretrain.") for name in names}
    rows = [
        (
            str(trial.trial),
            *(trial.settings.get(name, "") for name in names),
            "" if math.isnan(trial.objective) else f"{trial.objective:.4f}",
            str(trial.epochs),
            trial.outcome,
            trial.reason,
        )
        for trial in result.trials
    ]
    watched = f"early stops by {result.watch}" if result.watch else "no early stops"
    return Section(
        name="sweep",
        title=f"{result.sweep}: {len(rows)} trials of {result.recipe}, {watched}",
        columns=("trial", *short.values(), result.objective, "epochs", "outcome", "reason"),
        rows=tuple(rows),
        best=frozenset({(0, 1 + len(names))} if result.best else ()),
    )
