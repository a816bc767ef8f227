"""The machine a training runs on: which hardware it has, and how busy it is while training goes on.

The metrics have the names of MLflow's own system metrics, so that its pages show them as such. MLflow's monitor is not
used: it sends by itself, and ends for good when MLflow does not answer once.

psutil and pynvml are imported inside functions: models must load on machines that have neither.
"""

import contextlib
import logging
import os
import platform
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
_LOOPBACK = ("lo", "lo0")


def machine_facts() -> dict[str, str]:
    """Tags with this process's hardware and versions; GPUs are those that it may use."""
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

    A thread of its own reads psutil and NVML every 10 s. The samples take the way of all metrics: an outage of MLflow
    loses none of them. Trouble of any kind is logged, once, and does not touch training.
    """

    def __init__(
        self, uri: str, run_id: str, tracker: Tracker, *, every_s: float = _EVERY_S
    ) -> None:
        """Prepares.

        Args:
            uri: of MLflow.
            run_id: of the training, gets the facts of the machine as tags.
            tracker: of the training, takes the samples.
            every_s: seconds between two samples.
        """
        self._uri, self._run_id, self._tracker, self._every_s = uri, run_id, tracker, every_s
        self._ending, self._warned = threading.Event(), False
        self._thread = threading.Thread(
            target=self._sample_until_ended, name="hemoco-machine", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join(_JOIN_S)

    def _sample_until_ended(self) -> None:
        recorded = self._record_facts()
        sources = (_disk_usage, HostUsage(), gpu_usage)
        self._values_of(sources)  # CPU and network are measured from here on
        while not self._ending.wait(self._every_s):
            values = self._values_of(sources)
            if self._tracker.step is not None:  # before the first step there is no place for them
                self._tracker.log(
                    self._tracker.step, {f"system/{name}": value for name, value in values.items()}
                )
            recorded = recorded or self._record_facts()

    def _values_of(self, sources: Sequence[Callable[[], dict[str, float]]]) -> dict[str, float]:
        """The values of all sources that can be read."""
        values: dict[str, float] = {}
        for source in sources:
            try:
                values |= source()
            except Exception as error:  # psutil, NVML and the kernel have many classes of errors
                if not self._warned:
                    logger.warning("event=system_metrics %s: %s", type(error).__name__, error)
                self._warned = True
        return values

    def _record_facts(self) -> bool:
        """Sends the facts of the machine; returns whether MLflow has taken them."""
        facts = machine_facts().items()
        try:
            ask(
                self._uri,
                lambda client: [client.set_tag(self._run_id, *fact) for fact in facts],
                patience_s=0,
            )
        except HemocoError as error:
            logger.debug("event=machine_facts_not_recorded %s", error)
            return False
        return True


def _cpu_model() -> str:
    with contextlib.suppress(OSError):  # psutil does not have the model's name
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _disk_usage() -> dict[str, float]:
    """Use of the disk of $HEMOCO_HOME, which holds cached shards."""
    disk = shutil.disk_usage(next(path for path in (home(), *home().parents) if path.exists()))
    return {
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_usage_megabytes": disk.used / _MEGA,
        "disk_available_megabytes": disk.free / _MEGA,
    }


class HostUsage:
    """CPU since the call before, network since the first call, memory now; the first call's CPU means nothing."""

    def __init__(self) -> None:
        self._first: tuple[int, int] | None = None

    def __call__(self) -> dict[str, float]:
        import psutil

        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        links = psutil.net_io_counters(pernic=True)
        outside = [link for name, link in links.items() if name not in _LOOPBACK]
        received, sent = (
            sum(link.bytes_recv for link in outside),
            sum(link.bytes_sent for link in outside),
        )
        if self._first is None:
            self._first = received, sent
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": used / _MEGA,
            "system_memory_usage_percentage": 100 * used / memory.total,
            "network_receive_megabytes": (received - self._first[0]) / _MEGA,
            "network_transmit_megabytes": (sent - self._first[1]) / _MEGA,
        }


def gpu_usage() -> dict[str, float]:
    """Use of all GPUs of the node, without what a card does not report; empty where this process has no GPU."""
    if not torch.cuda.is_available():
        return {}
    import pynvml

    values: dict[str, float] = {}
    pynvml.nvmlInit()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            values |= {
                f"gpu_{index}_{name}": value for name, value in _card_usage(pynvml, card).items()
            }
    finally:
        pynvml.nvmlShutdown()
    return values


def _card_usage(nvml: Any, card: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        values["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(card).gpu)
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        memory = nvml.nvmlDeviceGetMemoryInfo(
            card, version=nvml.nvmlMemory_v2
        )  # v1 counts the driver's share as used
        values["memory_usage_megabytes"] = memory.used / _MEGA
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        milliwatts = nvml.nvmlDeviceGetPowerUsage(card)
        values["power_usage_watts"] = milliwatts / 1000
        values["power_usage_percentage"] = (
            100 * milliwatts / nvml.nvmlDeviceGetPowerManagementLimit(card)
        )
    return values
