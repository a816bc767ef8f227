"""Writes the output of `uv export` into pyproject.toml as `constraint-dependencies`."""

import re
import sys
from pathlib import Path

pins = [line.strip().replace('"', "'") for line in sys.stdin if "==" in line]
block = "constraint-dependencies = [\n" + "".join(f'    "{pin}",\n' for pin in pins) + "]\n"
path = Path("pyproject.toml")
path.write_text(
    re.sub(
        r"constraint-dependencies = \[\n.*?^\]\n",
        lambda _: block,  # a function, so that no escapes are read in the pins
        path.read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
)
