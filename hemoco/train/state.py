"""What every training has in common: the state that a checkpoint saves, and what one step tells."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from hemoco.errors import CheckpointError


@dataclasses.dataclass(kw_only=True)
class TrainingState:
    """All that the next step of a training depends on; a subclass adds its own and says its settings by `params`."""

    model: nn.Module
    forward: nn.Module
    """The model, or its DistributedDataParallel wrapper, which averages gradients over the ranks."""
    optimizer: torch.optim.Optimizer
    data_digest: str
    """Of the shard index trained on."""
    step: int = 0
    """Optimiser steps done."""

    @property
    def params(self) -> dict[str, str]:
        """Its settings, flat: a checkpoint of others is not taken over."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, as `torch.load(weights_only=True)` accepts them; tensors are not copied."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "data_digest": self.data_digest,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what `state_dict` gave.

        Raises:
            CheckpointError: it was trained on other shards.
        """
        if saved["data_digest"] != self.data_digest:
            raise CheckpointError(
                f"the training was begun on shards with digest {saved['data_digest']}, these have {self.data_digest}: "
                "give the old shards or start anew with --fresh"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]


class LoggedStep(NamedTuple):
    """One optimiser step of a transfer."""

    step: int
    """Optimiser steps done, this one included."""
    values: dict[str, float]
    """By name, equal on all ranks; empty between the steps that are logged."""
