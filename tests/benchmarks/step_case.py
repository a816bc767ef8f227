"""The cases that step.py times, their images, and the clock.

Shapes: N images, S x S a view.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Step = Callable[[], object]
"""One optimiser step, or whatever else is timed."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LR, MOMENTUM, WEIGHT_DECAY, TEMPERATURE, KEY_MOMENTUM, EMBEDDING_SIZE = (
    0.03,
    0.9,
    1e-4,
    0.2,
    0.999,
    128,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One size of problem, the same for everybody."""

    architecture: Literal["resnet18", "resnet50"]
    size: int
    """S, side of a view in pixels."""
    stem: Literal["imagenet", "small"]
    batch: int
    queue: int
    """K, number of queued negatives."""
    group: int
    """Images that share batch statistics in hemoco's split batch normalisation."""
    megabytes: float = 0.0
    """Memory traffic per image in eager bf16, counted from the tensors; 0: not counted."""

    @property
    def name(self) -> str:
        """For tables."""
        stem = ", small stem," if self.stem == "small" else ""
        return f"{self.architecture}{stem} at {self.size} pixels"


def cases(device: str, *, quick: bool) -> tuple[Case, ...]:
    """The two cases; on a GPU with batches that fill it."""
    gpu = device == "cuda"
    resnet50 = Case(
        architecture="resnet50",
        size=224,
        stem="imagenet",
        batch=256 if gpu else 16,
        queue=65536,
        group=32 if gpu else 8,
        megabytes=661.0,
    )
    resnet18 = Case(
        architecture="resnet18",
        size=32,
        stem="small",
        batch=512 if gpu else 256,
        queue=4096,
        group=32,
        megabytes=36.0,
    )
    if quick:
        resnet50 = dataclasses.replace(
            resnet50, size=64, batch=8, queue=256, group=4, megabytes=0.0
        )
        resnet18 = dataclasses.replace(resnet18, batch=16, queue=256, group=4)
    return resnet50, resnet18


def made_crops(case: Case, device: str) -> Tensor:
    """Noise as hemoco's loader gives images: uint8 (N, 2, 3, S, S), channels last in memory."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 2, case.size, case.size, 3)
    return (
        torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        .permute(0, 1, 4, 2, 3)
        .to(device)
    )


def made_views(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """The same as the usual loader gives it: two float32 (N, 3, S, S), normalised, contiguous."""
    mean, std = (torch.tensor(values)[:, None, None].to(device) for values in (MEAN, STD))
    queries, keys = made_crops(case, device).unbind(1)
    first, second = (((view / 255 - mean) / std).contiguous() for view in (queries, keys))
    return first, second


def precision(device: str, *, lower: bool) -> torch.autocast:
    """bf16 autocast, or none."""
    return torch.autocast(device, torch.bfloat16, enabled=lower)


def seconds_per_call(step: Step, times: int, device: str) -> float:
    """CPU time of this process on the CPU, the device's own time on a GPU."""
    if device == "cpu":
        begun = time.process_time()
        for _ in range(times):
            step()
        return (time.process_time() - begun) / times
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(times):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / times


def optimizer(parameters: Any) -> torch.optim.SGD:
    """SGD as the peers' scripts make it: torch's defaults."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
