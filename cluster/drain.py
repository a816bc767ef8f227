"""`python -m cluster.drain`: prepares a node for its shutdown, before its processes are ended.

It is called by a preStop hook of Kubernetes, or by what watches for the notice of a spot instance.
SIGTERM alone would not do: it reaches the first process of the container, which is Ray, and Ray
would end the training with it.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# how the command lines of training processes begin
_TRAINING = (b"ray::RayTrainWorker", b"RayTrainWorker", b"ray::train_alone")
_POLL_S = 0.2
_SHARE = 1 / 3  # share of the time for reporting to Ray; the rest is for the checkpoints
_REPORT = "import sys; from cluster.drain import drain_in_ray; drain_in_ray(int(sys.argv[1]))"


def main(argv: list[str]) -> int:
    """Keeps new work off this node and has its trainings save a checkpoint.

    Returns when the trainings have stopped, or the time is up.

    Args:
        argv: `--grace_s N`, the seconds that are left.

    Returns:
        The exit status: 0, or 1 if trainings are still running.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cluster.drain",
        description="Keeps new work off this node and has its trainings save a checkpoint.",
    )
    parser.add_argument(
        "--grace_s", type=float, default=60.0, help="seconds until the node goes away (default: 60)"
    )
    grace_s = parser.parse_args(argv).grace_s
    deadline = time.monotonic() + grace_s
    problem = _drain(grace_s)
    if problem:  # not fatal: the checkpoints are still worth saving
        sys.stderr.write(
            f"Ray does not drain this node, and may place work here again: {problem}\n"
        )
    for pid in _trainings():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    while running := _trainings():
        if time.monotonic() > deadline:
            sys.stderr.write(
                f"processes {running} are still training; their steps since the last checkpoint "
                "are lost\n"
            )
            return 1
        time.sleep(_POLL_S)
    return 0


def drain_in_ray(left_s: int) -> None:
    """Replaces this process by Ray's own `drain-node` for this node; never returns.

    Ray then starts new work on other nodes.

    Args:
        left_s: seconds until the node goes away.

    Raises:
        Exception: whatever Ray raises if its head does not answer.
    """
    deadline = time.monotonic() + left_s
    import ray

    address = os.environ.get("RAY_ADDRESS") or "auto"
    ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    gcs_address = ray.get_runtime_context().gcs_address
    node_id = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    remaining_s = max(0, int(deadline - time.monotonic()))
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", gcs_address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "python -m cluster.drain"]
    command += ["--deadline-remaining-seconds", str(remaining_s)]
    # exec, not a child: the caller kills this process when it takes too long, and a child would
    # survive that
    os.execv(command[0], command)


def _drain(grace_s: float) -> str:
    """Reports to Ray that this node goes away; takes a part of the time at most.

    Returns:
        What went wrong; empty if nothing did.
    """
    # In a process of its own: if the head has gone, Ray's client may wait for minutes, or end the
    # process that it runs in.
    command = [sys.executable, "-c", _REPORT, str(int(grace_s))]
    limit_s = grace_s * _SHARE
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"it has not answered within {limit_s:.0f} s"
    except Exception as error:  # of any kind: the trainings must be signalled in any case
        return f"{type(error).__name__}: {error}"
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


def _trainings() -> list[int]:
    """Lists the training processes of this node.

    A process belongs to the node if it is in our network namespace, which a container shares with
    no other node. The process table does not suffice: several nodes of one machine may share it.
    """
    pids = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            same_node = (file.parent / "ns/net").readlink() == Path("/proc/self/ns/net").readlink()
            if same_node and file.read_bytes().startswith(_TRAINING):
                pids.append(int(file.parent.name))
    return pids


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
