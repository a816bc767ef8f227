"""A run as one HTML file that needs nothing else: no script, no request, images inside."""

import base64
import dataclasses
import math
from html import escape

from hemoco.comparison import Pretraining, ReportData, Summary, TransferImage, summaries
from hemoco.comparison_table import COLUMNS, summary_cells
from hemoco.plots import line_plot, transfer_bars

HEALTHY_LOSS = 0.85
"""Fraction of the chance loss ln(K + 1) that a training which learned something stays below."""
HEALTHY_STD = 0.5
"""Embedding std x sqrt(C) that it stays above; 1 is isotropic, 0 collapsed."""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f5f7; color: #1f2328; font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 1rem 0 .5rem; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #dfe2e6; border-radius: 8px; padding: 1.1rem 1.25rem; margin-top: 1rem; }
.kicker { margin: 0; color: #57606a; }
.verdict { font-size: 1.15rem; margin: .5rem 0 0; }
.columns { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); column-gap: 1rem; align-items: stretch; }
.scroll { overflow-x: auto; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; }
figcaption, .note { color: #57606a; font-size: .875rem; margin: .5rem 0 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid #e6e8eb; vertical-align: top; }
thead th { color: #57606a; font-size: .875rem; font-weight: 600; }
tbody th { font-weight: 600; }
.metric { display: block; color: #57606a; font-weight: 400; font-size: .875rem; }
.number { text-align: right; }
th:last-child, td:last-child { padding-right: 0; }
td code, dd code { overflow-wrap: anywhere; }
code { font: .875em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
ul { list-style: none; margin: 0; padding: 0; }
li { padding: .35rem 0; }
.mark { display: inline-block; min-width: 4.2rem; text-align: center; border-radius: 4px; padding: 0 .4rem;
  margin-right: .6rem; font-weight: 700; font-size: .875rem; }
.pass { background: #d7f0e6; color: #00573f; }
.fail { background: #fbe0d0; color: #8a3500; }
.unknown { background: #e6e8eb; color: #4a5158; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .25rem 1rem; margin: 0; }
dt { color: #57606a; }
dd { margin: 0; overflow-wrap: anywhere; }
.finding { display: block; margin: .15rem 0 0; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 760px) {
  main { padding: 1rem .6rem 2rem; }
  section { padding: .9rem .8rem; }
  table { font-size: .9rem; }
  th, td { padding-right: .4rem; }
  thead th { font-size: .8rem; }
  .columns { grid-template-columns: minmax(0, 1fr); }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthCheck:
    """One sign that pretraining learned something; `passed` is None where the value is unknown."""

    name: str
    passed: bool | None
    finding: str


def health_checks(pretraining: Pretraining) -> list[HealthCheck]:
    """Whether loss and embeddings say that something was learned."""
    loss, limit, std = pretraining.loss, HEALTHY_LOSS * pretraining.chance_loss, pretraining.embedding_std
    return [
        HealthCheck(
            name="Loss well below chance",
            passed=None if math.isnan(loss - limit) else loss < limit,
            finding=f"last value {_number(loss)}; must be below {HEALTHY_LOSS} x ln(K+1) = {_number(limit)}",
        ),
        HealthCheck(
            name="Embeddings not collapsed",
            passed=None if math.isnan(std) else std > HEALTHY_STD,
            finding=f"last std x sqrt(C) {_number(std)}; must be above {HEALTHY_STD} (1 is isotropic)",
        ),
    ]


def render_report(data: ReportData) -> str:
    """The report as HTML."""
    found = data.comparison
    title = escape(found.pretraining.run)
    parts = [
        f'<header><p class="kicker">hemoco run</p><h1>{title}</h1><p class="verdict">{escape(_verdict(data))}</p>'
        "</header>",
        f'<div class="columns">{_results(data)}{_health(found.pretraining)}</div>',
        f'<div class="columns">{_bars(data)}{_loss(data)}{_std(data)}{_knn(data)}</div>',
        _images(data.images),
        _lineage(data),
        _settings(data.params),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{title} - hemoco</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _verdict(data: ReportData) -> str:
    known = (line for line in summaries(data.comparison) if not math.isnan(line.difference.mean))
    both = [line for line in known if line.baseline == "random"]
    if not both:
        return "No transfer has been measured from both the pretrained and a random backbone yet."
    better = sum(line.difference.mean > 0 for line in both)
    clear = sum(line.difference.mean > 0 and line.difference.stands_out is True for line in both)
    failed = len(data.comparison.failed)
    more = f" {failed} failed." if failed else ""
    if any(check.passed is False for check in health_checks(data.comparison.pretraining)):
        more += " But the pretraining is not healthy."
    noun = "transfer" if len(both) == 1 else "transfers"
    beyond = f", {clear} beyond the noise of seeds" if any(line.difference.pairs > 1 for line in both) else ""
    return f"Pretraining beats random initialisation in {better} of {len(both)} {noun}{beyond}.{more}"


def _results(data: ReportData) -> str:
    rows = [
        f'<tr><th scope="row">{escape(line.transfer)}<span class="metric">{escape(line.metric)}</span></th>'
        f"{''.join(_cell(name, text) for name, text in _cells_of(line))}</tr>"
        for line in summaries(data.comparison)
    ] + [
        f'<tr><th scope="row">{escape(item.transfer)}</th><td colspan="6"><span class="mark fail">FAILED</span>'
        f"{escape(item.reason)}</td></tr>"
        for item in data.comparison.failed
    ]
    heads = "".join(f'<th scope="col"{_alignment(name)}>{name}</th>' for name in COLUMNS[2:])
    table = f'<table><thead><tr><th scope="col">transfer</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    note = (
        '<p class="note">Means ± deviation over seeds; higher is better, 1 is perfect. Differences are paired by seed, '
        "± their 95% interval; beyond noise: the interval leaves out 0.</p>"
    )
    return _section("Results", f'<div class="scroll">{table}</div>{note}' if rows else "<p>No transfer yet.</p>")


def _cells_of(line: Summary) -> list[tuple[str, str]]:
    """Column and text of what stands right of the transfer's name."""
    return list(zip(COLUMNS, summary_cells(line), strict=True))[2:]


def _cell(name: str, text: str) -> str:
    return f"<td{_alignment(name)}>{escape(text)}</td>"


def _alignment(name: str) -> str:
    return "" if name in ("against", "beyond noise") else ' class="number"'


def _health(pretraining: Pretraining) -> str:
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
            f"<li>kNN top-1 accuracy of the last measurement: <strong>{_number(pretraining.knn_top1)}</strong></li>"
        )
    return _section("Health of the pretraining", f"<ul>{''.join(items)}</ul>")


def _bars(data: ReportData) -> str:
    if not data.comparison.rows:
        return ""
    words = "; ".join(
        f"{line.transfer} {line.metric}: pretrained {_number(line.pretrained.mean)}, {line.baseline or 'no baseline'} "
        f"{_number(line.other.mean)}"
        for line in summaries(data.comparison)
    )
    bars = transfer_bars(data.comparison)
    return _plot("Pretrained against baselines", bars, f"Bars. {words}", "Dots: single seeds.")


def _loss(data: ReportData) -> str:
    points = data.curves["loss"]
    if not points:
        return ""
    chance = data.comparison.pretraining.chance_loss
    limit = None if math.isnan(chance) else (chance, f"chance: ln(K+1) = {chance:.2f}")
    plot = line_plot(points, x_label="optimiser step", y_label="InfoNCE loss", limit=limit)
    alt = f"Line: the loss goes from {points[0][1]:.3f} to {points[-1][1]:.3f}; chance is {_number(chance)}"
    return _plot("Loss", plot, alt, "Constant embeddings give the chance loss of picking one of K+1 keys.")


def _std(data: ReportData) -> str:
    points = data.curves["embedding_std"]
    if not points:
        return ""
    limit = (HEALTHY_STD, f"healthy above {HEALTHY_STD}")
    plot = line_plot(points, x_label="optimiser step", y_label="std x sqrt(C)", limit=limit)
    alt = f"Line: embedding std times root C goes from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return _plot("Spread of the embeddings", plot, alt, "1: isotropic. 0: collapsed, all images embedded alike.")


def _knn(data: ReportData) -> str:
    points = data.curves["knn_top1"]
    if not points:
        return ""
    # the first measurement is at the end of this epoch
    first = min(int(data.params["pretrain.knn_every_epochs"]), int(data.params["pretrain.epochs"]))
    by_epoch = [(step * first / points[0][0], value) for step, value in points]
    plot = line_plot(by_epoch, x_label="epoch", y_label="kNN top-1 accuracy", limit=None)
    alt = f"Line: kNN accuracy goes from {points[0][1]:.3f} to {points[-1][1]:.3f}"
    return _plot(
        "kNN during pretraining", plot, alt, "Frozen features of the query encoder; pretraining itself sees no labels."
    )


def _images(images: tuple[TransferImage, ...]) -> str:
    figures = []
    for image in images:
        name = escape(f"{image.transfer}: {image.name.replace('_', ' ')}")
        picture = f'<img src="{_uri(image.png, "image/png")}" alt="{name}"/>'
        figures.append(f"<figure><h3>{name}</h3>{picture}</figure>")
    note = (
        '<p class="note">Detections: left the ground truth, right the highest-scored predictions, as many as there are '
        "objects.</p>"
    )
    return _section("Examples", f'{note}<div class="columns">{"".join(figures)}</div>') if images else ""


def _lineage(data: ReportData) -> str:
    facts = data.comparison.pretraining
    entries = [
        ("Recipe", facts.recipe),
        ("Data digest", facts.data_digest),
        ("Pretraining run", facts.run_id),
        ("Backbone", facts.backbone_url),
    ]
    entries += [
        (f"Run of {name}", run) for name, run in dict.fromkeys((r.transfer, r.run_id) for r in data.comparison.rows)
    ]
    items = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value or '-')}</code></dd>" for name, value in entries)
    return _section("Lineage", f"<dl>{items}</dl>")


def _settings(params: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(name)}</code></th><td><code>{escape(value)}</code></td></tr>'
        for name, value in sorted(params.items())
    )
    head = '<thead><tr><th scope="col">name</th><th scope="col">value</th></tr></thead>'
    table = f"<table>{head}<tbody>{rows}</tbody></table>"
    return _section("Settings", f"<details><summary>All {len(params)}</summary>{table}</details>") if params else ""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{title}</h2>{body}</section>"


def _plot(title: str, svg: bytes, alt: str, caption: str) -> str:
    image = f'<img src="{_uri(svg, "image/svg+xml")}" alt="{escape(alt)}"/>'
    return _section(title, f"<figure>{image}<figcaption>{caption}</figcaption></figure>")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
