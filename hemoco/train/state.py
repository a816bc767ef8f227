"""Parts common to pretraining and trained transfers: the state in a checkpoint, a step's result."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import nn

from hemoco.errors import CheckpointError


@dataclasses.dataclass(kw_only=True)
class TrainingState:
    """All that the next step of a training run depends on; what a checkpoint saves.

    A subclass for each kind of training adds fields and implements `params`.
    """

    model: nn.Module
    forward: nn.Module
    """The module to call: the model, or its DistributedDataParallel wrapper, which averages
    gradients over the ranks."""
    optimizer: torch.optim.Optimizer
    data_digest: str
    """Digest of the shard index that is trained on."""
    step: int = 0
    """Optimiser steps done."""

    @property
    def params(self) -> dict[str, str]:
        """Settings as flat dotted names; a checkpoint with other settings is refused."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, which `torch.load(weights_only=True)` accepts.

        Tensors are not copied.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "data_digest": self.data_digest,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            CheckpointError: the saved training was on other shards; nothing is changed.
        """
        if saved["data_digest"] != self.data_digest:
            raise CheckpointError(
                f"the training was begun on shards with digest {saved['data_digest']}, these have "
                f"{self.data_digest}: give the old shards or start anew with --fresh"
            )
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step = saved["step"]


class LoggedStep(NamedTuple):
    """Result of one optimiser step of a transfer."""

    step: int
    """Optimiser steps done, this one included."""
    values: dict[str, float]
    """Metrics by name, equal on all ranks; empty at steps that are not logged."""
