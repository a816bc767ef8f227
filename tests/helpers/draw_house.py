"""Draws docs/architecture.svg from the imports: `uv run python -m tests.helpers.draw_house`.

The picture is a matrix with a row and a column for each package. A mark means that the row's
package imports the column's. Packages import downwards only, so all marks are above the diagonal.
"""

from tests.helpers.house import ORDER, ROOMS, ROOT, imports_of, package_of

PICTURE = ROOT / "docs" / "architecture.svg"
_CELL, _LEFT, _TOP = 26, 400, 120  # pixels
_FILL = {"jobs": "#e8c4a0", "pipeline": "#b7cfe8", "cluster": "#cfe3c0", "hemoco": "#e3d9ee"}
_MARK = {"jobs": "#b5651d", "pipeline": "#2f6ba8", "cluster": "#4f8a2f", "hemoco": "#6b4f9b"}
_TEXTS = {
    "jobs": "what a person types, and the recipes",
    "pipeline": "stages on Ray, and the graph that joins them",
    "cluster": "the machines: local stack, submit, preflight",
    "hemoco.report": "tables, files and report.html",
    "hemoco.results": "results read from MLflow and computed",
    "hemoco.transfer": "classification and detection",
    "hemoco.features": "frozen features, Parquet, neighbours",
    "hemoco.backbones": "the backbone file, inits, export, import",
    "hemoco.train": "the loop, state, optimiser, checkpoints",
    "hemoco.models": "MoCo: encoders, heads, losses",
    "hemoco.tracking": "the door to MLflow",
    "hemoco.data": "shards, the stream, sources",
    "hemoco.storage": "bytes by URL, retries, disk cache",
    "hemoco.config": "what one can set",
    "hemoco": "errors, names, intervals, distributed",
}


def arrows() -> set[tuple[str, str]]:
    """Returns pairs (importing package, imported package)."""
    pairs = set()
    for room in ROOMS:
        for found in imports_of(room):
            if found.file == "hemoco/__init__.py" or found.module.partition(".")[0] not in ROOMS:
                continue
            importer = _place(package_of(found.file.removesuffix(".py").replace("/", ".")))
            imported = _place(package_of(found.module))
            if importer != imported:
                pairs.add((importer, imported))
    return pairs


def draw() -> str:
    """Returns the picture as SVG."""
    packages = ["jobs", "pipeline", "cluster", *reversed(ORDER)]
    pairs = arrows()
    size = len(packages) * _CELL
    width, height = _LEFT + size + 150, _TOP + size + 20
    title = "Who imports whom: the package of the row imports that of the column"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="24" font-size="15">{title}</text>',
    ]
    for row, importer in enumerate(packages):
        y = _TOP + row * _CELL
        room = importer.partition(".")[0]
        name = importer if importer != "hemoco" else "hemoco/*.py"
        box = f'x="5" y="{y + 1}" width="{_LEFT - 10}" height="{_CELL - 2}"'
        lines.append(f'<rect {box} rx="4" fill="{_FILL[room]}"/>')
        lines.append(f'<text x="12" y="{y + 17}" font-size="12" font-weight="bold">{name}</text>')
        lines.append(f'<text x="150" y="{y + 17}" font-size="10">{_TEXTS[importer]}</text>')
        x = _LEFT + row * _CELL
        turned = f'transform="translate({x + 16} {_TOP - 8}) rotate(-50)"'
        lines.append(f'<text {turned} font-size="11">{name}</text>')
        for column, imported in enumerate(packages):
            x = _LEFT + column * _CELL
            colour = "white"
            if column == row:
                colour = "#888"
            elif column > row:
                colour = "#f6f6f6"
            box = f'x="{x + 1}" y="{y + 1}" width="{_CELL - 2}" height="{_CELL - 2}"'
            lines.append(f'<rect {box} fill="{colour}"/>')
            if (importer, imported) in pairs:
                lines.append(f'<circle cx="{x + 13}" cy="{y + 13}" r="6" fill="{_MARK[room]}"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _place(package: str) -> str:
    """Returns the row of a package: everything outside hemoco is one row for each room."""
    room = package.partition(".")[0]
    return package if room == "hemoco" else room


if __name__ == "__main__":
    PICTURE.write_text(draw())
