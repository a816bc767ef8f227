"""Settings of a run, as frozen dataclasses; a recipe imports all it needs from here.

The docstring under a field is its help text on the command line and its entry in docs/reference.
In the help each of its lines starts a new line, so lines end where sentences do.
"""

from hemoco.config import transfer
from hemoco.config.data import DataConfig, StreamConfig
from hemoco.config.detection import DetectionConfig, FasterRcnnConfig, MaskRcnnConfig
from hemoco.config.method import (
    EncoderConfig,
    MoCoConfig,
    MoCoV3Config,
    OptimizerConfig,
    ViewsConfig,
)
from hemoco.config.recipe import (
    AnyTransferConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
    world_sizes,
)
from hemoco.config.settings import config_difference, config_digest, flat_params
from hemoco.config.sweep import Choice, LogUniform, SweepConfig, Uniform

# a new transfer is added to one file of this package only: its __all__ is part of ours
from hemoco.config.transfer import *  # noqa: F403

__all__ = [
    "AnyTransferConfig",
    "Choice",
    "DataConfig",
    "DetectionConfig",
    "EncoderConfig",
    "FasterRcnnConfig",
    "LogUniform",
    "MaskRcnnConfig",
    "MoCoConfig",
    "MoCoV3Config",
    "OptimizerConfig",
    "PretrainConfig",
    "Recipe",
    "ResourcesConfig",
    "StreamConfig",
    "SweepConfig",
    "Uniform",
    "ViewsConfig",
    "config_difference",
    "config_digest",
    "flat_params",
    "world_sizes",
]
__all__ += transfer.__all__
