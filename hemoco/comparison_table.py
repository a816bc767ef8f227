"""A comparison as terminal table, Markdown, CSV and JSON."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemoco.results.records import Comparison, Row, Summary, summaries

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("transfer", "metric", "pretrained", "against", "value", "difference", "seeds", "beyond noise")
"""Of the table of summaries, as `summary_cells` fills it."""
_NUMBERS = ("pretrained", "value", "difference", "seeds")
_BROKEN = ("pretrained", "value", "difference", "beyond noise")  # in two lines where the terminal is narrow
_WIDEST_NAME = 20  # of a transfer, before it is broken
_LEGEND = "± after a value: deviation over seeds; after a difference: its 95% interval; beyond noise: it leaves out 0"


def to_json(found: Comparison) -> str:
    """Keys `pretraining` and `rows`; numbers that are unknown or not finite are null."""

    def known(facts: dict[str, Any]) -> dict[str, Any]:
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in facts.items()}

    rows = [known(dataclasses.asdict(row)) for row in found.rows]
    return json.dumps({"pretraining": known(dataclasses.asdict(found.pretraining)), "rows": rows}, indent=2) + "\n"


def to_csv(found: Comparison) -> str:
    """One line per row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in found.rows)
    return text.getvalue()


def to_markdown(found: Comparison) -> str:
    """One line per transfer and baseline: means over the seeds with their deviation, and what failed or is open."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---:|---|---:|---:|---:|---|",
        *(
            "| " + " | ".join(cell.replace("|", r"\|") for cell in summary_cells(line)) + " |"
            for line in summaries(found)
        ),
    ]
    failed = [f"- {item.transfer} failed: {_escaped(item.reason)}" for item in found.failed]
    failed += [f"- {item.transfer} is unfinished: {item.reason}" for item in found.unfinished]
    legend = ["", _LEGEND] if any(line.difference.pairs > 1 for line in summaries(found)) else []
    return "\n".join([*lines, *legend, *([""] if failed else []), *failed]) + "\n"


def rich_table(found: Comparison) -> "Table":
    """The summary for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    facts = found.pretraining
    loss, chance, std, knn = map(_number, (facts.loss, facts.chance_loss, facts.embedding_std, facts.knn_top1))
    caption = f"pretraining: loss {loss} (chance {chance}), embedding std {std} (1 is isotropic), kNN {knn}"
    if any(line.difference.pairs > 1 for line in summaries(found)):
        caption += f"\n{_LEGEND}"
    below = Text(f"\n{caption}")
    for item in found.failed:
        below.append(f"\n{item.transfer} failed: {item.reason}", style="bold red")
    for item in found.unfinished:
        below.append(f"\n{item.transfer} is unfinished: {item.reason}", style="bold yellow")
    table = Table(
        title=Text(facts.run),
        caption=below,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # the box has a space between columns
        pad_edge=False,
    )
    for name in COLUMNS:
        table.add_column(
            name, justify="right" if name in _NUMBERS else "left", overflow="fold", no_wrap=name not in _BROKEN
        )
    table.columns[0].no_wrap = all(len(row.transfer) <= _WIDEST_NAME for row in found.rows)
    for line in summaries(found):
        table.add_row(*map(Text, summary_cells(line)), style="" if not line.difference.mean < 0 else "yellow")
    return table


def write_comparison(found: Comparison, folder: Path) -> None:
    """Writes comparison.json, .csv and .md into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", to_json(found)), ("csv", to_csv(found)), ("md", to_markdown(found))):
        (folder / f"comparison.{suffix}").write_text(text, encoding="utf-8")


def summary_cells(line: Summary) -> list[str]:
    """The line as text, one cell for each of `COLUMNS`: means +- deviation, the difference +- its 95% interval."""
    difference = line.difference
    shown = "-" if math.isnan(difference.mean) else f"{difference.mean:+.3f}{_margin(difference.half_width)}"
    unknown = {0: "-", 1: "one seed"}.get(difference.pairs, "no spread")
    noise = {True: "yes", False: "no", None: unknown}[difference.stands_out]
    seeds = str(difference.pairs or max(line.pretrained.values, line.other.values))
    ours, theirs = (f"{_number(spread.mean)}{_margin(spread.sd)}" for spread in (line.pretrained, line.other))
    return [line.transfer, line.metric, ours, line.baseline or "-", theirs, shown, seeds, noise]


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _margin(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.3f}"
