"""Effects of depth on training, in two experiments.

They are training without shortcuts (He et al. 2016) and by initialisation (He et al. 2015):

    uv run python tests/benchmarks/depth.py degradation --data DIR
    uv run python tests/benchmarks/depth.py initialisation --data DIR --minutes 5
        --picture initialisation.png

Both train classifiers on every second image of CIFAR-10's first training shard (5,000, 500 of each
class), averaged to 16x16 pixels and not augmented, by SGD with momentum 0.9, weight decay 1e-4 and
a cosine to 0. Errors and losses are those on the training batches: the question is whether a
network can be trained, not whether it generalises.

`degradation` takes timm's ResNets of 18 and 34 layers with the small stem at a quarter of their
width (16 to 128 channels), Kaiming fan-out, and their plain counterparts; 12 epochs in batches of
128, each network at the better of two learning rates. `initialisation` takes 30 convolutions with
ReLU and no BN, padded circularly, as zeros would take variance at the border; 6 epochs in batches
of 32. Seeds follow each other until the minutes are spent.

Shapes: R seeds, E epochs, L layers.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from big_sets import add_data_option, cifar10_archives
from depth_networks import (
    BLOCKS,
    PLAIN_LAYERS,
    Images,
    Schedule,
    Signals,
    Trained,
    measure_signals,
    narrow_resnet,
    plain_stack,
    read_images,
    train,
)
from machine import describe_machine, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from hemoco.config import EncoderConfig

RATES = (0.1, 0.02)
RESNETS = {f"{kind}-{depth}": (kind, depth) for kind in ("plain", "residual") for depth in BLOCKS}
RESNET_EPOCHS = 12
INITS = {
    "Kaiming, fan-in": EncoderConfig(fan_mode="fan_in"),
    "Kaiming, fan-out": EncoderConfig(fan_mode="fan_out"),
    "Xavier": EncoderConfig(init="xavier"),
}
STACK_SCHEDULE = Schedule(epochs=6, batch=32, rate=0.003)
NOTABLE = 1.0
"""Points of error by which the deeper network is called worse."""
LEARNT = 0.05
"""The loss of a network that trains is at least so much below ln 10, which is that of a guess."""
STYLES = [
    {"color": colour, "linestyle": dash}
    for colour, dash in (("#0072B2", "-"), ("#E69F00", "--"), ("#D55E00", "-."), ("#009E73", ":"))
]
"""Colours of Okabe and Ito, for colour-blind readers; dashes for those who print in grey."""

Round = TypeVar("Round")


def degradation(images: Images, minutes: float, picture: Path) -> None:
    """Plain and residual networks of two depths."""
    print(
        "expected (He et al. 2016, figures 1 and 4): "
        "the deeper plain network trains worse, the residual one does not"
    )

    def one_round(seed: int) -> dict[tuple[str, float], Trained]:
        found = {}
        for name, (kind, depth) in RESNETS.items():
            for rate in RATES:
                network = narrow_resnet(depth, seed, shortcuts=kind == "residual")
                found[name, rate] = train(network, images, Schedule(RESNET_EPOCHS, 128, rate), seed)
        return found

    rounds = _rounds(one_round, minutes)
    errors = {
        key: 100
        * torch.stack([_means(found[key].errors, RESNET_EPOCHS) for found in rounds])  # (R, E)
        for key in rounds[0]
    }
    _print_degradation(errors)
    figure, (axes,) = _canvas(1)
    for name, style in zip(RESNETS, STYLES, strict=True):
        axes.plot(
            range(1, RESNET_EPOCHS + 1),
            errors[name, _better_rate(errors, name)].mean(0),
            label=name,
            **style,
        )
    axes.set(xlabel="epoch", ylabel="training error (%)", ylim=(0, 100))
    _save(figure, picture)


def initialisation(images: Images, minutes: float, picture: Path) -> None:
    """A deep plain network without BN from three initialisations."""
    print(
        "expected (He et al. 2015, figure 3): "
        "both Kaiming modes train; Xavier's signals vanish, it stalls at ln 10"
    )

    def one_round(seed: int) -> dict[str, tuple[Signals, Trained]]:
        found = {}
        for name, config in INITS.items():
            stack = plain_stack(config, seed)
            found[name] = (
                measure_signals(stack, images),
                train(stack, images, STACK_SCHEDULE, seed),
            )
        return found

    rounds, epochs = _rounds(one_round, minutes), STACK_SCHEDULE.epochs
    losses = {
        name: torch.stack([_means(found[name][1].losses, epochs) for found in rounds])
        for name in INITS
    }  # (R, E)
    activations = {
        name: _over_seeds([found[name][0].activations for found in rounds]) for name in INITS
    }
    gradients = {
        name: _over_seeds([found[name][0].gradients for found in rounds]) for name in INITS
    }
    _print_initialisation(losses, activations, gradients)
    figure, (left, middle, right) = _canvas(3)
    for name, style in zip(INITS, STYLES, strict=False):
        left.plot(range(1, epochs + 1), losses[name].mean(0), label=name, **style)
        middle.semilogy(range(1, PLAIN_LAYERS + 1), activations[name], **style)
        right.semilogy(range(1, PLAIN_LAYERS + 1), gradients[name], **style)
    left.set(xlabel="epoch", ylabel="training loss")
    middle.set(xlabel="layer", ylabel="activation before training (RMS)")
    right.set(xlabel="layer", ylabel="gradient before training (RMS)")
    _save(figure, picture)


def main() -> None:
    """Runs one experiment and writes its picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=("degradation", "initialisation"))
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="more seeds until they are spent; one is always run",
    )
    parser.add_argument(
        "--picture", type=Path, help="PNG to write; default: the experiment's name in this folder"
    )
    add_data_option(parser)
    options = parser.parse_args()
    experiment = degradation if options.experiment == "degradation" else initialisation
    print(describe_machine(("torch", "timm"), f"torch threads: {torch.get_num_threads()}"))
    images = read_images(cifar10_archives(options.data, "train")[0])
    experiment(images, options.minutes, options.picture or Path(f"{options.experiment}.png"))


def _rounds(one_round: Callable[[int], Round], minutes: float) -> list[Round]:
    """One for each seed from 0, as long as another is likely to end in time."""
    began, found = time.monotonic(), [one_round(0)]
    while (time.monotonic() - began) * (len(found) + 1) / len(found) < 60 * minutes:
        found.append(one_round(len(found)))
    return found


def _print_degradation(errors: dict[tuple[str, float], Tensor]) -> None:
    rows, last = [], {}
    for name in RESNETS:
        better = _better_rate(errors, name)
        last[name] = errors[name, better][:, -1]  # (R,)
        rows.append(
            (
                name,
                *(float(errors[name, rate][:, -1].mean()) for rate in RATES),
                better,
                _range(last[name]),
            )
        )
    seeds = len(last["plain-18"])
    title = f"training error (%) over the last of {RESNET_EPOCHS} epochs, seeds: {seeds}"
    print(
        table(
            title, ("network", *(f"lr {rate:g}" for rate in RATES), "better lr", "its range"), rows
        )
    )
    for kind in ("plain", "residual"):
        cost = float((last[f"{kind}-34"] - last[f"{kind}-18"]).mean())
        verdict = "as expected" if (cost > NOTABLE) == (kind == "plain") else "not as expected"
        print(
            f"found: with 34 {kind} layers the error is {cost:+.1f} points "
            f"from that with 18: {verdict}"
        )


def _print_initialisation(
    losses: dict[str, Tensor],
    activations: dict[str, NDArray[np.float64]],
    gradients: dict[str, NDArray[np.float64]],
) -> None:
    rows = []
    for name, curves in losses.items():
        ratios = (
            activations[name][-1] / activations[name][0],
            gradients[name][0] / gradients[name][-1],
        )
        rows.append(
            (
                name,
                *(f"{ratio:.1e}" for ratio in ratios),
                float(curves[:, -1].mean()),
                _range(curves[:, -1]),
            )
        )
    seeds = len(losses["Xavier"])
    title = f"{PLAIN_LAYERS} layers, {STACK_SCHEDULE.epochs} epochs, seeds: {seeds}"
    names = (
        "weights",
        "activation, last / first",
        "gradient, first / last",
        "last loss",
        "its range",
    )
    print(table(title, names, rows))
    for name, curves in losses.items():
        trained = int((curves[:, -1] < math.log(10) - LEARNT).sum())
        verdict = (
            "as expected" if trained == (0 if name == "Xavier" else seeds) else "not as expected"
        )
        print(
            f"found: {name}: {trained} of {seeds} seeds train "
            f"(loss below ln 10 - {LEARNT}): {verdict}"
        )


def _better_rate(errors: dict[tuple[str, float], Tensor], name: str) -> float:
    return min(RATES, key=lambda rate: float(errors[name, rate][:, -1].mean()))


def _means(steps: Tensor, epochs: int) -> Tensor:
    """The mean of each epoch (E,), from a value for each step."""
    return steps.view(epochs, -1).mean(1)


def _range(values: Tensor) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _over_seeds(signals: list[list[float]]) -> NDArray[np.float64]:
    """Geometric means (L,)."""
    means: NDArray[np.float64] = np.exp(np.log(signals).mean(0))
    return means


def _canvas(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(2.2 + 3.2 * count, 3.4), layout="constrained", dpi=110)
    every = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3", linewidth=0.8)
    return figure, every


def _save(figure: Figure, picture: Path) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(picture)
    print(f"\npicture: {picture}")


if __name__ == "__main__":
    main()
