"""What a training returns that stopped before its end; apart, for it is named where ray and torch are not needed."""

from typing import Literal, NamedTuple

Reason = Literal["stopped", "preempted", "grow"]


class Interrupted(NamedTuple):
    """A training that stopped before its end: begun again, it goes on from the checkpoint it has saved."""

    reason: Reason
    step: int
    """Optimiser steps done."""
