"""Checks that the config classes make when they are built."""

from hemoco.errors import ConfigError


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
