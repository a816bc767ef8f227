"""The section `loss` of step.py: `queue_contrast` beside the form of the official code.

The official code concatenates the logits and calls cross_entropy. Memory is the most that a process
of its own grows by: `python step_loss.py FORM DEVICE QUEUE` prints bytes. On a GPU it is what torch
has allocated.

Shapes: N queries, C embedding size, K queue length.
"""

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from machine import table
from step_case import TEMPERATURE, seconds_per_call
from step_rounds import Goal, over_rounds, print_goals, take_turns
from torch import Tensor
from torch.nn import functional

from hemoco.models.info_nce import queue_contrast

BATCH, EMBEDDING_SIZE = 256, 128
FUSED, PLAIN = "queue_contrast", "cat + cross_entropy"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_loss(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """All logits at once: (N, C), (N, C), (C, K) -> ()."""
    positives = torch.einsum("nc,nc->n", queries, keys)[:, None]  # (N, 1)
    logits = torch.cat([positives, queries @ queue], dim=1)  # (N, 1 + K)
    logits /= TEMPERATURE
    return functional.cross_entropy(
        logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    )


def fused_loss(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """hemoco's: (N, C), (N, C), (C, K) -> ()."""
    return queue_contrast(queries, keys, queue, TEMPERATURE).loss


FORMS: dict[str, Loss] = {FUSED: fused_loss, PLAIN: plain_loss}


def measure(device: str, rounds: int, *, quick: bool) -> None:
    """Prints time, memory and agreement of both forms."""
    queue_length = 4096 if quick else 65536
    inputs = made_inputs(device, queue_length)
    for form in FORMS.values():
        with_gradient(form, inputs)
    calls = 1 if quick else 5 if device == "cpu" else 50
    seconds = take_turns(
        list(FORMS),
        rounds,
        lambda name: seconds_per_call(lambda: with_gradient(FORMS[name], inputs), calls, device),
    )
    grown = take_turns(
        list(FORMS), rounds, lambda name: float(_peak_elsewhere(name, device, queue_length))
    )
    rows = [
        (
            name,
            over_rounds(seconds, _of(name, 1e3)).median,
            over_rounds(grown, _of(name, 1e-6)).median,
        )
        for name in FORMS
    ]
    unit = "CPU-ms" if device == "cpu" else "ms"
    title = (
        f"Loss and its gradient: {BATCH} queries, C {EMBEDDING_SIZE}, K {queue_length}, float32; "
        "over the queue"
    )
    print(table(title, ("form", unit, "MB at most"), rows))
    value, gradient = disagreement(inputs)
    print(f"they differ by {value:.1e} in the loss and {gradient:.1e} in the gradient, relative")
    less = over_rounds(grown, lambda found: found[PLAIN] / found[FUSED])
    faster = over_rounds(seconds, lambda found: found[PLAIN] / found[FUSED])
    print_goals(
        "Loss: goals",
        [Goal("memory, plain / ours", less, 3.0), Goal("time, plain / ours", faster, 1.0)],
    )


def made_inputs(device: str, queue_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit vectors; each key is near its query."""
    generator = torch.Generator().manual_seed(0)
    queries = functional.normalize(torch.randn(BATCH, EMBEDDING_SIZE, generator=generator), dim=1)
    keys = functional.normalize(
        queries + 0.05 * torch.randn(BATCH, EMBEDDING_SIZE, generator=generator), dim=1
    )
    queue = functional.normalize(
        torch.randn(EMBEDDING_SIZE, queue_length, generator=generator), dim=0
    )
    return queries.to(device), keys.to(device), queue.to(device)


def with_gradient(form: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient for the queries (N, C)."""
    queries = inputs[0].detach().requires_grad_()
    loss = form(queries, *inputs[1:])
    loss.backward()  # type: ignore[no-untyped-call]
    assert queries.grad is not None
    return loss.detach(), queries.grad


def disagreement(inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """Relative difference of loss and gradient between the forms."""
    (ours, slope), (plain, plain_slope) = (with_gradient(form, inputs) for form in FORMS.values())
    return float((ours - plain).abs() / plain.abs()), float(
        (slope - plain_slope).norm() / plain_slope.norm()
    )


def peak(form: Loss, device: str, queue_length: int) -> int:
    """Bytes by which one call makes the process grow, at most."""
    small, whole = made_inputs(device, 64), made_inputs(device, queue_length)
    with_gradient(form, small)  # what a first call loads
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradient(form, whole)
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError):  # else an earlier peak may count, to our disadvantage
        Path("/proc/self/clear_refs").write_text("5")  # forgets VmHWM
    before = _resident("VmRSS")
    with_gradient(form, whole)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """Memory of this process in bytes, now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _peak_elsewhere(name: str, device: str, queue_length: int) -> int:
    command = [sys.executable, __file__, name, device, str(queue_length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _of(name: str, scale: float) -> Callable[..., float]:
    return lambda found: found[name] * scale


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(peak(FORMS[sys.argv[1]], sys.argv[2], int(sys.argv[3])))
