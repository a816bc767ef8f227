"""hemoco's own step for step.py, and the rates that limit it.

The step is the whole of `train_steps`, on crops made beforehand.
"""

import functools
import itertools

import torch
from step_case import EMBEDDING_SIZE, KEY_MOMENTUM, LR, TEMPERATURE, Case, Step, made_crops
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hemoco.config import (
    EncoderConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    StreamConfig,
    ViewsConfig,
)
from hemoco.data.stream.batches import Batch
from hemoco.data.stream.loader import StreamPosition
from hemoco.models.batch_norm import SplitBatchNorm
from hemoco.train.pretrain import TrainState, build_state, train_steps

OURS, SPLIT, FLOAT, LOGGED, COMPILED, TUNED = (
    "ours: bf16, channels_last",
    "ours, BN in groups",
    "ours, float32",
    "ours, every step logged",
    "ours, compiled",
    "ours, cudnn.benchmark",
)
MATMUL, CONVOLUTION, COPY = "bf16 matmul", "bf16 convolution", "copy"
NEVER = 10**6
_CHANNELS, _SIDE = 256, 28


def config(case: Case, **changes: object) -> PretrainConfig:
    """Settings of a case without augmentation.

    The views only convert to normalised floats, which no peer's step does.
    """
    settings = {
        "epochs": NEVER,
        "global_batch_size": case.batch,
        "precision": "bfloat16",
        "log_every_steps": NEVER,
        "views": ViewsConfig(size=case.size, flip=0.0, jitter=0.0, grayscale=0.0, blur=(0.0, 0.0)),
        "encoder": EncoderConfig(architecture=case.architecture, stem=case.stem),
        "moco": MoCoConfig(
            embedding_size=EMBEDDING_SIZE,
            queue_length=case.queue,
            momentum=KEY_MOMENTUM,
            temperature=TEMPERATURE,
            bn_group_size=case.group,
        ),
        "optimizer": OptimizerConfig(lr=LR),
        "stream": StreamConfig(lanes=1),
    }
    return PretrainConfig(**(settings | changes))  # type: ignore[arg-type]


def stepper(state: TrainState, crops: Tensor) -> Step:
    """Takes the next step of a training on these images."""
    batch = Batch(crops, [str(row) for row in range(len(crops))], StreamPosition(0, 0))
    return functools.partial(
        next, train_steps(state, itertools.repeat(batch), steps_per_epoch=NEVER)
    )


def one_group(state: TrainState) -> TrainState:
    """All images of a step share batch statistics.

    It is so in the peers' step, and on a worker that has one group.
    """
    for module in state.model.modules():
        if isinstance(module, SplitBatchNorm):
            module.group_size = state.config.global_batch_size
    return state


def variants(case: Case, device: str) -> dict[str, Step]:
    """hemoco's steps by name, and the machine's rates."""
    crops = made_crops(case, device)
    configs = {
        OURS: config(case),
        SPLIT: config(case),
        FLOAT: config(case, precision="float32"),
        LOGGED: config(case, log_every_steps=1),
    }
    if device == "cuda":
        configs |= {COMPILED: config(case, compile=True), TUNED: config(case)}
    steps: dict[str, Step] = {}
    for name, each in configs.items():
        state = build_state(each, torch.device(device), data_digest="")
        steps[name] = stepper(state if name == SPLIT else one_group(state), crops)
    if device == "cuda":
        steps[TUNED] = functools.partial(_tuned, steps[TUNED])
    left, right = (
        torch.randn(matmul_size(device), matmul_size(device), device=device).bfloat16()
        for _ in range(2)
    )
    steps[MATMUL] = lambda: left @ right
    steps[CONVOLUTION] = _convolution(device)
    source = torch.zeros(copied_bytes(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    steps[COPY] = lambda: target.copy_(source)
    return steps


def count_flops(step: Step) -> int:
    """Floating-point operations of the convolutions and matrix products of one step."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def convolution_flops(device: str) -> int:
    """FLOPs of one call of the limit: forward, and backward for weights and images."""
    return 3 * 2 * 9 * _CHANNELS**2 * _SIDE**2 * _convolved(device)


def matmul_size(device: str) -> int:
    """Rows and columns of the matrices of the limit."""
    return 8192 if device == "cuda" else 2048


def copied_bytes(device: str) -> int:
    """Larger than the caches."""
    return 1 << (32 if device == "cuda" else 28)


def _convolved(device: str) -> int:
    return 256 if device == "cuda" else 16


def _convolution(device: str) -> Step:
    """A 3x3 convolution of a ResNet's middle, forward and backward, in bf16 and channels_last."""
    shape = (_convolved(device), _CHANNELS, _SIDE, _SIDE)
    images = (
        torch.randn(shape, device=device).bfloat16().contiguous(memory_format=torch.channels_last)
    )
    layer = torch.nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1, bias=False).to(device).bfloat16()
    layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images.requires_grad_()
    slope = torch.ones_like(images)

    def step() -> None:
        images.grad = layer.weight.grad = None
        layer(images).backward(slope)

    return step


def _tuned(step: Step) -> None:
    torch.backends.cudnn.benchmark = True
    try:
        step()
    finally:
        torch.backends.cudnn.benchmark = False
