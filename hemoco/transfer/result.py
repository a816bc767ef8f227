"""What comes out of a transfer."""

import dataclasses


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
