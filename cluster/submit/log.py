"""The log of a submitted job, followed to its end over connections that may break."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import aiohttp

from cluster.submit.client import Cluster, HeadLost, Job

logger = logging.getLogger(__name__)

_QUIET_S = 10.0  # a silent log: is it the job or the connection?
_PAUSE_S = 1.0


def follow(
    cluster: Cluster, job_id: str, show: Callable[[str], None], *, patience_s: float = 120.0
) -> Job:
    """Shows a job's log from its beginning until the job ends; what came before a broken connection is not repeated.

    Args:
        cluster: where it runs.
        job_id: the job.
        show: gets the text, piece by piece; a piece need not end with a line.
        patience_s: after that time without an answer from the head it is given up.

    Returns:
        The ended job.

    Raises:
        HeadLost: the head has gone, or another one is there that does not know the job.
    """
    return asyncio.run(_follow(cluster, job_id, show, patience_s))


async def _follow(
    cluster: Cluster, job_id: str, show: Callable[[str], None], patience_s: float
) -> Job:
    shown = 0
    answered, complained = time.monotonic(), -math.inf
    while True:
        seen = 0
        try:
            async with aclosing(_pieces(cluster, job_id)) as pieces:
                async for piece in pieces:
                    answered = time.monotonic()
                    if fresh := piece[
                        max(0, shown - seen) :
                    ]:  # a new connection begins with the log's beginning
                        show(fresh)
                    seen += len(piece)
                    shown = max(shown, seen)
            job = await asyncio.to_thread(cluster.job, job_id)
            if (
                job.ended
            ):  # its last lines may have come after the silence in which it was asked for
                show((await asyncio.to_thread(cluster.log, job_id))[shown:])
                return job
            answered = time.monotonic()
        except HeadLost as error:
            if time.monotonic() - answered > patience_s or await _forgotten(cluster, job_id):
                raise
            if complained < answered:  # once for each outage
                logger.warning("%s; trying again for %.0f s", error, patience_s)
                complained = time.monotonic()
        await asyncio.sleep(_PAUSE_S)


async def _pieces(cluster: Cluster, job_id: str) -> AsyncGenerator[str, None]:
    """The log over one connection; empty pieces where the log is silent and the head still answers.

    Raises:
        HeadLost: the connection has broken.
    """
    tail = cluster.client.tail_job_logs(job_id)
    coming: asyncio.Task[str] | None = None
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
    """Whether the head answers and knows no such job: it has been started anew."""
    try:
        return all(job.id != job_id for job in await asyncio.to_thread(cluster.jobs))
    except HeadLost:
        return False
