"""32 settings of the linear probe at once, compared with two other ways of trying them.

    uv run python tests/benchmarks/probe.py --data DIR
        [--device cpu|cuda] [--rounds 5] [--images 10000] [--quick]

The other ways are 32 probes one after the other, and forward passes in every epoch.

Features are those of a random ResNet-18 with the small stem on CIFAR-10, with BN statistics taken
from the images; both kinds of probe have them in memory. Four fifths fit the classifiers in 100
epochs, a fifth chooses among 8 learning rates and 4 weight decays, and the test images show how
good the choice is. The separate probes do what the official code and lightly do with features:
`torch.nn.Linear`, `cross_entropy`, autograd and `torch.optim.SGD` with momentum, in batches of
256. They run without the meters and data loaders of those libraries, from the same start and in
the same order as ours.

The ways take turns, and figures are medians over the rounds of ratios within a round. On the CPU,
one thread is used and its CPU time is counted. Forward passes are timed once on some images; their
cost for all epochs is extrapolated from that.

Shapes: M images, F features.
"""

import argparse
import dataclasses
import math
from typing import NamedTuple

import torch
from big_sets import add_data_option
from knn import Images, calibrated_backbone, read_cifar
from machine import describe_machine, table
from step_case import seconds_per_call
from step_rounds import Goal, over_rounds, print_goals, take_turns
from torch import Tensor, nn
from torch.nn import functional

from hemoco.config import LinearProbeConfig
from hemoco.features.extract import extract_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.linear_probe import (
    Heads,
    Setting,
    evaluate_heads,
    new_heads,
    stratified_split,
    train_heads,
)

LRS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)
SETTINGS = [Setting(lr, decay) for lr in LRS for decay in DECAYS]
CLASSES, MOMENTUM, SEED = 10, 0.9, 0
GRID, SEPARATE = "32 at once (hemoco)", "32 one by one (torch)"


class Part(NamedTuple):
    """Labelled features."""

    features: Tensor
    """(M, F)."""
    labels: Tensor
    """(M,)."""


class Parts(NamedTuple):
    """Data that a probe is trained, chosen and tested on."""

    fit: Part
    held_out: Part
    test: Part


def train_at_once(parts: Parts, config: LinearProbeConfig) -> Heads:
    """hemoco's grid."""
    heads = new_heads(SETTINGS, CLASSES, parts.fit.features, SEED)
    for _ in train_heads(heads, *parts.fit, config, SEED):
        pass
    return heads


def train_one_by_one(parts: Parts, config: LinearProbeConfig) -> Heads:
    """A loop over the settings; the classifiers side by side, to be evaluated alike."""
    heads = new_heads(SETTINGS, CLASSES, parts.fit.features, SEED)
    for head, setting in enumerate(SETTINGS):
        linear = nn.Linear(parts.fit.features.shape[1], CLASSES).to(parts.fit.features.device)
        linear.load_state_dict({"weight": heads.weight[:, head], "bias": heads.bias[:, head]})
        _train_linear(linear, parts.fit, config, setting)
        heads.weight[:, head], heads.bias[:, head] = linear.weight.detach(), linear.bias.detach()
    return heads


def measure(
    parts: Parts, config: LinearProbeConfig, device: str, rounds: int, pass_seconds: float
) -> None:
    """Prints times, accuracies and goals."""
    ways = {GRID: train_at_once, SEPARATE: train_one_by_one}
    trained: dict[str, Heads] = {}

    def seconds(name: str) -> float:
        return seconds_per_call(
            lambda: trained.update({name: ways[name](parts, config)}), 1, device
        )

    for way in ways.values():
        way(parts, dataclasses.replace(config, epochs=1))  # what a first call loads
    found = take_turns(list(ways), rounds, seconds)
    top1 = {name: best_accuracies(heads, parts) for name, heads in trained.items()}
    rows = []
    for name in ways:
        time = over_rounds(found, lambda took, name=name: took[name])
        rows.append((name, time.median, time.spread(), *(f"{value:.2f}" for value in top1[name])))
    again = config.epochs * pass_seconds
    rows.append((f"forward passes, {config.epochs} epochs (extrapolated)", again, "", "", ""))
    title = (
        f"Linear probe: {len(parts.fit.labels):,} features of {parts.fit.features.shape[1]}, "
        f"{config.epochs} epochs"
    )
    print(table(title, ("way", "s", "range", "held out %", "test %"), rows), flush=True)
    apart = over_rounds([{}], lambda _: abs(top1[GRID].test - top1[SEPARATE].test))
    goals = [
        Goal(
            "separate probes / at once",
            over_rounds(found, lambda took: took[SEPARATE] / took[GRID]),
            6.0,
        ),
        Goal(
            "forward passes / at once, features cached",
            over_rounds(found, lambda took: again / took[GRID]),
            100.0,
        ),
        Goal("points of test accuracy between them", apart, 0.3, at_least=False),
    ]
    print_goals("Linear probe: goals", goals)
    with_one = over_rounds(found, lambda took: again / (took[GRID] + pass_seconds))
    print(
        f"with the one pass that fills the cache: {with_one.median:.0f} times as fast "
        "as forward passes in all epochs"
    )


class Best(NamedTuple):
    """Accuracies of the setting that is best on held-out features, in per cent."""

    held_out: float
    test: float


def best_accuracies(heads: Heads, parts: Parts) -> Best:
    """Chosen on the held-out fifth."""
    losses, held_out = evaluate_heads(heads, *parts.held_out)
    best = int(held_out.where(losses.isfinite(), -math.inf).argmax())
    return Best(
        100 * held_out[best].item(),
        100 * evaluate_heads(heads, *parts.test).accuracies[best].item(),
    )


def pass_over(backbone: Backbone, images: Tensor, count: int, device: str) -> float:
    """Seconds of one forward pass over so many images, from one over these."""
    extract_features(backbone, images[:32])
    return (
        seconds_per_call(lambda: extract_features(backbone, images), 1, device)
        * count
        / len(images)
    )


def read_parts(backbone: Backbone, train: Images, test: Images) -> Parts:
    """The features of CIFAR-10 on the backbone's device."""
    features, test_features = (extract_features(backbone, split.images) for split in (train, test))
    labels, test_labels = (split.labels.to(features.device) for split in (train, test))
    fit, held_out = stratified_split(labels, SEED)
    return Parts(
        *(Part(features[rows], labels[rows]) for rows in (fit, held_out)),
        Part(test_features, test_labels),
    )


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=10_000, help="of the training split, at most 10,000"
    )
    add_data_option(parser)
    parser.add_argument(
        "--quick", action="store_true", help="few images, to see that it runs; figures mean nothing"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one thread, CPU time"
    print(describe_machine(("torch", "timm"), f"{where}; {options.rounds} rounds"), flush=True)
    train = read_cifar(options.data, "train", 1, 200 if options.quick else options.images)
    test = read_cifar(options.data, "test", 1, 100 if options.quick else 2000)
    backbone = calibrated_backbone(train, "small").to(options.device)
    parts = read_parts(backbone, train, test)
    config = LinearProbeConfig(epochs=3 if options.quick else 100)
    pass_seconds = pass_over(backbone, test.images[:512], len(parts.fit.labels), options.device)
    measure(parts, config, options.device, options.rounds, pass_seconds)
    print(describe_machine(("torch",), "at the end"))


def _train_linear(
    linear: nn.Linear, fit: Part, config: LinearProbeConfig, setting: Setting
) -> None:
    optimizer = torch.optim.SGD(
        linear.parameters(),
        setting.lr,
        momentum=MOMENTUM,
        weight_decay=setting.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(config.epochs):
        order = torch.randperm(len(fit.labels), generator=generator).to(fit.labels.device)
        for rows in order.split(config.batch_size):
            loss = functional.cross_entropy(linear(fit.features[rows]), fit.labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()


if __name__ == "__main__":
    main()
