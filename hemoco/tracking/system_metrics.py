"""Hardware of the machine that a training runs on, and its load while the training runs.

The metrics have the names of MLflow's own system metrics, so that MLflow shows them as such.
MLflow's monitor is not used: it sends by itself, and stops for good when MLflow fails to answer
once.

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
from hemoco.tracking.metric_queue import Tracker
from hemoco.tracking.runs import set_tags
from hemoco.tracking.tags import Tag
from hemoco.version import __version__

logger = logging.getLogger(__name__)

_EVERY_S = 10.0
_JOIN_S = 2.0
_MEGA = 1e6
_LOOPBACK = ("lo", "lo0")


def machine_facts() -> dict[str, str]:
    """Tags with the hardware and versions of this process; GPUs are those that it may use."""
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
    """Samples the load of this machine while the block runs. A context manager.

    Its own thread reads psutil and NVML every 10 s. The samples go through the training's tracker,
    at the last step that it logged, so that an outage of MLflow loses none. A failure of any kind
    is logged, once, and does not affect training.
    """

    def __init__(
        self, uri: str, run_id: str, tracker: Tracker, *, every_s: float = _EVERY_S
    ) -> None:
        """Creates the thread; the block starts it.

        Args:
            uri: URI of the tracking server.
            run_id: id of the training's run, which gets the facts of the machine as tags.
            tracker: tracker of the training, which receives the samples.
            every_s: seconds between two samples.
        """
        self._uri = uri
        self._run_id = run_id
        self._tracker = tracker
        self._every_s = every_s
        self._ending = threading.Event()
        self._warned = False
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
            step = self._tracker.step
            if step is not None:  # a metric needs a step, and there is none before the first
                self._tracker.log(step, {f"system/{name}": v for name, v in values.items()})
            recorded = recorded or self._record_facts()

    def _values_of(self, sources: Sequence[Callable[[], dict[str, float]]]) -> dict[str, float]:
        """Values of all sources; a source that fails is left out and logged once."""
        values: dict[str, float] = {}
        for source in sources:
            try:
                values |= source()
            except Exception as error:
                # any, as psutil, NVML and the kernel have many classes of errors
                if not self._warned:
                    logger.warning("event=system_metrics %s: %s", type(error).__name__, error)
                self._warned = True
        return values

    def _record_facts(self) -> bool:
        """Sets the facts of the machine as tags; returns whether MLflow accepted them."""
        try:
            set_tags(self._uri, self._run_id, machine_facts(), patience_s=0)
        except HemocoError as error:
            logger.debug("event=machine_facts_not_recorded %s", error)
            return False
        return True


def _cpu_model() -> str:
    with contextlib.suppress(OSError):  # psutil has no name of the model
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _disk_usage() -> dict[str, float]:
    """Use of the disk with $HEMOCO_HOME, where shards are cached."""
    # the folder itself may not exist yet
    folder = next(path for path in (home(), *home().parents) if path.exists())
    disk = shutil.disk_usage(folder)
    return {
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_usage_megabytes": disk.used / _MEGA,
        "disk_available_megabytes": disk.free / _MEGA,
    }


class HostUsage:
    """Load of CPU, memory and network; to be called repeatedly.

    CPU is measured since the previous call (the first value means nothing), network since the first
    call, memory at the time of the call.
    """

    def __init__(self) -> None:
        self._first: tuple[int, int] | None = None

    def __call__(self) -> dict[str, float]:
        """Values by their names in MLflow, without the prefix `system/`."""
        import psutil

        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        links = psutil.net_io_counters(pernic=True)
        outside = [link for name, link in links.items() if name not in _LOOPBACK]
        received = sum(link.bytes_recv for link in outside)
        sent = sum(link.bytes_sent for link in outside)
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
    """Load of all GPUs of the node; empty if this process has no GPU.

    Values that a card does not report are left out.
    """
    if not torch.cuda.is_available():
        return {}
    import pynvml

    values: dict[str, float] = {}
    pynvml.nvmlInit()
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            card = pynvml.nvmlDeviceGetHandleByIndex(index)
            for name, value in _card_usage(pynvml, card).items():
                values[f"gpu_{index}_{name}"] = value
    finally:
        pynvml.nvmlShutdown()
    return values


def _card_usage(nvml: Any, card: Any) -> dict[str, float]:
    values: dict[str, float] = {}
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        values["utilization_percentage"] = float(nvml.nvmlDeviceGetUtilizationRates(card).gpu)
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        # version 1 counts memory that is reserved for the driver as used
        memory = nvml.nvmlDeviceGetMemoryInfo(card, version=nvml.nvmlMemory_v2)
        values["memory_usage_megabytes"] = memory.used / _MEGA
        values["memory_usage_percentage"] = 100 * memory.used / memory.total
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        milliwatts = nvml.nvmlDeviceGetPowerUsage(card)
        values["power_usage_watts"] = milliwatts / 1000
        limit_milliwatts = nvml.nvmlDeviceGetPowerManagementLimit(card)
        values["power_usage_percentage"] = 100 * milliwatts / limit_milliwatts
    return values
