"""Calls of a function on n processes of one gloo group, on this machine and without ports.

The processes are kept for the next call, since each takes seconds to import torch. After an error
they are ended.
"""

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_MOST_RANKS = 3
_pool: ProcessPoolExecutor | None = None


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Returns the result of `function(*args)` on each rank.

    The function must be importable, and its arguments and result are pickled. It must not change
    the state of its process, which later calls use.
    """
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(_MOST_RANKS, multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder:
        # a rank waits for the others in a collective, so no process takes two of them
        ranks = [
            _pool.submit(_run, rank, function, world_size, folder, args)
            for rank in range(world_size)
        ]
        done, waiting = wait(ranks, return_when=FIRST_EXCEPTION)
        # After a failure, other ranks may wait in a collective for ever; and a pool that lost a
        # process cannot be used again.
        if waiting or any(rank.exception() is not None for rank in done):
            for process in list((_pool._processes or {}).values()):
                process.kill()
            _pool.shutdown()
            _pool = None
        for rank in done:
            rank.result()
        return [
            torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)
        ]


def _run(
    rank: int, function: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")  # as pytest does in its own process
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        torch.save(function(*args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()
