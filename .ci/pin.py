"""Reads `uv export` from standard input and writes it as `constraint-dependencies` into pyproject.toml."""

import re
import sys
from pathlib import Path

pins = [line.strip().replace('"', "'") for line in sys.stdin if "==" in line]
block = "constraint-dependencies = [\n" + "".join(f'    "{pin}",\n' for pin in pins) + "]\n"
path = Path("pyproject.toml")
path.write_text(
    re.sub(
        r"constraint-dependencies = \[\n.*?^\]\n",
        lambda _: block,
        path.read_text(),
        flags=re.S | re.M,
    )
)
