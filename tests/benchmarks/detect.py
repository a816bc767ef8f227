"""Cost of a step of Mask R-CNN beside torchvision's own, on one thread or one GPU.

    uv run python tests/benchmarks/detect.py [--device cpu|cuda] [--rounds 5] [--quick]

R50-FPN, 2 images of 320 pixels with 5 objects each, made beforehand and on the device. All ways
take turns, round by round; figures are medians over the rounds of ratios within a round, with their
range. On the CPU one thread and its CPU time count, on a GPU the device's time.

- ours: `take_step` with bfloat16 and channels_last, nothing frozen; and the same in float32.
- torchvision, frozen: maskrcnn_resnet50_fpn trained as its references/detection/train.py does by
  default, in float32. With ImageNet weights the model freezes batch normalisation, stem and layer1.
  No weights are fetched: its statistics are those of the images here, for with random weights and
  no statistics the activations overflow.
- torchvision, whole: the same model without weights, which freezes nothing.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from machine import describe_machine, table
from step_case import MEAN, STD, Step, seconds_per_call
from step_rounds import Goal, over_rounds, print_goals, take_turns
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from hemoco.config import EncoderConfig, MaskRcnnConfig
from hemoco.models.resnet import Backbone, build_encoder
from hemoco.transfer.detection.training import build_detection_state, take_step

OURS, FLOAT, FROZEN, WHOLE = (
    "ours: bf16, channels_last",
    "ours, float32",
    "torchvision, frozen",
    "torchvision, whole",
)
CLASSES, IMAGES, OBJECTS, SIDE = 91, 2, 5, 320
LR, WARMUP = 0.02 * IMAGES / 16, 1e-3  # of the reference: its first steps are at a thousandth
GOALS = {"cpu": 1.5, "cuda": 2.0}

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]


def made_batch(device: str, side: int) -> Batch:
    """Noise in which objects are rectangles of noise."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(IMAGES):
        corners = torch.rand(OBJECTS, 2, generator=generator) * side * 0.6
        boxes = torch.cat(
            [corners, corners + side * (0.1 + 0.3 * torch.rand(OBJECTS, 2, generator=generator))],
            dim=1,
        )
        masks = torch.zeros(OBJECTS, side, side, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
        labels = torch.randint(1, CLASSES, (OBJECTS,), generator=generator)
        images.append(torch.rand(3, side, side, generator=generator).to(device))
        target = {"boxes": boxes, "labels": labels, "masks": masks}
        targets.append({name: value.to(device) for name, value in target.items()})
    return images, targets


def our_step(device: str, batch: Batch, precision: str) -> Step:
    """hemoco's, in the first steps of the warm-up."""
    config = MaskRcnnConfig(global_batch_size=IMAGES, precision=precision, test_size=SIDE)  # type: ignore[arg-type]
    encoder = EncoderConfig(architecture="resnet50", zero_init_last=False)
    backbone = Backbone(build_encoder(encoder, 0), encoder, MEAN, STD)
    categories = [{"id": number, "name": str(number)} for number in range(1, CLASSES)]
    state = build_detection_state(
        config, backbone, categories, torch.device(device), seed=0, data_digest=""
    )
    return functools.partial(take_step, state, *batch)


def reference_step(
    device: str, batch: Batch, side: int, prepare: Callable[[nn.Module], object]
) -> Step:
    """torchvision's, as `train_one_epoch` of its references/detection/engine.py takes it."""
    model = (
        maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, min_size=side).to(device).train()
    )
    with torch.no_grad():
        for _ in range(3):
            model(*batch)
    prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR * WARMUP, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        losses = sum(loss for loss in model(*batch).values())
        losses.item()  # it ends where the loss is not finite
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

    return step


def freeze(model: nn.Module) -> None:
    """Freezes batch normalisation, and all but the last three stages.

    `maskrcnn_resnet50_fpn` freezes the same when it has weights.
    """
    for parent in list(model.backbone.body.modules()):  # type: ignore[union-attr]
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features)
                frozen.load_state_dict(child.state_dict())
                setattr(parent, name, frozen.to(child.weight.device))
    for name, parameter in model.backbone.body.named_parameters():  # type: ignore[union-attr]
        parameter.requires_grad_(name.startswith(("layer2", "layer3", "layer4")))


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="tiny, to see that it runs; the figures mean nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device, side = options.device, 64 if options.quick else SIDE
    where = torch.cuda.get_device_name() if device == "cuda" else "one thread, CPU time"
    print(
        describe_machine(("torch", "torchvision", "timm"), f"{where}; {options.rounds} rounds"),
        flush=True,
    )
    batch = made_batch(device, side)
    steps = {
        OURS: our_step(device, batch, "bfloat16"),
        FLOAT: our_step(device, batch, "float32"),
        FROZEN: reference_step(device, batch, side, freeze),
        WHOLE: reference_step(device, batch, side, lambda model: None),
    }
    calls = 20 if device == "cuda" else 1
    for step in steps.values():
        seconds_per_call(step, calls, device)
    rounds = take_turns(
        list(steps), options.rounds, lambda way: seconds_per_call(steps[way], calls, device)
    )
    rows = []
    for way in steps:
        times = over_rounds(rounds, lambda each, way=way: each[way] / IMAGES)
        gains = over_rounds(rounds, lambda each, way=way: each[way] / each[OURS])
        rows.append((way, times.median, times.spread(), gains.median, gains.spread()))
    print(table("A step of Mask R-CNN", ("", "s/image", "range", "x ours", "range"), rows))
    compared = {
        way: over_rounds(rounds, lambda each, way=way: each[way] / each[OURS])
        for way in (FROZEN, WHOLE)
    }
    print_goals(
        "Goals", [Goal(f"ours beside {way}", gain, GOALS[device]) for way, gain in compared.items()]
    )
    print(describe_machine(("torch",), "at the end"))


if __name__ == "__main__":
    main()
