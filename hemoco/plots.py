"""The plots of a report, as SVG. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hemoco.comparison import PRETRAINED as PRETRAINED_INIT
from hemoco.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PRETRAINED, LIMIT = "#0072B2", "#D55E00"
_COLOURS = (PRETRAINED, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#F0E442")  # by init
_INK = "#333333"
_MOST_POINTS = 1000


def line_plot(
    points: Sequence[tuple[float, float]], *, x_label: str, y_label: str, limit: tuple[float, str] | None
) -> bytes:
    """A curve, and a dashed horizontal line with its label where a limit is given."""
    figure, axes = _canvas(height=2.8)
    thinned = _thinned(points)
    marker = "o" if len(thinned) <= 30 else ""
    axes.plot([x for x, _ in thinned], [y for _, y in thinned], color=PRETRAINED, linewidth=1.8, marker=marker)
    axes.margins(y=0.12)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if limit is not None:
        value, label = limit
        axes.axhline(value, color=LIMIT, linewidth=1.5, linestyle="--")
        axes.annotate(
            label,
            (0.99, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color="#A84A00",
            fontsize=9,
        )
    return _svg(figure)


def transfer_bars(found: Comparison) -> bytes:
    """A horizontal bar per transfer and init, the mean over the seeds; a dot for each seed where there are several."""
    transfers = list(dict.fromkeys((row.transfer, row.metric) for row in found.rows))
    # the pretrained first: it has a colour of its own in all plots
    inits = sorted(dict.fromkeys(row.init for row in found.rows), key=lambda init: init != PRETRAINED_INIT)
    height = 0.74 / max(len(inits), 1)
    figure, axes = _canvas(height=0.9 + (0.25 + 0.25 * len(inits)) * len(transfers))
    for place, (transfer, _) in enumerate(transfers):
        for number, init in enumerate(inits):
            values = [row.value for row in found.rows if (row.transfer, row.init) == (transfer, init)]
            if not values:
                continue
            mean, middle = statistics.fmean(values), place + (number - (len(inits) - 1) / 2) * height
            axes.barh(middle, mean, height=0.95 * height, color=_COLOURS[number % len(_COLOURS)], label=init)
            axes.text(max(values) + 0.02, middle, f"{mean:.3f}", va="center", fontsize=9, color=_INK)
            if len(values) > 1:
                axes.plot(values, [middle] * len(values), "o", color="black", markersize=3.5, alpha=0.7)
    axes.set_yticks(range(len(transfers)), [f"{transfer}\n{metric}" for transfer, metric in transfers])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.grid(visible=False, axis="y")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    figure.legend(once.values(), once.keys(), loc="outside upper center", ncols=2, frameon=False, fontsize=10)
    return _svg(figure)


def _canvas(height: float) -> "tuple[Figure, Axes]":
    """A figure so narrow (inches) that its text can be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 1000 points: means over neighbours, so that no bend is lost."""
    width = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + width] for start in range(0, len(points), max(width, 1))]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _svg(figure: "Figure") -> bytes:
    import matplotlib

    text = io.BytesIO()
    # equal data must give equal bytes
    with matplotlib.rc_context({"svg.hashsalt": "hemoco"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
