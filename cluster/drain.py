"""`python -m cluster.drain`: run on a node that is about to go away, before its processes are ended.

A Kubernetes preStop hook or the watcher of a spot instance's notice calls it: SIGTERM would reach the container's first
process, and Ray would end the training with it.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_TRAINING = (
    b"ray::RayTrainWorker",
    b"RayTrainWorker",
    b"ray::train_alone",
)  # the titles of their processes
_POLL_S = 0.2
_SHARE = 1 / 3  # of the time that is left, for telling Ray; the rest is for the checkpoints
_TELL = "import sys; from cluster.drain import tell_ray; tell_ray(int(sys.argv[1]))"


def main(argv: list[str]) -> int:
    """Keeps new work off this node and has its trainings save a checkpoint; returns when they have stopped.

    Args:
        argv: `--grace_s N`, the seconds that are left.

    Returns:
        0, or 1 where trainings still run when the time is up.
    """
    parser = argparse.ArgumentParser(prog="python -m cluster.drain", description=__doc__)
    parser.add_argument(
        "--grace_s", type=float, default=60.0, help="seconds until the node goes away"
    )
    grace_s = parser.parse_args(argv).grace_s
    deadline = time.monotonic() + grace_s
    if problem := _drain(grace_s):  # the checkpoints are still worth saving
        sys.stderr.write(
            f"Ray does not drain this node, and may place work here again: {problem}\n"
        )
    for pid in _trainings():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while left := _trainings():
        if time.monotonic() > deadline:
            sys.stderr.write(
                f"processes {left} still train; what they did since their last checkpoint is lost\n"
            )
            return 1
        time.sleep(_POLL_S)
    return 0


def tell_ray(left_s: int) -> None:
    """Ends as the command that tells Ray that this node goes away: what starts anew is then placed elsewhere.

    Args:
        left_s: seconds until then.

    Raises:
        Exception: whatever Ray raises where none answers.
    """
    deadline = time.monotonic() + left_s
    import ray

    address = os.environ.get("RAY_ADDRESS") or "auto"
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    gcs, node = ray.get_runtime_context().gcs_address, ray.get_runtime_context().get_node_id()
    ray.shutdown()
    command = [
        *(
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "drain-node",
            "--address",
            gcs,
            "--node-id",
            node,
        ),
        *(
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "python -m cluster.drain",
        ),
        *("--deadline-remaining-seconds", str(max(0, int(deadline - time.monotonic())))),
    ]
    os.execv(
        command[0], command
    )  # no child, which would outlive this process where that is given up


def _drain(grace_s: float) -> str:
    """What went wrong when Ray was to be told; empty if nothing did. Takes a part of the time at most."""
    # in a process of its own: Ray's client may wait for minutes, or end its process, where the head has gone
    command = [sys.executable, "-c", _TELL, str(int(grace_s))]
    limit_s = grace_s * _SHARE
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"it has not answered within {limit_s:.0f} s"
    except Exception as error:  # whatever it is, the trainings must be told
        return f"{type(error).__name__}: {error}"
    said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return said[-1] if done.returncode else ""


def _trainings() -> list[int]:
    """Training processes of this node: those in our network namespace, which a container shares with no other node."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            ours = (file.parent / "ns/net").readlink() == Path("/proc/self/ns/net").readlink()
            if ours and file.read_bytes().startswith(_TRAINING):
                found.append(int(file.parent.name))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
