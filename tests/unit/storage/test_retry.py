"""Retries: which errors are retried, for how long, and which error is raised at the end."""

from dataclasses import replace

import pytest

from hemoco.errors import StorageError
from hemoco.storage.retry import STORAGE_RETRIES, RetryPolicy, patiently, retrying

QUICK = replace(STORAGE_RETRIES, first_wait_s=0.0)


class Flaky:
    """A function that raises the given errors, one per call, and then returns its calls so far."""

    def __init__(self, *errors: Exception) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def storage_error(cause: Exception | None) -> StorageError:
    error = StorageError("s3://bucket: no")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("faults", "longest"), [(1, 0.1), (2, 0.2), (5, 1.6), (8, 12.8), (9, 20.0), (5000, 20.0)]
)
def test_waits_grow_to_a_bound(faults, longest):
    assert STORAGE_RETRIES.wait_s(faults, 0.0) == 0.0
    assert STORAGE_RETRIES.wait_s(faults, 1.0) == pytest.approx(longest)


def test_transient_errors_are_tried_again_until_an_attempt_succeeds():
    call = Flaky(
        ConnectionError("reset"), TimeoutError("slow"), storage_error(ConnectionError("reset"))
    )
    assert retrying(QUICK)(call) == 4


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no"),
        PermissionError("no"),
        storage_error(None),
        storage_error(FileNotFoundError()),
        KeyError(),
    ],
)
def test_another_error_is_raised_at_once(error):
    call = Flaky(error)
    with pytest.raises(type(error)) as raised:
        retrying(QUICK)(call)
    assert raised.value is error and call.calls == 1


def test_an_interrupt_is_not_tried_again():
    policy = RetryPolicy(is_transient=lambda error: isinstance(error, Exception))
    with pytest.raises(KeyboardInterrupt):
        retrying(policy)(Flaky(KeyboardInterrupt()))


def test_the_error_at_the_end_is_that_of_the_last_attempt():
    call = Flaky(*(ConnectionError(str(number)) for number in range(9)))
    with pytest.raises(ConnectionError, match="2"):
        retrying(replace(QUICK, max_attempts=3))(call)
    assert call.calls == 3


def test_without_a_budget_there_is_one_attempt():
    call = Flaky(storage_error(ConnectionError("reset")))
    with pytest.raises(StorageError):
        patiently(call, 0.0)
    assert call.calls == 1


def test_progress_begins_the_waits_and_the_budget_anew():
    call = Flaky(*(ConnectionError(str(number)) for number in range(9)))
    attempts = retrying(replace(QUICK, max_attempts=3), progress=lambda: min(call.calls, 4))
    with pytest.raises(ConnectionError, match="5"):  # two attempts after the last progress
        attempts(call)
    assert call.calls == 6


def test_every_transient_error_is_handed_on():
    seen: list[BaseException] = []
    call = Flaky(ConnectionError("first"), TimeoutError("second"), PermissionError("at last"))
    with pytest.raises(PermissionError):
        retrying(QUICK, on_fault=seen.append)(call)
    assert [str(error) for error in seen] == ["first", "second"]
