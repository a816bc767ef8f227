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


def require_positive(config: object, component: str, *names: str) -> None:
    """Raises ConfigError unless these settings of a component are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{component}.{name} is {value}: it must be positive")


def require_not_negative(config: object, component: str, *names: str) -> None:
    """Raises ConfigError unless these settings of a component are 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{component}.{name} is {value}: it must not be negative")
