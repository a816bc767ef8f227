"""The result of a transfer."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferResult:
    """Measurements of one transfer of one backbone with one seed."""

    metric: str
    """Name of the headline metric."""
    value: float
    """Its value in [0, 1], higher is better; also in `metrics`."""
    metrics: dict[str, float]
    """All final metrics, by name."""
    history: list[tuple[int, dict[str, float]]] = dataclasses.field(default_factory=list)
    """Values by step or epoch; empty for transfers that do not train in steps."""
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """PNG files by name."""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    """Other files by name, for example predictions."""
