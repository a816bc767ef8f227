"""Settings of a run, as frozen dataclasses; a recipe imports all it needs from here.

The docstring under a field is its help text on the command line and its entry in docs/reference.
In the help each of its lines starts a new line, so lines end where sentences do.
"""

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
from hemoco.config.transfer import (
    ClassifierConfig,
    FineTuneConfig,
    KnnConfig,
    LinearClassifierConfig,
    LinearProbeConfig,
    LowShotConfig,
    TrainedConfig,
    TransferConfig,
    init_label,
    init_url,
)

__all__ = [
    "AnyTransferConfig",
    "Choice",
    "ClassifierConfig",
    "DataConfig",
    "DetectionConfig",
    "EncoderConfig",
    "FasterRcnnConfig",
    "FineTuneConfig",
    "KnnConfig",
    "LinearClassifierConfig",
    "LinearProbeConfig",
    "LogUniform",
    "LowShotConfig",
    "MaskRcnnConfig",
    "MoCoConfig",
    "MoCoV3Config",
    "OptimizerConfig",
    "PretrainConfig",
    "Recipe",
    "ResourcesConfig",
    "StreamConfig",
    "SweepConfig",
    "TrainedConfig",
    "TransferConfig",
    "Uniform",
    "ViewsConfig",
    "config_difference",
    "config_digest",
    "flat_params",
    "init_label",
    "init_url",
    "world_sizes",
]
