"""Tables of the pages in docs/, which tests compare with the code so that no page is stale."""

import re

from tests.helpers.docs_pages import table_cells
from tests.helpers.house import ROOT


def read_tables(page: str) -> list[list[dict[str, str]]]:
    """Returns all tables of a page, as rows of cells by the name of their column."""
    tables: list[list[dict[str, str]]] = []
    names: list[str] = []
    for line in (ROOT / "docs" / page).read_text().splitlines():
        cells = table_cells(line)
        if not line.startswith("|"):
            names = []
        elif not names:
            names = cells
            tables.append([])
        elif set(line) - set("|-: "):
            tables[-1].append(dict(zip(names, cells, strict=True)))
    return tables


def named_tests(cell: str) -> list[str]:
    """Returns the tests that a cell names as `module.test`."""
    return re.findall(r"`(\w+\.test_\w+)`", cell)


def is_a_test(name: str) -> bool:
    """Returns whether there is a test `module.test`, in any folder of the tests."""
    module, test = name.split(".")
    pattern = re.compile(rf"^ *def {test}\(", re.MULTILINE)
    files = (ROOT / "tests").rglob(f"test_{module}.py")
    return any(pattern.search(path.read_text()) for path in files)
