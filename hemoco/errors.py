"""Errors a user can act on. Every message says what was given, what is allowed and what to do."""

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator


class HemocoError(Exception):
    """Base of all errors that `python -m jobs` reports in one line, with exit status 1."""


class ConfigError(HemocoError):
    """A setting is out of its range or contradicts another; begins with the setting's dotted name."""


class StorageError(HemocoError):
    """A URL cannot be read, written or listed; begins with the URL."""


class ShardError(HemocoError):
    """A shard, its index, or a sample in it is missing, damaged or of the wrong kind."""


class CheckpointError(HemocoError):
    """A checkpoint or backbone cannot be used; says which and why."""


class TrackingError(HemocoError):
    """The MLflow server or store cannot be used."""


class TrainingError(HemocoError):
    """Training cannot go on (non-finite loss, collapse, lost workers)."""


class UsageError(HemocoError):
    """The command itself is wrong: `python -m jobs` exits with status 2."""


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


class RefusedError(TrackingError):
    """MLflow answered, and would answer the same again: the run was deleted, the password is wrong."""


_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
"""Of torch's allocators; torch and NumPy raise a MemoryError only now and then."""
_PREFIX = re.compile(r"^\[enforce fail at [^]]*\] err == 0\. ")


class LostLoaderError(HemocoError):
    """A loader process ended without a word, killed most likely: another attempt may go well."""


@contextlib.contextmanager
def memory_errors(doing: Callable[[], str], advice: str) -> Iterator[None]:
    """Names what was being done where an allocation in the block fails, on the host or on a GPU.

    What the kernel kills for its memory says nothing; who waits for such a process has to.

    Args:
        doing: asked after the failure, as "step 7".
        advice: what needs less memory.

    Raises:
        TrainingError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        said = _out_of_memory(doing(), error, advice)
        # what the block held is free again, for whoever looks for a checkpoint now
        traceback.clear_frames(error.__traceback__)
        raise said from error


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    return isinstance(error, MemoryError) or any(
        saying in str(error).lower() for saying in _SAYINGS
    )


def _out_of_memory(doing: str, error: BaseException, advice: str) -> TrainingError:
    reason = _PREFIX.sub("", first_line(error))
    return TrainingError(f"out of memory at {doing}: {reason}; {_held()}; {advice}")


def _held() -> str:
    """Memory in use by this process and free on the machine."""
    try:
        import psutil  # missing where only the models are installed

        own, free = psutil.Process().memory_info().rss, psutil.virtual_memory().available
    except Exception as error:  # the advice must not be lost because of this detail
        return f"the memory in use is unknown ({first_line(error)})"
    return f"this process holds {own / 1e9:.2f} GB, {free / 1e9:.2f} GB of the machine are free"
