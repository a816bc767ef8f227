"""Every trap in docs/traps.md has tests that detect it."""

import pytest

from tests.helpers.docs_tables import is_a_test, named_tests, read_tables

(TRAPS,) = read_tables("traps.md")


def test_every_trap_is_there() -> None:
    assert [row["#"] for row in TRAPS] == [str(number) for number in range(1, 39)]


@pytest.mark.parametrize("row", TRAPS, ids=[row["#"] for row in TRAPS])
def test_the_trap_has_its_tests(row: dict[str, str]) -> None:
    names = named_tests(row["tests"])
    assert names
    assert [name for name in names if not is_a_test(name)] == []
