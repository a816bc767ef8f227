"""Config classes of a search over pretraining settings; `hemoco.config` re-exports them."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hemoco.config.checks import require, require_positive
from hemoco.errors import ConfigError

ConfigT = TypeVar("ConfigT")
KNN = "knn_top1"
"""Metric that decides about early stops by default: the kNN accuracy measured while pretraining."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, each with the same probability."""

    values: tuple[Any, ...]
    """The values, all different."""

    def __post_init__(self) -> None:
        # compared by repr: values may be of types that cannot be hashed
        require(
            isinstance(self.values, tuple)
            and len(set(map(repr, self.values))) == len(self.values) > 0,
            f"Choice has {self.values!r}: give a tuple of different values, for example "
            "Choice((0.1, 0.2))",
        )


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number from a uniform distribution, rounded to four digits."""

    low: float
    """Lower bound."""
    high: float
    """Upper bound."""

    def __post_init__(self) -> None:
        require(
            -math.inf < self.low < self.high < math.inf,
            f"{self}: it must satisfy low < high, both finite; one value is a Choice",
        )


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A number whose logarithm is uniform, as for learning rates; rounded to four digits."""

    low: float
    """Lower bound, > 0."""
    high: float
    """Upper bound."""

    def __post_init__(self) -> None:
        require(
            0 < self.low < self.high < math.inf,
            f"{self}: it must satisfy 0 < low < high, both finite; one value is a Choice",
        )


Range = Choice | Uniform | LogUniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search: trials with different pretraining settings; bad ones are stopped early by ASHA.

    ASHA is from Li et al. 2020 (arXiv:1810.05934). After `grace_epochs` epochs, and again after
    this times `reduction`, times its square, ..., a trial continues if its watched value is among
    the best 1/`reduction` of all trials that have reached this epoch.
    """

    space: dict[str, Range]
    """Pretraining settings to vary, by their dotted names (`pretrain.optimizer.lr`).
    Each has a `Choice`, `Uniform` or `LogUniform`."""
    objective: str
    """Name of the transfer whose headline metric is maximised.
    The value is the mean over its seeds, from the pretrained backbone."""
    trials: int = 8
    """Number of trials; a sweep that is run again with more continues with the new ones."""
    seed: int = 0
    """Seed of the draws from the space."""
    max_concurrent: int = 2
    """Trials that run at the same time, at most.
    Each needs the resources of the recipe's pretraining."""
    watch: str = KNN
    """Metric that decides about early stops; empty: no trial is stopped.
    `knn_top1` is measured every `pretrain.knn_every_epochs` epochs.
    A transfer of the recipe's `curve` needs cores or GPUs that the trials leave free."""
    grace_epochs: int = 1
    """Epochs before which no trial is stopped."""
    reduction: int = 4
    """Inverse of the share of trials that continue after each check, at least 2.
    A higher value stops more of them."""

    def __post_init__(self) -> None:
        require(
            bool(self.space),
            "sweep.space is empty: name a setting, for example pretrain.optimizer.lr",
        )
        require_positive(self, "sweep", "trials", "max_concurrent", "grace_epochs")
        require(self.seed >= 0, f"sweep.seed is {self.seed}: it must not be negative")
        require(self.reduction >= 2, f"sweep.reduction is {self.reduction}: it must be at least 2")
        for name, values in self.space.items():
            require(
                isinstance(values, Range),
                f"sweep.space has {values!r} for {name}: it must be a Choice, Uniform or "
                "LogUniform",
            )
        choices = [
            len(values.values) for values in self.space.values() if isinstance(values, Choice)
        ]
        finite = len(choices) == len(self.space)
        points = math.prod(choices)
        require(
            not finite or self.trials <= points,
            f"sweep.trials is {self.trials}: the space has {points} points, and each is tried once",
        )


def with_settings(config: ConfigT, settings: Mapping[str, object]) -> ConfigT:
    """A copy of a config with other values, given by dotted names.

    All values are changed at once: changed one by one, they could contradict each other on the way.

    Raises:
        ConfigError: the values are not allowed, or contradict each other.
    """
    changes: dict[str, Any] = {}
    nested: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        field, _, rest = name.partition(".")
        if rest:
            nested.setdefault(field, {})[rest] = value
        else:
            changes[field] = value
    for field, inner in nested.items():
        changes[field] = with_settings(getattr(config, field), inner)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def check_space(space: Mapping[str, Range], config: object, allowed: set[str]) -> None:
    """Checks the names and the types of the values in a sweep's space.

    Whether values fit together is checked when a trial's config is built.

    Args:
        space: the sweep's choices by setting.
        config: the config whose settings vary.
        allowed: dotted names of the settings that may vary.

    Raises:
        ConfigError: a name is not allowed, or a value has another type than its setting; names the
            setting that was probably meant.
    """
    types = dict(_setting_types("", config))
    for name, values in space.items():
        if name not in allowed:
            raise ConfigError(f"sweep.space names {name!r}{_why_refused(name, allowed, types)}")
        expected = types[name]
        if isinstance(values, Choice):
            wrong = [value for value in values.values if not _has_type(value, expected)]
            require(
                not wrong,
                f"sweep.space has {wrong} for {name}: {_type_text(expected)} is allowed",
            )
        else:
            require(
                expected is float,
                f"sweep.space has {values} for {name}, which is {_type_text(expected)}: "
                "give a Choice",
            )


def _why_refused(name: str, allowed: set[str], known: Mapping[str, Any]) -> str:
    """The rest of a message about a setting that cannot vary, with what was probably meant."""
    if name in known:
        return (
            ": a sweep varies what changes the result of the pretraining, not how that is computed "
            "or measured"
        )
    group = sorted(other for other in allowed if other.startswith(f"{name}."))
    if group:
        return f", which is a group: name one of {', '.join(group)}"
    # a name without its prefix, else a misspelt one
    close = sorted(other for other in allowed if other.endswith(f".{name}"))
    if not close:
        close = difflib.get_close_matches(name, sorted(allowed), n=1)
    if not close:
        return f": the pretraining has {', '.join(sorted(allowed))}"
    return f": did you mean {' or '.join(close)}?"


def _setting_types(prefix: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Dotted names of all settings below a config, each with its type annotation."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _setting_types(f"{prefix}{name}.", value)
        else:
            yield prefix + name, hint


def _has_type(value: object, expected: Any) -> bool:
    """True if a value has an annotated type: Literal, tuple of fixed length, or plain type."""
    if get_origin(expected) is Literal:
        return value in get_args(expected)
    if get_origin(expected) is tuple:
        parts = get_args(expected)
        if not isinstance(value, tuple) or len(value) != len(parts):
            return False
        return all(_has_type(part, kind) for part, kind in zip(value, parts, strict=True))
    if expected is float:
        return type(value) in (int, float)
    return type(value) is expected  # not isinstance: a bool is no int here


def _type_text(expected: Any) -> str:
    if get_origin(expected) is Literal:
        return f"one of {', '.join(map(repr, get_args(expected)))}"
    if isinstance(expected, type) and not get_args(expected):
        return expected.__name__
    return str(expected)
