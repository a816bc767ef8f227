"""kNN votes in float32 and bfloat16 beside lightly's `knn_predict`, on the CPU or one GPU.

    uv run --with lightly python tests/benchmarks/knn.py [--device cpu|cuda] [--rounds 5]
        [--data DIR] [--quick]

10,000 queries vote with 200 neighbours of a bank of 50,000 at temperature 0.1; features have 512
numbers. Timed are made features, noise around the means of ten classes that some are taken for
others; all ways take turns, and figures are medians over the rounds of ratios within a round. On
the CPU one thread and its CPU time count. hemoco's time has the normalisation of bank and queries
in it; lightly is given them normalised and transposed, in batches of whichever of two sizes is
faster. Accuracies are compared on CIFAR-10, too, in features of a random ResNet-18 whose BN
statistics are those of the images. Without lightly, its figures are a gap.

Shapes: M images in the bank, Q queries, F features.
"""

import argparse
import importlib.util
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from big_sets import add_data_option, cifar10_archives
from machine import describe_machine, table
from PIL import Image
from step_case import MEAN, STD, seconds_per_call
from step_rounds import Goal, over_rounds, print_gaps, print_goals, take_turns
from torch import Tensor
from torch.nn import functional

from hemoco.backbones.file import random_backbone
from hemoco.config import EncoderConfig
from hemoco.features.extract import calibrate_batch_norm, extract_features
from hemoco.models.resnet import Backbone
from hemoco.transfer.classification.knn import knn_votes, make_bank

NEIGHBOURS, TEMPERATURE, CLASSES, FEATURES = 200, 0.1, 10, 512
OURS = {"hemoco, float32": torch.float32, "hemoco, bfloat16": torch.bfloat16}
FLOAT, HALF = OURS
THEIRS = {"lightly, batches of 128": 128, "lightly, batches of 256": 256}

Predict = Callable[["Problem"], Tensor]


class Problem(NamedTuple):
    """Labelled features to search and to classify."""

    bank: Tensor
    """(M, F)."""
    labels: Tensor
    """(M,)."""
    queries: Tensor
    """(Q, F)."""
    own: Tensor
    """Classes of the queries (Q,)."""


def made_problem(images: int, queries: int, device: str) -> Problem:
    """Noise around class means, so strong that a seventh of the queries get another class."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(CLASSES, FEATURES, generator=generator)
    labels = torch.randint(CLASSES, (images + queries,), generator=generator)
    features = 0.135 * means[labels] + torch.randn(images + queries, FEATURES, generator=generator)
    split = [images, queries]
    (bank, queries), (known, own) = (
        tensor.to(device).split(split) for tensor in (features, labels)
    )
    return Problem(bank, known, queries, own)


class Images(NamedTuple):
    """A split of CIFAR-10."""

    images: Tensor
    """uint8 (M, 3, 32, 32)."""
    labels: Tensor
    """(M,)."""


def calibrated_backbone(train: Images, stem: Literal["imagenet", "small"]) -> Backbone:
    """A random ResNet-18 whose BN statistics are those of the training images."""
    backbone = random_backbone(EncoderConfig(architecture="resnet18", stem=stem), 0, MEAN, STD)
    calibrate_batch_norm(backbone, train.images)
    return backbone


def read_cifar(data: Path, split: str, archives: int, each: int) -> Images:
    """Images of a split, evenly over the classes, `each` of so many of its archives."""
    arrays, names = [], []
    for path in cifar10_archives(data, split)[:archives]:
        with zipfile.ZipFile(path) as file:
            found = [name for name in file.namelist() if name.endswith(".jpg")]
            for name in found[:: max(1, len(found) // each)]:
                arrays.append(np.array(Image.open(io.BytesIO(file.read(name))).convert("RGB")))
                names.append(name.split("/")[1])
    known = sorted(set(names))
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Images(images, torch.tensor([known.index(name) for name in names]))


def ours(dtype: torch.dtype) -> Predict:
    """hemoco's predictions (Q,)."""

    def predict(problem: Problem) -> Tensor:
        bank = make_bank(problem.bank, problem.labels, CLASSES, dtype)
        votes = knn_votes(bank, problem.queries, neighbours=NEIGHBOURS, temperature=TEMPERATURE)
        return torch.cat([part.argmax(dim=1) for part in votes])

    return predict


def theirs(batch: int) -> Predict:
    """lightly's predictions (Q,)."""
    from lightly.utils.benchmarking import knn_predict

    def predict(problem: Problem) -> Tensor:
        found = [
            knn_predict(
                part, problem.bank, problem.labels, CLASSES, knn_k=NEIGHBOURS, knn_t=TEMPERATURE
            )[:, 0]
            for part in problem.queries.split(batch)
        ]
        return torch.cat(found)

    return predict


def prepared(problem: Problem) -> Problem:
    """The problem as lightly takes it: bank (F, M) and queries normalised."""
    bank = functional.normalize(problem.bank, dim=1).T.contiguous()
    return problem._replace(bank=bank, queries=functional.normalize(problem.queries, dim=1))


def accuracy(predictions: Tensor, problem: Problem) -> float:
    """In per cent."""
    return 100 * (predictions.cpu() == problem.own.cpu()).double().mean().item()


def measure(problem: Problem, device: str, rounds: int, ways: dict[str, Predict]) -> None:
    """Prints queries per second, accuracies and goals."""
    inputs = {name: problem if name in OURS else prepared(problem) for name in ways}
    predictions = {name: predict(inputs[name]) for name, predict in ways.items()}  # and a warm-up
    accuracies = {name: accuracy(found, problem) for name, found in predictions.items()}
    found = take_turns(
        list(ways),
        rounds,
        lambda name: seconds_per_call(lambda: ways[name](inputs[name]), 1, device),
    )
    rows = []
    for name in ways:
        speed = over_rounds(found, lambda seconds, name=name: len(problem.queries) / seconds[name])
        same = (predictions[name].cpu() == predictions[FLOAT].cpu()).double().mean().item()
        rows.append(
            (name, speed.median, speed.spread(), f"{accuracies[name]:.2f}", f"{100 * same:.2f}")
        )
    queries, bank = len(problem.queries), len(problem.bank)
    title = f"Made features: {queries:,} queries, bank {bank:,}, k {NEIGHBOURS}"
    print(
        table(title, ("way", "queries/s", "range", "accuracy %", "as float32 %"), rows), flush=True
    )
    if peers := [name for name in THEIRS if name in ways]:
        best = max(peers, key=lambda name: accuracies[name])
        moved = over_rounds([accuracies], lambda found: abs(found[HALF] - found[best]))
        goals = [
            Goal(
                f"speed, {name} / lightly",
                over_rounds(found, lambda s, n=name: min(s[p] for p in peers) / s[n]),
                goal,
            )
            for name, goal in ((HALF, 1.4), (FLOAT, 0.9))
        ]
        print_goals(
            "kNN: goals",
            [*goals, Goal("points of accuracy between bf16 and lightly", moved, 0.1, False)],
        )


def compare_on_cifar(data: Path, device: str, ways: dict[str, Predict], *, quick: bool) -> None:
    """Prints accuracies on real images."""
    train = read_cifar(data, "train", 1 if quick else 5, 500 if quick else 10_000)
    test = read_cifar(data, "test", 1, 100 if quick else 10_000)
    backbone = calibrated_backbone(train, "imagenet").to(device)
    bank, queries = (extract_features(backbone, split.images) for split in (train, test))
    problem = Problem(bank, train.labels.to(device), queries, test.labels)
    rows = []
    for name, predict in ways.items():
        found = predict(problem if name in OURS else prepared(problem))
        rows.append((name, f"{accuracy(found, problem):.2f}"))
    title = f"CIFAR-10, random ResNet-18: {len(queries):,} queries, bank {len(bank):,}"
    print(table(title, ("way", "accuracy %"), rows), flush=True)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    add_data_option(parser, required=False)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="few queries, to see that it runs; figures mean nothing",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "one thread, CPU time"
    print(describe_machine(("torch", "numpy"), f"{where}; {options.rounds} rounds"), flush=True)
    ways, gaps = {name: ours(dtype) for name, dtype in OURS.items()}, {}
    if importlib.util.find_spec("lightly"):
        ways |= {name: theirs(batch) for name, batch in THEIRS.items()}
    else:
        gaps["lightly"] = "not importable; uv run --with lightly brings it"
    problem = made_problem(*((2000, 200) if options.quick else (50_000, 10_000)), options.device)
    measure(problem, options.device, options.rounds, ways)
    if options.data is None:
        gaps["CIFAR-10"] = "it needs images; --data names their folder"
    else:
        compare_on_cifar(options.data, options.device, ways, quick=options.quick)
    print_gaps(gaps)
    print(describe_machine(("torch",), "at the end"))


if __name__ == "__main__":
    main()
