"""Checks that the config classes make when they are built."""

import dataclasses
import typing
from typing import Any, Literal

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


def require_choices(config: Any, name: str = "") -> None:
    """Raises ConfigError unless every setting with a closed list of values, here and in the configs below, has one.

    A dataclass takes any value: without this, a misspelt word in a recipe file would be computed as something else.

    Args:
        config: a dataclass, or a dictionary of them.
        name: its dotted name.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            require_choices(value, f"{name}.{key}" if name else key)
    if not dataclasses.is_dataclass(config):
        return
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, full_name = (
            getattr(config, field.name),
            f"{name}.{field.name}" if name else field.name,
        )
        hint = hints[field.name]
        if typing.get_origin(hint) is Literal:
            allowed = typing.get_args(hint)
            require(
                value in allowed,
                f"{full_name} is {value!r}: it must be {' or '.join(map(str, allowed))}",
            )
        require_choices(value, full_name)
