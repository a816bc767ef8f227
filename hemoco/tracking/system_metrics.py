"""The machine a training runs on: what it is, and how busy it is while training goes on.

The names of the metrics are those of MLflow's own system metrics, so that its pages show them as such. MLflow's monitor
is not used: it sends by itself, and ends for good when MLflow does not answer once.
"""

import contextlib
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch

from hemoco.errors import HemocoError
from hemoco.storage.objects import home
from hemoco.tracking.client import ask
from hemoco.tracking.metric_queue import Tracker
from hemoco.tracking.tags import Tag
from hemoco.version import __version__

logger = logging.getLogger(__name__)

_EVERY_S = 10.0
_JOIN_S = 2.0
_MEGA = 1e6
_PROC = Path("/proc")
_GPU_FIELDS = ("index", "utilization.gpu", "memory.used", "memory.total", "power.draw", "power.limit")


class _Counters(NamedTuple):
    """What grows from start to start of the machine."""

    busy: int
    total: int
    received: int
    sent: int


def machine_facts() -> dict[str, str]:
    """Tags that say on what, and with what, this process computes; GPUs are those that it may use."""
    facts = {
        Tag.HOST: socket.gethostname(),
        Tag.CPU: _cpu_model(),
        Tag.CPUS: str(os.cpu_count()),
        Tag.GPUS: str(torch.cuda.device_count()),
        Tag.TORCH: torch.__version__,
        Tag.PYTHON: platform.python_version(),
        Tag.VERSION: __version__,
    }
    if torch.cuda.is_available():
        facts |= {Tag.GPU: torch.cuda.get_device_name(0), Tag.CUDA: torch.version.cuda or "none"}
    return facts


class SystemMetrics:
    """Samples this machine while the block runs, at the step that training has logged last. A context manager.

    A thread of its own reads files of the kernel and asks nvidia-smi, each 10 s. What it finds goes the way of all
    metrics: an outage of MLflow loses none of it. Trouble of any kind is logged, once, and does not touch training.
    """

    def __init__(self, uri: str, run_id: str, tracker: Tracker, *, every_s: float = _EVERY_S) -> None:
        """Prepares.

        Args:
            uri: of MLflow.
            run_id: of the training, gets the facts of the machine as tags.
            tracker: of the training, takes the samples.
            every_s: seconds between two samples.
        """
        self._uri, self._run_id, self._tracker, self._every_s = uri, run_id, tracker, every_s
        self._ending, self._warned = threading.Event(), False
        self._thread = threading.Thread(target=self._sample_until_ended, name="hemoco-machine", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(_JOIN_S)

    def _sample_until_ended(self) -> None:
        told = self._tell()
        first = before = _counters()
        while not self._ending.wait(self._every_s):
            now = _counters()
            values = self._values_of(_disk_usage, partial(_usage, first, before, now), _gpu_usage)
            before = now
            if self._tracker.step is not None:  # before the first one there is no place for them
                self._tracker.log(self._tracker.step, {f"system/{name}": value for name, value in values.items()})
            told = told or self._tell()

    def _values_of(self, *sources: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What those say that can be asked."""
        values: dict[str, float] = {}
        for source in sources:
            try:
                values |= source()
            except (OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
                if not self._warned:
                    logger.warning("event=system_metrics %s", error)
                self._warned = True
        return values

    def _tell(self) -> bool:
        """Whether MLflow has taken the facts of the machine."""
        facts = machine_facts().items()
        try:
            ask(self._uri, lambda client: [client.set_tag(self._run_id, *fact) for fact in facts], patience_s=0)
        except HemocoError as error:
            logger.debug("event=machine_untold %s", error)
            return False
        return True


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in (_PROC / "cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _counters() -> _Counters | None:
    """None where the kernel has no /proc."""
    if not (_PROC / "net/dev").exists():
        return None
    ticks = [int(word) for word in (_PROC / "stat").read_text().partition("\n")[0].split()[1:9]]
    idle = ticks[3] + ticks[4]  # the latter waits for disks
    links = [line.split(":") for line in (_PROC / "net/dev").read_text().splitlines()[2:]]
    outside = [rest.split() for name, rest in links if name.strip() != "lo"]
    received, sent = (sum(int(fields[place]) for fields in outside) for place in (0, 8))
    return _Counters(sum(ticks) - idle, sum(ticks), received, sent)


def _disk_usage() -> dict[str, float]:
    """Of the disk of $HEMOCO_HOME, which keeps shards."""
    disk = shutil.disk_usage(next(path for path in (home(), *home().parents) if path.exists()))
    return {
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_usage_megabytes": disk.used / _MEGA,
        "disk_available_megabytes": disk.free / _MEGA,
    }


def _usage(first: _Counters | None, before: _Counters | None, now: _Counters | None) -> dict[str, float]:
    """Of the CPUs since the last sample, of the network since the first one, of the memory now."""
    if first is None or before is None or now is None:
        return {}
    fields = (line.split() for line in (_PROC / "meminfo").read_text().splitlines())
    memory = {words[0]: int(words[1]) * 1024 for words in fields}
    used = memory["MemTotal:"] - memory["MemAvailable:"]
    return {
        "cpu_utilization_percentage": 100 * (now.busy - before.busy) / max(1, now.total - before.total),
        "system_memory_usage_megabytes": used / _MEGA,
        "system_memory_usage_percentage": 100 * used / memory["MemTotal:"],
        "network_receive_megabytes": (now.received - first.received) / _MEGA,
        "network_transmit_megabytes": (now.sent - first.sent) / _MEGA,
    }


def _gpu_usage() -> dict[str, float]:
    """Of all GPUs of the node; nothing where there is no nvidia-smi."""
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_EVERY_S, check=True)
    return parse_gpu_usage(done.stdout)


def parse_gpu_usage(text: str) -> dict[str, float]:
    """What nvidia-smi's lines of CSV say; a number that a card does not give is left out.

    Args:
        text: index, utilisation in percent, memory used and in all in MiB, power and its limit in W.
    """
    values: dict[str, float] = {}
    for line in text.splitlines():
        index, *fields = (word.strip() for word in line.split(","))
        busy, used, memory, power, limit = (_number(word) for word in fields)
        card = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": used * 2**20 / _MEGA,
            "memory_usage_percentage": 100 * used / memory,
            "power_usage_watts": power,
            "power_usage_percentage": 100 * power / limit,
        }
        values |= {f"gpu_{index}_{name}": value for name, value in card.items() if math.isfinite(value)}
    return values


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:  # [N/A], [Not Supported]
        return math.nan
