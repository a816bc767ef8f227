"""Text that a benchmark prints around its figures: the machine, the versions, tables."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path


def describe_machine(packages: Sequence[str], runs: str) -> str:
    """Cores, load average, versions and number of runs: without them a figure means nothing."""
    models = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    model = models[0].partition(":")[2].strip() if models else platform.machine()
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}  "
        f"{os.cpu_count()} cores ({model})  load average {load}\n"
        f"Python {platform.python_version()}, {versions}\n{runs}"
    )


def table(title: str, names: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under their names; text to the left, numbers to the right.

    Numbers have the digits that suit their size.
    """
    columns = []
    for number, name in enumerate(names):
        values = [row[number] for row in rows]
        cells = [name, *map(_cell, values)]
        width = max(map(len, cells))
        is_text = all(isinstance(value, str) for value in values)
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    return "\n".join([f"\n{title}", *lines])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return (
            f"{value:,.0f}"
            if abs(value) >= 100
            else f"{value:.1f}"
            if abs(value) >= 10
            else f"{value:.2f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)
