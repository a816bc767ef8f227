"""Checks that the config classes make when they are built."""

import dataclasses
import typing
from typing import Any, Literal

from hemoco.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not holds:
        raise ConfigError(message)


def require_positive(config: object, component: str, *names: str) -> None:
    """Raises ConfigError unless all the named settings of a component are above 0."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{component}.{name} is {value}: it must be positive")


def require_not_negative(config: object, component: str, *names: str) -> None:
    """Raises ConfigError unless all the named settings of a component are 0 or more."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{component}.{name} is {value}: it must not be negative")


def require_choices(config: Any, name: str = "") -> None:
    """Raises ConfigError unless each setting with a closed list of values has one of them.

    Checks nested configs too. A dataclass itself accepts any value: a misspelt word in a recipe
    file would silently select another branch.

    Args:
        config: a dataclass, or a dictionary of them.
        name: dotted name of `config` for the message; empty at the root.
    """
    prefix = f"{name}." if name else ""
    if isinstance(config, dict):
        for key, value in config.items():
            require_choices(value, f"{prefix}{key}")
    if not dataclasses.is_dataclass(config):
        return
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        full_name = f"{prefix}{field.name}"
        hint = hints[field.name]
        if typing.get_origin(hint) is Literal:
            allowed = typing.get_args(hint)
            require(
                value in allowed,
                f"{full_name} is {value!r}: it must be {' or '.join(map(str, allowed))}",
            )
        require_choices(value, full_name)
