"""Errors a user can act on. Every message says what was given, what is allowed and what to do."""


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


def require(holds: bool, message: str) -> None:
    """Raises ConfigError unless a condition on the settings holds."""
    if not holds:
        raise ConfigError(message)
