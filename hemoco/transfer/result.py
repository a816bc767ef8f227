"""What goes into a transfer and what comes out of it.

Shapes: M images, S x S pixels each.
"""

import dataclasses
from typing import NamedTuple

from torch import Tensor


class LabelledImages(NamedTuple):
    """A labelled split in memory."""

    images: Tensor
    """uint8 RGB (M, 3, S, S)."""
    labels: Tensor
    """int64 (M,), classes counted from 0."""
    classes: tuple[str, ...] = ()
    """Names of the classes, by label; empty where they are not known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferResult:
    """What one transfer of one backbone and seed measured."""

    metric: str
    """Name of the headline metric."""
    value: float
    """Its value in [0, 1], higher is better; also in `metrics`."""
    metrics: dict[str, float]
    """Everything measured at the end, by name."""
    history: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    """Values by step or epoch; empty where nothing is trained stepwise."""
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """PNG files by name."""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Further files by name, for example predictions."""
