"""The section `ddp` of step.py: two gloo ranks, beside the same two without communication.

Each rank is a process of one thread. `python step_ddp.py RANK STORE ROUNDS QUICK` runs one of them;
rank 0 prints JSON. The time is wall time from barrier to barrier, since waiting costs no CPU time;
so it needs two idle cores.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from machine import table
from step_case import Case, Step, made_crops
from step_ours import config, stepper
from step_rounds import Goal, over_rounds, print_goals
from torch import Tensor

import hemoco.distributed
from hemoco.config import PretrainConfig
from hemoco.train.pretrain import TrainState, build_state, trained_parameters

RANKS, EQUAL_STEPS = 2, 3
DDP, ALONE = "DDP", "not communicating"
CPU = torch.device("cpu")


def global_case(*, quick: bool) -> Case:
    """The case that both ranks compute together."""
    return Case(
        architecture="resnet18",
        size=16 if quick else 32,
        stem="small",
        batch=16 if quick else 64,
        queue=256 if quick else 4096,
        group=4 if quick else 16,
    )


def measure(rounds: int, *, quick: bool) -> None:
    """Prints both speeds and how far the weights are from those of one process."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    __file__,
                    str(rank),
                    f"{folder}/store",
                    str(rounds),
                    str(int(quick)),
                ],
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        answer, *_ = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("a rank failed; its message is above")
    found, case = json.loads(answer), global_case(quick=quick)
    speeds = [
        (name, over_rounds(found["rounds"], lambda each, n=name: case.batch / each[n]).median)  # type: ignore[misc]
        for name in (DDP, ALONE)
    ]
    title = (
        f"{RANKS} ranks of one thread, ResNet-18 at {case.size} pixels, bf16, "
        f"global batch {case.batch}"
    )
    print(table(title, ("step", "img/s, wall"), speeds))
    efficiency = over_rounds(found["rounds"], lambda each: each[ALONE] / each[DDP])
    print_goals("Data parallel: goals", [Goal("efficiency of DDP", efficiency, 0.8)])
    print(
        f"after {EQUAL_STEPS} float32 steps: the ranks' weights differ by "
        f"{found['between_ranks']:g}; from those of one process with the whole batch they are "
        f"{found['from_one']:.1e} of the way they went, the queue {found['queue']:.1e};\n"
        "changing that process's first weights by 1e-7, as rounding does, takes it "
        f"{found['rounding']:.1e} of the way elsewhere"
    )
    equal = (
        found["between_ranks"] == 0
        and found["from_one"] <= found["rounding"]
        and found["queue"] < 1e-4
    )
    print(
        "weights equal to one process's, up to rounding, and on both ranks: "
        f"{'met' if equal else 'NOT MET'}"
    )


def rank_main(rank: int, store: str, rounds: int, *, quick: bool) -> None:
    """One rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    case = global_case(quick=quick)
    part = slice(rank * case.batch // RANKS, (rank + 1) * case.batch // RANKS)
    crops, whole = made_crops(case, "cpu")[part], config(case)
    steps: dict[str, Step] = {DDP: stepper(build_state(whole, CPU, data_digest=""), crops)}
    with alone():
        state = build_state(
            config(case, global_batch_size=case.batch // RANKS), CPU, data_digest=""
        )
        steps[ALONE] = stepper(state, crops)
    calls = 1 if quick else 4
    turns = []
    for turn in range(rounds + 1):
        order = (DDP, ALONE) if turn % 2 else (ALONE, DDP)
        turns.append({name: seconds_between_barriers(steps[name], calls, name) for name in order})
    agreement = compare(case, crops)
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps({"rounds": turns[1:]} | agreement))


def seconds_between_barriers(step: Step, calls: int, name: str) -> float:
    """Wall time of one call, on the slower of the ranks."""
    dist.barrier()
    begun = time.perf_counter()
    with alone() if name == ALONE else contextlib.nullcontext():
        for _ in range(calls):
            step()
    dist.barrier()
    return (time.perf_counter() - begun) / calls


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """hemoco takes this process for the whole world."""
    hemoco.distributed.dist = types.SimpleNamespace(is_initialized=lambda: False)  # type: ignore[assignment]
    try:
        yield
    finally:
        hemoco.distributed.dist = dist


def compare(case: Case, crops: Tensor) -> dict[str, float]:
    """Differences of weights and queue after some float32 steps.

    They are taken between the ranks, and from those of one process.
    """
    exact = config(case, precision="float32")
    state = build_state(exact, CPU, data_digest="")
    start = _weights(state)
    step = stepper(state, crops)
    for _ in range(EQUAL_STEPS):
        step()
    ended = _weights(state)
    others = [torch.empty_like(ended) for _ in range(RANKS)]
    dist.all_gather(others, ended)
    with alone():  # on both ranks, so that neither waits long for the other
        single, nudged = (_trained_alone(case, exact, nudge) for nudge in (0.0, 1e-7))
    queue = dict(state.model.named_buffers())["queue"] - dict(single.model.named_buffers())["queue"]
    way, enqueued = (ended - start).norm(), EQUAL_STEPS * case.batch
    return {
        "between_ranks": float((others[0] - others[1]).abs().max()),
        "from_one": float((ended - _weights(single)).norm() / way),
        "rounding": float((_weights(nudged) - _weights(single)).norm() / way),
        "queue": float(queue.norm() / enqueued**0.5),
    }


def _trained_alone(case: Case, settings: PretrainConfig, nudge: float) -> TrainState:
    """After the steps, from weights that are off by about this share of themselves."""
    state, generator = build_state(settings, CPU, data_digest=""), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(state.model):
            parameter.mul_(1 + nudge * torch.randn(parameter.shape, generator=generator))
    step = stepper(state, made_crops(case, "cpu"))
    for _ in range(EQUAL_STEPS):
        step()
    return state


def _weights(state: TrainState) -> Tensor:
    return torch.cat(
        [parameter.detach().flatten() for parameter in trained_parameters(state.model)]
    )


if __name__ == "__main__":
    assert Path(sys.argv[2]).parent.is_dir(), "run step.py ddp"
    rank_main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), quick=bool(int(sys.argv[4])))
