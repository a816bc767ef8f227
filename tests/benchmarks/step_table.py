"""The section `step` of step.py: optimiser steps of hemoco and its peers side by side.

The rates that limit the steps are printed too.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import step_ours as own
from machine import table
from peers import PEERS
from step_case import Case, cases
from step_rounds import (
    Goal,
    UnavailableError,
    Worker,
    over_rounds,
    peer_command,
    print_gaps,
    print_goals,
    take_turns,
)
from step_worker import peer_variant, task

Round = Mapping[str, float]
"""Seconds per call, by variant."""

PASSES = {peer.name: peer.passes for peer in PEERS}
CPU_GOALS = {
    "resnet50": {"official": 2.0, "lightly": 1.9, "solo-learn": 1.0, "same": 0.98, "matmul": 0.70},
    "resnet18": {"official": 2.0, "lightly": 1.9, "solo-learn": 1.0, "same": 0.98, "matmul": 0.80},
}
GPU_GOALS = {
    "resnet50": {
        "official": 2.3,
        "lightly": 1.4,
        "solo-learn": 1.3,
        "same": 1.2,
        "matmul": 0.17,
        "memory": 0.43,
        "speed": 4000.0,
    },
    "resnet18": {"official": 3.0, "lightly": 3.0, "solo-learn": 1.3, "same": 1.2, "speed": 25000.0},
}


def measure(device: str, rounds: int, checkouts: Mapping[str, Path | None], *, quick: bool) -> None:
    """Prints the tables of all cases."""
    for case in cases(device, quick=quick):
        with contextlib.ExitStack() as stack:
            workers, gaps = _start(case, device, checkouts, stack)
            holders = {
                variant: worker
                for worker in workers.values()
                for variant in worker.about["variants"]
            }
            calls = _calls_per_turn(list(holders), device, quick=quick)

            def seconds(
                variant: str, holders: dict[str, Worker] = holders, calls: dict[str, int] = calls
            ) -> float:
                return holders[variant].seconds(variant, calls[variant])

            found = take_turns(list(holders), rounds, seconds)
        _print_steps(case, device, found, workers)
        _print_limits(case, device, found, int(workers["ours"].about["flops"]))
        _print_verdicts(case, device, found, workers)
        print_gaps(gaps)


def _start(
    case: Case, device: str, checkouts: Mapping[str, Path | None], stack: contextlib.ExitStack
) -> tuple[dict[str, Worker], dict[str, str]]:
    """A process for each library that is to be had; and why the others are not."""
    ours = [sys.executable, str(Path(__file__).parent / "step_worker.py")]
    workers, gaps = {"ours": Worker([*ours, task("ours", case, device, None)])}, {}
    stack.callback(workers["ours"].close)
    for peer in PEERS:
        checkout = checkouts.get(peer.name)
        try:
            worker = Worker(
                [*peer_command(peer, checkout), task(peer.name, case, device, checkout)]
            )
        except UnavailableError as error:
            gaps[peer.name] = str(error)
            continue
        stack.callback(worker.close)
        if worker.about["torch"] == workers["ours"].about["torch"]:
            workers[peer.name] = worker
        else:
            gaps[peer.name] = f"it came with torch {worker.about['torch']}"
    return workers, gaps


def _calls_per_turn(variants: list[str], device: str, *, quick: bool) -> dict[str, int]:
    calls = dict.fromkeys(variants, 1 if device == "cpu" else 10)
    calls[own.MATMUL] = 2 if quick else 8 if device == "cpu" else 20
    calls |= dict.fromkeys((own.CONVOLUTION, own.COPY), calls[own.MATMUL])
    return calls


def _print_steps(
    case: Case, device: str, rounds: list[Round], workers: Mapping[str, Worker]
) -> None:
    unit = "CPU-s" if device == "cpu" else "s"
    rows = []
    for name, variant, library in _steps(workers):
        ratio = over_rounds(
            rounds, functools.partial(_times_ours, variant=variant, passes=PASSES.get(library, 1))
        )
        speed = over_rounds(rounds, lambda found, v=variant: case.batch / found[v])  # type: ignore[misc]
        seconds = over_rounds(rounds, lambda found, v=variant: found[v])  # type: ignore[misc]
        rows.append(
            (
                name,
                seconds.median,
                speed.median,
                ratio.median,
                ratio.spread(),
                str(workers[library].about["version"]),
            )
        )
    title = (
        f"{case.name}: batch {case.batch}, K {case.queue}; ours has its BN over the whole batch "
        f"as the peers, and beside it in groups of {case.group}"
    )
    names = ("step", unit, f"img/{unit}", "ours / this, per pass", "range", "version")
    print(table(title, names, rows), flush=True)


def _steps(workers: Mapping[str, Worker]) -> Iterator[tuple[str, str, str]]:
    """Label, variant and library of each step."""
    for library, worker in workers.items():
        for variant in worker.about["variants"]:
            if variant not in (own.MATMUL, own.CONVOLUTION, own.COPY):
                passes = PASSES.get(library, 1)
                yield (f"{variant} ({passes} passes)" if passes > 1 else variant), variant, library


def _print_limits(case: Case, device: str, rounds: list[Round], flops: int) -> None:
    rows: list[tuple[str, float, float, float, str, float]] = []
    convolution = over_rounds(
        rounds, lambda found: own.convolution_flops(device) / found[own.CONVOLUTION] / 1e9
    )
    for variant in (own.OURS, own.SPLIT, own.COMPILED, own.TUNED):
        if variant in rounds[0]:
            rate = over_rounds(rounds, lambda found, v=variant: flops / found[v] / 1e9)  # type: ignore[misc]
            limit = over_rounds(rounds, lambda found: _matmul_rate(found, device) / 1e9)
            share = over_rounds(rounds, _matmul_share(device, flops, variant))
            rows.append(
                (
                    variant,
                    rate.median,
                    limit.median,
                    share.median,
                    share.spread(),
                    convolution.median,
                )
            )
    title = (
        f"{case.name}: rates reached, one step {flops / 1e9:,.0f} GFLOP, "
        f"{flops / 1e9 / case.batch:.2f} an image"
    )
    print(
        table(
            title,
            ("step", "GFLOP/s", "bf16 matmul", "of it", "range", "bf16 3x3 convolution"),
            rows,
        ),
        flush=True,
    )
    if case.megabytes:
        share = over_rounds(rounds, _copy_share(case, device, own.OURS))
        moved = over_rounds(
            rounds, lambda found: 2 * own.copied_bytes(device) / found[own.COPY] / 1e9
        )
        matmul = _matmul_share(device, flops, own.OURS)
        copied = _copy_share(case, device, own.OURS)
        both = over_rounds(rounds, lambda found: matmul(found) + copied(found))
        print(
            f"memory: {case.megabytes:g} MB an image, {share.median:.2f} of "
            f"{moved.median:,.0f} GB/s (a copy's); matmul and copy one after the other would take "
            f"{both.median:.2f} of the step ({both.spread()})",
            flush=True,
        )


def _print_verdicts(
    case: Case, device: str, rounds: list[Round], workers: Mapping[str, Worker]
) -> None:
    wanted, goals = (CPU_GOALS if device == "cpu" else GPU_GOALS)[case.architecture], []
    flops = int(workers["ours"].about["flops"])
    for library in workers:
        if library == "ours":
            continue
        # solo-learn's scripts set both
        shipped = peer_variant(library, lower=library == "solo-learn")
        pairs = [("as shipped", shipped, wanted[library])]
        if library != "solo-learn":
            pairs.append(
                ("same precision and format", peer_variant(library, lower=True), wanted["same"])
            )
        for how, variant, goal in pairs:
            figure = functools.partial(_times_ours, variant=variant, passes=PASSES[library])
            goals.append(
                Goal(f"ours / {library}, {how}, per pass", over_rounds(rounds, figure), goal)
            )
    if "matmul" in wanted:
        share = over_rounds(rounds, _matmul_share(device, flops, own.OURS))
        goals.append(Goal("ours / bf16 matmul rate", share, wanted["matmul"]))
    if "memory" in wanted:
        goals.append(
            Goal(
                "ours / copy rate",
                over_rounds(rounds, _copy_share(case, device, own.OURS)),
                wanted["memory"],
            )
        )
    if "speed" in wanted:
        speed = over_rounds(rounds, lambda found: case.batch / found[own.OURS])
        goals.append(Goal("img/s", speed, wanted["speed"]))
    print_goals(f"{case.name}: goals", goals)


def _times_ours(found: Round, variant: str, passes: int) -> float:
    """Speed of our step as a multiple of another step's, per query pass."""
    return found[variant] / passes / found[own.OURS]


def _matmul_rate(found: Round, device: str) -> float:
    return float(2 * own.matmul_size(device) ** 3 / found[own.MATMUL])


def _matmul_share(device: str, flops: int, variant: str) -> Callable[[Round], float]:
    return lambda found: flops / found[variant] / _matmul_rate(found, device)


def _copy_share(case: Case, device: str, variant: str) -> Callable[[Round], float]:
    """Bytes of a step per second over those that a copy reads and writes."""
    moved, copied = case.megabytes * 1e6 * case.batch, 2 * own.copied_bytes(device)
    return lambda found: moved / found[variant] / (copied / found[own.COPY])
