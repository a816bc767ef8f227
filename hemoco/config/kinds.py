"""Names of methods and transfers, as they are recorded with a run.

They are written down so that no reader has to infer them from a run's settings.
"""

import re
from typing import Literal

from hemoco.config.method import MoCoConfig, MoCoV3Config
from hemoco.config.transfer import TransferConfig

MethodName = Literal["moco_v1", "moco_v2", "moco_v3"]


def method_name(moco: MoCoConfig | MoCoV3Config) -> MethodName:
    """Name of the method; v1 and v2 differ in the projection head."""
    if isinstance(moco, MoCoV3Config):
        return "moco_v3"
    return "moco_v1" if moco.head == "linear" else "moco_v2"


def transfer_kind(config: TransferConfig) -> str:
    """Kind of a transfer, from the name of its class: `linear_probe` for `LinearProbeConfig`."""
    name = type(config).__name__.removesuffix("Config")
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
