"""Interruption of a training: by SIGTERM, by a stop request, or to restart with more processes.

Every process calls `TrainingProcess.interruption` after each step. All get the same answer, so they
stop at the same step, with a checkpoint of it.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch

from hemoco.config import ResourcesConfig
from hemoco.distributed import rank, sum_over_ranks, world_size
from pipeline.workers.capacity import fitting_workers
from pipeline.workers.tasks import Reason

_REASONS: tuple[Reason, ...] = ("stopped", "preempted", "grow")
_sigterm_received = threading.Event()  # global, since a signal is sent to the process as a whole


def note_sigterm() -> None:
    """Makes SIGTERM set a flag instead of ending this process; call it in the main thread."""
    _sigterm_received.clear()
    signal.signal(signal.SIGTERM, _on_sigterm)


@contextlib.contextmanager
def sigterm_noted() -> Iterator[None]:
    """Does the same as `note_sigterm`, until the block ends."""
    before = signal.getsignal(signal.SIGTERM)
    note_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _sigterm_received.clear()  # Ray reuses the process: the signal was not for its next task


class TrainingProcess:
    """One process of a training: its device, and whether the training is to stop.

    Args:
        device: device of its tensors.
        resources: resources of one process, and the requested number of processes.
        sizes: allowed numbers of processes.
    """

    def __init__(self, device: torch.device, resources: ResourcesConfig, sizes: list[int]) -> None:
        self.device = device
        self._resources, self._sizes = resources, sizes
        self._could_grow_before = False

    def interruption(self, *, at_checkpoint: bool, stop: bool = False) -> Reason | None:
        """Returns why all processes are to stop now, or None; a collective operation.

        Every rank must call it after the same steps. One rank's reason is enough.

        Args:
            at_checkpoint: whether a checkpoint is due; only then can the training grow.
            stop: whether this process knows of a request to stop for good.
        """
        grow = at_checkpoint and rank() == 0 and self._can_grow()
        flags = (stop, _sigterm_received.is_set(), grow)
        votes = sum_over_ranks(torch.tensor(flags, dtype=torch.float32, device=self.device))
        for reason, count in zip(_REASONS, votes.tolist(), strict=True):
            if count:
                return reason
        return None

    def _can_grow(self) -> bool:
        """Returns whether more processes fit now and did at the last checkpoint.

        A restart costs many steps, so resources that are free for a moment do not count.
        """
        if world_size() >= self._resources.workers:
            return False
        fitting = world_size() + fitting_workers(self._resources)
        can_grow = any(world_size() < size <= fitting for size in self._sizes)
        could_grow_before, self._could_grow_before = self._could_grow_before, can_grow
        return could_grow_before and can_grow


def _on_sigterm(signum: int, frame: FrameType | None) -> None:
    _sigterm_received.set()
