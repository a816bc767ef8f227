"""Every fault in docs/faults.md has tests that inject it and check the required outcome."""

import pytest

from tests.helpers.docs_tables import is_a_test, named_tests, read_tables

(FAULTS,) = read_tables("faults.md")


def test_every_fault_is_there() -> None:
    assert [row["#"] for row in FAULTS] == [str(number) for number in range(1, 37)]


@pytest.mark.parametrize("row", FAULTS, ids=[row["#"] for row in FAULTS])
def test_the_fault_has_its_tests(row: dict[str, str]) -> None:
    names = named_tests(row["tests"])
    assert names
    assert [name for name in names if not is_a_test(name)] == []
