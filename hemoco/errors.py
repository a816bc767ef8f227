"""Errors a user can act on: each message gives what was given, what is allowed and what to do."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator


class HemocoError(Exception):
    """Base of all errors that `python -m jobs` reports in one line, with exit status 1."""


class ConfigError(HemocoError):
    """A setting is out of range or contradicts another; the message starts with its dotted name."""


class StorageError(HemocoError):
    """A URL cannot be read, written or listed; the message starts with the URL."""


class ShardError(HemocoError):
    """A shard, its index, or a sample in it is missing, damaged or of the wrong kind."""


class CheckpointError(HemocoError):
    """A checkpoint or backbone cannot be used; the message names it and the reason."""


class TrackingError(HemocoError):
    """The MLflow server or store cannot be used."""


class RefusedError(TrackingError):
    """MLflow refused a request and would refuse it again: a deleted run, a wrong password."""


class TrainingError(HemocoError):
    """Training cannot continue (non-finite loss, collapse, lost workers)."""


class LostLoaderError(HemocoError):
    """A loader process died without an error, most likely killed; another attempt may succeed."""


class UsageError(HemocoError):
    """The command itself is wrong: `python -m jobs` exits with status 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to 300 characters; its class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def last_line(error: BaseException) -> str:
    """The last line of an error's text, cut to 300 characters; its class name if it has none.

    Ray puts the traceback of another process before the message.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]


# Texts of torch's allocators. For most failed allocations torch raises a RuntimeError with one of
# these texts, and a MemoryError only for few.
_OUT_OF_MEMORY_TEXTS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
# torch's CPU allocator puts the C++ file and line before its message
_ENFORCE_PREFIX = re.compile(r"^\[enforce fail at [^]]*\] err == 0\. ")


@contextlib.contextmanager
def memory_errors(doing: Callable[[], str], advice: str) -> Iterator[None]:
    """Turns out-of-memory errors in the block into one line of advice, for host and GPU memory.

    A process that the kernel kills for its memory raises nothing: the process that waits for it
    must report that.

    Args:
        doing: returns what was being done, such as "step 7"; called after the failure only.
        advice: what to change so that less memory is needed.

    Raises:
        TrainingError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        text = str(error).lower()
        if not isinstance(error, MemoryError) and not any(
            known in text for known in _OUT_OF_MEMORY_TEXTS
        ):
            raise
        reason = _ENFORCE_PREFIX.sub("", first_line(error))
        advised = TrainingError(
            f"out of memory at {doing()}: {reason}; {_memory_in_use()}; {advice}"
        )
        # The traceback keeps the block's local variables alive, and with them the memory that the
        # caller needs for what it does next, such as looking for a checkpoint.
        traceback.clear_frames(error.__traceback__)
        raise advised from error


def _memory_in_use() -> str:
    """Memory that this process uses and memory free on the machine, for a message."""
    try:
        import psutil  # missing where only the models are installed

        own = psutil.Process().memory_info().rss
        free = psutil.virtual_memory().available
    except Exception as error:  # the advice matters more than this detail
        return f"the memory in use is unknown ({first_line(error)})"
    return f"this process holds {own / 1e9:.2f} GB, {free / 1e9:.2f} GB of the machine are free"
