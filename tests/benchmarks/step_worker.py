"""One library's steps of one case, in a process of its own that answers step_rounds.py.

The command is `python step_worker.py JSON`. It then answers each line of standard input,
`CALLS NAME`, with the seconds per call.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from step_case import Case, Step, seconds_per_call

WARM_UP = {
    "cpu": 1,
    "cuda": 5,
}  # the first step makes the optimiser's state and the allocator's pools


def main() -> None:
    """Builds, warms up, says what there is, and times what is asked for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    task = json.loads(sys.argv[1])
    case, device = Case(**task["case"]), task["device"]
    steps, about = _build(task["library"], case, device, Path(task["checkout"]))
    for step in steps.values():
        seconds_per_call(step, WARM_UP[device], device)
        _release(device)
    print(
        json.dumps(about | {"variants": list(steps), "torch": torch.__version__}),
        file=answers,
        flush=True,
    )
    for line in sys.stdin:
        calls, _, name = line.strip().partition(" ")
        found = seconds_per_call(steps[name], int(calls), device)
        _release(device)
        print(found, file=answers, flush=True)


def _build(
    library: str, case: Case, device: str, checkout: Path
) -> tuple[dict[str, Step], dict[str, object]]:
    if library == "ours":
        import step_ours

        steps = step_ours.variants(case, device)
        return steps, {
            "flops": step_ours.count_flops(steps[step_ours.OURS]),
            "version": "this tree",
        }
    import peers

    peer = next(each for each in peers.PEERS if each.name == library)
    made = peer.build(case, device, checkout)
    return {peer_variant(library, lower=lower): step for lower, step in made.items()}, {
        "version": peers.version(peer, checkout)
    }


def peer_variant(library: str, *, lower: bool) -> str:
    """The name of a peer's step, as shipped or not."""
    return f"{library}, bf16, channels_last" if lower else f"{library}, float32"


def _release(device: str) -> None:
    if device == "cuda":  # to the other libraries' processes
        torch.cuda.empty_cache()


def task(library: str, case: Case, device: str, checkout: Path | None) -> str:
    """The JSON that asks for a library's steps."""
    values = {
        "library": library,
        "case": dataclasses.asdict(case),
        "device": device,
        "checkout": str(checkout or ""),
    }
    return json.dumps(values)


if __name__ == "__main__":
    main()
