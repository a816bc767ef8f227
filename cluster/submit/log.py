"""Follows the log of a submitted job to its end, over connections that may break."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import aiohttp

from cluster.submit.client import Cluster, HeadLost, Job

logger = logging.getLogger(__name__)

_QUIET_S = 10.0  # after this time without output, check whether the job still runs
_PAUSE_S = 1.0


def follow(
    cluster: Cluster, job_id: str, show: Callable[[str], None], *, patience_s: float = 120.0
) -> Job:
    """Shows a job's log from its beginning until the job ends.

    Text from before a broken connection is not repeated.

    Args:
        cluster: cluster on which the job runs.
        job_id: id of the job.
        show: called with the text, piece by piece; a piece need not end with a line.
        patience_s: time without an answer from the head after which following ends.

    Returns:
        The ended job.

    Raises:
        HeadLost: the head does not answer, or was restarted and does not know the job.
    """
    return asyncio.run(_follow(cluster, job_id, show, patience_s))


async def _follow(
    cluster: Cluster, job_id: str, show: Callable[[str], None], patience_s: float
) -> Job:
    shown = 0  # characters of the log
    answered, warned = time.monotonic(), -math.inf
    while True:
        received = 0  # characters over this connection, which begins with the log's beginning
        try:
            async with aclosing(_pieces(cluster, job_id)) as pieces:
                async for piece in pieces:
                    answered = time.monotonic()
                    new = piece[max(0, shown - received) :]
                    if new:
                        show(new)
                    received += len(piece)
                    shown = max(shown, received)
            job = await asyncio.to_thread(cluster.job, job_id)
            if job.ended:
                # the stream may have ended before the last lines: read the log once more, whole
                log = await asyncio.to_thread(cluster.log, job_id)
                show(log[shown:])
                return job
            answered = time.monotonic()
        except HeadLost as error:
            if time.monotonic() - answered > patience_s or await _forgotten(cluster, job_id):
                raise
            if warned < answered:  # once for each outage
                logger.warning("%s; trying again for %.0f s", error, patience_s)
                warned = time.monotonic()
        await asyncio.sleep(_PAUSE_S)


async def _pieces(cluster: Cluster, job_id: str) -> AsyncGenerator[str, None]:
    """Yields the log over one connection; empty pieces while the job runs without output.

    Raises:
        HeadLost: the connection has broken.
    """
    tail = cluster.client.tail_job_logs(job_id)
    coming: asyncio.Task[str] | None = None  # kept over time-outs: cancelling would lose a piece
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(tail))
            await asyncio.wait({coming}, timeout=_QUIET_S)
            if coming.done():
                piece, coming = coming.result(), None
                yield piece
            elif (await asyncio.to_thread(cluster.job, job_id)).ended and not coming.done():
                return
            else:
                yield ""
    except StopAsyncIteration:
        return
    except (aiohttp.ClientError, RuntimeError, OSError) as error:
        raise HeadLost(f"{cluster.address}: the connection has broken") from error
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        await tail.aclose()


async def _forgotten(cluster: Cluster, job_id: str) -> bool:
    """Returns whether the head answers and does not know the job, as after a restart."""
    try:
        return all(job.id != job_id for job in await asyncio.to_thread(cluster.jobs))
    except HeadLost:
        return False
