"""Load of the machine, compared with the kernel's files, and with GPUs of a replaced NVML."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pynvml
import pytest
import torch

from hemoco.errors import TrainingError, memory_errors
from hemoco.tracking.system_metrics import HostUsage, gpu_usage

ROOT = Path(__file__).parents[3]


def test_memory_and_network_are_those_of_the_kernel():
    usage = HostUsage()
    usage()
    values = usage()
    fields = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    memory = {name: int(kilobytes) * 1024 for name, kilobytes, *_ in fields}
    used = memory["MemTotal:"] - memory["MemAvailable:"]
    assert math.isclose(values["system_memory_usage_megabytes"] * 1e6, used, rel_tol=0.3)
    assert math.isclose(
        values["system_memory_usage_percentage"], 100 * used / memory["MemTotal:"], rel_tol=0.3
    )
    assert 0 <= values["cpu_utilization_percentage"] <= 100
    # since the first call, not since the machine started
    assert 0 <= values["network_receive_megabytes"] < 1e4


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML with two cards, of which the second reports neither utilisation nor power."""

    def given(card: int, value: object) -> object:
        if card == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetUtilizationRates": lambda card: given(card, SimpleNamespace(gpu=97)),
        "nvmlDeviceGetMemoryInfo": lambda card, version: SimpleNamespace(
            used=40e9 / (card + 1), total=80e9
        ),
        "nvmlDeviceGetPowerUsage": lambda card: given(card, 350_000),
        "nvmlDeviceGetPowerManagementLimit": lambda card: given(card, 700_000),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(pynvml, name, answer)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_numbers_that_a_card_does_not_give_are_left_out(cards):
    assert gpu_usage() == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 40_000.0,
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_0_power_usage_watts": 350.0,
        "gpu_0_power_usage_percentage": 50.0,
        "gpu_1_memory_usage_megabytes": 20_000.0,
        "gpu_1_memory_usage_percentage": 25.0,
    }


def test_without_a_gpu_there_are_no_numbers_of_one():
    assert torch.cuda.is_available() or gpu_usage() == {}


def test_memory_that_runs_out_names_what_is_in_use():
    with pytest.raises(TrainingError) as raised, memory_errors(lambda: "step 7", "buy more"):
        raise MemoryError
    message = str(raised.value)
    held_gb = float(message.partition("this process holds ")[2].partition(" GB")[0])
    assert math.isclose(held_gb * 1e9, psutil.Process().memory_info().rss, rel_tol=0.3)
    assert message.endswith(" GB of the machine are free; buy more")


def test_without_psutil_the_advice_for_memory_is_given_all_the_same():
    script = (
        "import sys; sys.modules['psutil'] = None\n"
        "from hemoco.errors import *\n"
        "try:\n"
        "    with memory_errors(lambda: 'step 7', 'buy more'): raise MemoryError\n"
        "except TrainingError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "out of memory at step 7: MemoryError; the memory in use is unknown (import of psutil"
    )
    assert done.stdout.endswith("; buy more\n")
