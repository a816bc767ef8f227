"""Plots of a report as SVG, in Okabe and Ito's colours, which colour-blind readers tell apart."""

import dataclasses
import io
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hemoco.intervals import Repetitions, confidence_half_width
from hemoco.results.comparison import Cell, Comparison
from hemoco.results.records import PRETRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Colours of the pretrainings in their order; the seventh has the first colour again."""
BASELINE_COLOURS = ("#8C8C8C", "#BFBFBF", "#5E5E5E", "#A6A6A6")
_DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
_INK, _LIMIT = "#333333", "#A84A00"
_MOST_POINTS = 1000
_WIDTH = 4.7  # inches; narrow, so that the text is large enough to read on a phone


class Plot(NamedTuple):
    """A drawn plot with its texts."""

    title: str
    svg: bytes
    alt: str
    """Description for readers who cannot see the plot."""
    caption: str


class Point(NamedTuple):
    """One point of a curve, with half the width of its interval, nan if there is none."""

    x: float
    y: float
    half_width: float = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A curve."""

    label: str
    """Name in the legend."""
    points: Sequence[Point]
    colour: str
    dashes: Literal["-", "--", ":", "-."] = "-"


def numbered(label: str, points: Sequence[Point], number: int, repetition: int = 0) -> Series:
    """Returns a curve in the colour of its number.

    Repetitions share the colour and differ in their dashes, as do numbers beyond the last colour.
    """
    dashes = _DASHES[(repetition + number // len(COLOURS)) % len(_DASHES)]
    return Series(label=label, points=points, colour=COLOURS[number % len(COLOURS)], dashes=dashes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """Axes with curves."""

    series: Sequence[Series]
    x_label: str
    y_label: str
    limits: Sequence[tuple[float, str]] = ()
    """Height and label of dashed horizontal lines."""
    good: tuple[float, float] | None = None
    """Range of values that is shaded as normal."""
    until: tuple[float, str] | None = None
    """End and label of a shaded range of x, which begins at 0."""
    shares: bool = False
    """True for values in [0, 1], where intervals are clipped."""
    ticks: Sequence[tuple[float, str]] = ()
    """Position and label of the ticks of x; matplotlib chooses them if empty."""


def line_plot(panel: Panel) -> bytes:
    """Draws the curves of one panel."""
    figure, (axes,) = _canvas(rows=1, height=2.9)
    _draw_panel(axes, panel)
    _legend(figure, [panel])
    return _svg(figure)


def panels_plot(panels: Sequence[Panel]) -> bytes:
    """Draws panels below each other, with one x axis and one legend for all."""
    figure, all_axes = _canvas(rows=len(panels), height=0.4 + 1.35 * len(panels))
    for index, (axes, panel) in enumerate(zip(all_axes, panels, strict=True)):
        last = index == len(panels) - 1
        _draw_panel(axes, panel if last else dataclasses.replace(panel, x_label=""))
        axes.tick_params(labelbottom=last)
    _legend(figure, panels)
    return _svg(figure)


def transfer_bars(comparison: Comparison) -> bytes:
    """Draws a bar for each transfer and column, with its 95% interval and its values as dots."""
    height = 0.78 / max(len(comparison.columns), 1)
    figure, (axes,) = _canvas(
        rows=1, height=0.9 + (0.3 + 0.25 * len(comparison.columns)) * len(comparison.lines)
    )
    colours = column_colours(comparison)
    for row, line in enumerate(comparison.lines):
        for position, column in enumerate(comparison.columns):
            measured = comparison.values.get(Cell(line.label, column.label))
            if measured:
                middle = row + (position - (len(comparison.columns) - 1) / 2) * height
                _draw_bar(
                    axes,
                    interval(measured),
                    middle=middle,
                    height=height,
                    colour=colours[column.label],
                    label=column.label,
                )
    axes.set_yticks(
        range(len(comparison.lines)), [f"{line.label}\n{line.metric}" for line in comparison.lines]
    )
    axes.set_ylim(len(comparison.lines) - 0.5, -0.5)
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    # each column has a handle for each of its bars, of which the legend needs one
    by_label = dict(zip(labels, handles, strict=True))
    figure.legend(
        by_label.values(),
        by_label.keys(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=10,
    )
    return _svg(figure)


def column_colours(comparison: Comparison) -> dict[str, str]:
    """Returns colours by the columns' labels: strong for pretrainings, grey for baselines."""
    colours = {}
    for index, column in enumerate(comparison.pretrainings):
        colours[column.label] = COLOURS[index % len(COLOURS)]
    baselines = [column for column in comparison.columns if column.baseline]
    for index, column in enumerate(baselines):
        colours[column.label] = BASELINE_COLOURS[index % len(BASELINE_COLOURS)]
    return colours


class Interval(NamedTuple):
    """A mean, half the width of its 95% interval (nan for a single value), and its values."""

    mean: float
    half_width: float
    values: tuple[float, ...]


def interval(measured: Repetitions) -> Interval:
    """Returns mean and interval over the means of several pretrainings, or the seeds of one."""
    means = [statistics.fmean(by_seed.values()) for by_seed in measured]
    values = means if len(means) > 1 else list(measured[0].values())
    return Interval(statistics.fmean(means), confidence_half_width(values), tuple(values))


def _draw_bar(
    axes: "Axes", measured: Interval, *, middle: float, height: float, colour: str, label: str
) -> None:
    """Draws a horizontal bar around the height `middle`, and its mean as a number beside it."""
    mean, half_width, values = measured
    axes.barh(middle, mean, height=0.92 * height, color=colour, label=label)
    end = max(values)
    if len(values) > 1:
        axes.plot(values, [middle] * len(values), "o", color="black", markersize=3, alpha=0.55)
        low = min(max(mean - half_width, 0), 1)
        high = min(max(mean + half_width, 0), 1)
        axes.plot([low, high], [middle, middle], color="black", linewidth=1.4)
        axes.plot([low, high], [middle, middle], "|", color="black", markersize=6)
        end = max(end, high)
    axes.text(end + 0.02, middle, f"{mean:.3f}", va="center", fontsize=9, color=_INK)


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    for series in panel.series:
        points = _thinned(series.points)
        line = _line(series, points)
        line.set_marker("o" if len(points) <= 30 else "")
        axes.add_line(line)
        with_interval = [point for point in points if not math.isnan(point.half_width)]
        if with_interval:
            low, high = (0.0, 1.0) if panel.shares else (-math.inf, math.inf)
            below = [min(point.half_width, point.y - low) for point in with_interval]
            above = [min(point.half_width, high - point.y) for point in with_interval]
            axes.errorbar(
                [point.x for point in with_interval],
                [point.y for point in with_interval],
                yerr=[below, above],
                fmt="none",
                ecolor=line.get_color(),
                capsize=3,
            )
    axes.margins(y=0.14)
    axes.autoscale_view()
    if panel.ticks:
        axes.set_xticks(*zip(*panel.ticks, strict=True))
    _draw_marks(axes, panel)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _draw_marks(axes: "Axes", panel: Panel) -> None:
    for value, label in panel.limits:
        axes.axhline(value, color=_LIMIT, linewidth=1.3, linestyle="--")
        axes.annotate(
            label,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=_LIMIT,
            fontsize=9,
        )
    if panel.good is not None:
        axes.axhspan(*panel.good, color=COLOURS[2], alpha=0.1, linewidth=0)
    if panel.until is not None:
        end, label = panel.until
        axes.axvspan(0, end, color="#777777", alpha=0.14, linewidth=0)
        axes.annotate(
            label,
            (end, 0.03),
            xycoords=("data", "axes fraction"),
            fontsize=8,
            color=_INK,
            xytext=(3, 0),
            textcoords="offset points",
        )


def _legend(figure: "Figure", panels: Sequence[Panel]) -> None:
    """Names the curves, unless the only one is that of a run shown alone."""
    series = list({one.label: one for panel in panels for one in panel.series}.values())
    if [one.label for one in series] in ([], [PRETRAINED]):
        return
    lines = [_line(one, []) for one in series]
    names = [one.label for one in series]
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False, fontsize=9)


def _line(series: Series, points: Sequence[Point]) -> "Line2D":
    from matplotlib.lines import Line2D

    style: dict[str, Any] = {
        "color": series.colour,
        "linestyle": series.dashes,
        "linewidth": 1.7,
        "markersize": 4,
    }
    return Line2D([point.x for point in points], [point.y for point in points], **style)


def _canvas(rows: int, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    all_axes = list(figure.subplots(rows, squeeze=False, sharex=True).flat)
    for axes in all_axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999999")
        axes.tick_params(colors=_INK, labelsize=9)
        axes.grid(color="#E3E3E3", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, all_axes


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Returns at most `_MOST_POINTS` points, each the mean over a group of neighbours."""
    size = math.ceil(len(points) / _MOST_POINTS)
    if size < 2:
        return points
    thinned = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        thinned.append(Point(group[-1].x, statistics.fmean(point.y for point in group)))
    return thinned


def _svg(figure: "Figure") -> bytes:
    import matplotlib

    text = io.BytesIO()
    # Equal data must give equal bytes. By default, matplotlib draws the ids in the SVG at random
    # and records the date; test_equal_data_gives_an_equal_page shows it.
    with matplotlib.rc_context({"svg.hashsalt": "hemoco"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
