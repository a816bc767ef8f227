"""What makes a training stop before its end: its process is told to go away, or there is room for more processes.

Every process asks after each step and gets the same answer, so that all stop at the same one, with a checkpoint of it.
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
_told = threading.Event()  # a signal belongs to the process, not to any part of it


def note_sigterm() -> None:
    """From now on SIGTERM asks this process to stop in order; to be called in its main thread."""
    _told.clear()
    signal.signal(signal.SIGTERM, _tell)


@contextlib.contextmanager
def sigterm_noted() -> Iterator[None]:
    """As `note_sigterm`, until the block ends."""
    before = signal.getsignal(signal.SIGTERM)
    note_sigterm()
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        _told.clear()  # the next task of this process has not been told


class TrainingProcess:
    """One process of a training: where it computes, and whether all are to stop.

    Args:
        device: of its tensors.
        resources: what one process needs, and how many are wished for.
        sizes: numbers of processes the training may have.
    """

    def __init__(self, device: torch.device, resources: ResourcesConfig, sizes: list[int]) -> None:
        self.device = device
        self._resources, self._sizes = resources, sizes
        self._had_room = False

    def interruption(self, *, at_checkpoint: bool, stop: bool = False) -> Reason | None:
        """Why all processes are to stop now, the same on each of them; every one must ask, after the same steps.

        Args:
            at_checkpoint: whether a checkpoint is due anyway; growing waits for one.
            stop: whether this process knows that the training is to end for good.
        """
        mine = (stop, _told.is_set(), at_checkpoint and rank() == 0 and self._has_room())
        found = sum_over_ranks(torch.tensor(mine, dtype=torch.float32, device=self.device)).tolist()
        return next((reason for reason, votes in zip(_REASONS, found, strict=True) if votes), None)

    def _has_room(self) -> bool:
        """Whether more processes fit, now and at the checkpoint before: a new start costs many steps."""
        if world_size() >= self._resources.workers:
            return False
        fitting = world_size() + fitting_workers(self._resources)
        has_room = any(world_size() < size <= fitting for size in self._sizes)
        had_room, self._had_room = self._had_room, has_room
        return had_room and has_room


def _tell(signum: int, frame: FrameType | None) -> None:
    _told.set()
