"""A search over settings of the pretraining: its config classes, re-exported by `hemoco.config`."""

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from hemoco.config.checks import require, require_positive

ConfigT = TypeVar("ConfigT")
KNN = "knn_top1"
"""What is watched unless a sweep names a transfer: the kNN accuracy that a pretraining measures on its way."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of some values, each as likely."""

    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        require(
            isinstance(self.values, tuple)
            and len(set(map(repr, self.values))) == len(self.values) > 0,
            f"Choice has {self.values!r}: give a tuple of different values, for example Choice((0.1, 0.2))",
        )


@dataclasses.dataclass(frozen=True)
class Uniform:
    """A number between two, each as likely; rounded to four digits."""

    low: float
    high: float

    def __post_init__(self) -> None:
        require(
            -math.inf < self.low < self.high < math.inf,
            f"{self}: it must satisfy low < high, both finite; one value is a Choice",
        )


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """A number between two whose logarithm is uniform, as suits learning rates; rounded to four digits."""

    low: float
    high: float

    def __post_init__(self) -> None:
        require(
            0 < self.low < self.high < math.inf,
            f"{self}: it must satisfy 0 < low < high, both finite; one value is a Choice",
        )


Range = Choice | Uniform | LogUniform


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search: trials that differ in settings of the pretraining, the bad ones stopped early by ASHA.

    ASHA: Li et al. 2020, arXiv:1810.05934. At `grace_epochs`, and at this times `reduction`, its square, ..., a trial
    goes on if its watched value is among the best 1/`reduction` of those that came there before it.
    """

    space: dict[str, Range]
    """Settings of the pretraining by the names one types (`pretrain.optimizer.lr`), each with what it may be."""
    objective: str
    """The transfer whose headline metric is to be high: mean over its seeds, from the pretrained backbone."""
    trials: int = 8
    """Pretrainings; the same sweep goes on when there are more of them."""
    seed: int = 0
    """Of what is drawn from the space."""
    max_concurrent: int = 2
    """Trials at the same time, at most; each takes the resources of the recipe's pretraining."""
    watch: str = KNN
    """What decides about an early stop: `knn_top1`, measured every `pretrain.knn_every_epochs`, or a transfer of the
    recipe's `curve`, which needs cores or GPUs that no trial wants; empty: no trial is stopped."""
    grace_epochs: int = 1
    """Epochs before which no trial is stopped."""
    reduction: int = 4
    """The higher, the fewer go on."""

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
                f"sweep.space has {values!r} for {name}: it must be a Choice, Uniform or LogUniform",
            )
        choices = [
            len(values.values) for values in self.space.values() if isinstance(values, Choice)
        ]
        require(
            len(choices) < len(self.space) or self.trials <= math.prod(choices),
            f"sweep.trials is {self.trials}: the space has {math.prod(choices)} points, and each is tried once",
        )


def with_settings(config: ConfigT, settings: Mapping[str, object]) -> ConfigT:
    """The config with other values, by dotted names; all are changed at once, as they are checked together.

    Raises:
        ConfigError: the values do not make a config.
    """
    parts: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        parts.setdefault(head, {})[rest] = value
    changed = {
        name: below[""] if "" in below else with_settings(getattr(config, name), below)
        for name, below in parts.items()
    }
    return dataclasses.replace(config, **changed)  # type: ignore[type-var]


def check_space(space: Mapping[str, Range], config: object, allowed: set[str]) -> None:
    """Refuses names that are no settings and values of another kind; whether values fit together, a trial finds out.

    Args:
        space: of a sweep.
        config: what the names are settings of.
        allowed: the names that may vary.

    Raises:
        ConfigError: naming the setting, and the one that was probably meant.
    """
    kinds = dict(_kinds("", config))
    for name, values in space.items():
        if name not in allowed:
            require(False, f"sweep.space names {name!r}{_objection(name, allowed, kinds)}")
        kind = kinds[name]
        if isinstance(values, Choice):
            wrong = [value for value in values.values if not _is_of(kind, value)]
            require(not wrong, f"sweep.space has {wrong} for {name}: {_shown(kind)} is allowed")
        else:
            require(
                kind is float,
                f"sweep.space has {values} for {name}, which is {_shown(kind)}: give a Choice",
            )


def _objection(name: str, allowed: set[str], known: Mapping[str, Any]) -> str:
    """Why a setting cannot vary, and what may have been meant."""
    if name in known:
        return ": a sweep varies what changes the result of the pretraining, not how that is computed or measured"
    group = sorted(other for other in allowed if other.startswith(f"{name}."))
    if group:
        return f", which is a group: name one of {', '.join(group)}"
    ending = sorted(other for other in allowed if other.endswith(f".{name}"))
    close = ending or difflib.get_close_matches(name, sorted(allowed), n=1)
    return (
        f": did you mean {' or '.join(close)}?"
        if close
        else f": the pretraining has {', '.join(sorted(allowed))}"
    )


def _kinds(prefix: str, config: Any) -> Iterator[tuple[str, Any]]:
    """Every setting below a config, with its annotation."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from _kinds(f"{prefix}{name}.", value)
        else:
            yield prefix + name, kind


def _is_of(kind: Any, value: object) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        return (
            isinstance(value, tuple) and len(value) == len(kinds) and all(map(_is_of, kinds, value))
        )
    return type(value) in ((int, float) if kind is float else (kind,))


def _shown(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
