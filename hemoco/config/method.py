"""The settings of the method: views, encoder, loss, optimiser. `hemoco.config` has the rest of a run and these, too."""

import dataclasses
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Augmentation of the two views (MoCo v2, Chen et al. 2020, section 2; pairs are query and key view)."""

    size: int = 224
    """Side of a view in pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Area of a random resized crop as a fraction of the image."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Strength: factor drawn from [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Strength: factor drawn from [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Strength: factor drawn from [1 - s, 1 + s]."""
    hue: float = 0.1
    """Strength: shift drawn from [-h, h] turns of the colour circle."""
    grayscale: float = 0.2
    """Probability of conversion to grey."""
    grayscale_first: bool = False
    """Convert to grey before the colour jitter, as MoCo v1."""
    blur: tuple[float, float] = (0.5, 0.5)
    """Probability of Gaussian blur in the first and the second view, sigma drawn from [0.1, 2] pixels."""
    solarize: tuple[float, float] = (0.0, 0.0)
    """Probability of inverting all values from 128 up, in the first and the second view."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted per channel, images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divided by per channel."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(self.size >= 8, f"views.size is {self.size}: it must be at least 8 pixels")
        require(
            0 < low <= high <= 1,
            f"views.crop_scale is {self.crop_scale}: it must satisfy 0 < low <= high <= 1",
        )
        for name in ("jitter", "grayscale", "flip", "blur", "solarize"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            require(
                all(0 <= v <= 1 for v in values),
                f"views.{name} is {value}: a probability must be in [0, 1]",
            )
        require(0 <= self.hue <= 0.5, f"views.hue is {self.hue}: it must be in [0, 0.5]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The ResNet, by its timm name, and how its weights begin."""

    architecture: str = "resnet50"
    """A timm ResNet: resnet10t, resnet18, resnet50, wide_resnet50_2, ..."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`small`: 3x3 convolution of stride 1 and no max-pooling, for images of 32 pixels."""
    shortcuts: bool = True
    """The identity in each block; without it the plain network of He et al. 2016, section 3.3."""
    zero_init_last: bool = False
    """Start the last BN of each residual block at zero."""
    init: Literal["kaiming", "xavier"] = "kaiming"
    """Normal weights of the convolutions: He et al. 2015 (section 2.2), or Glorot and Bengio 2010."""
    fan_mode: Literal["fan_in", "fan_out"] = "fan_out"
    """Kaiming only: keep the variance of the activations (fan_in) or of the gradients (fan_out)."""
    nonlinearity: Literal["relu", "linear"] = "relu"
    """Kaiming only: relu doubles the variance of the weights, as half of the activations are cut off."""

    def __post_init__(self) -> None:
        require(
            self.shortcuts or not self.zero_init_last,
            "encoder.zero_init_last is True: without shortcuts it would make every block constant; set it to False",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """MoCo v1 and v2 (He et al. 2020, section 3; Chen et al. 2020): a queue of keys."""

    embedding_size: int = 128
    """C, size of a query or key."""
    head: Literal["linear", "mlp", "mlp_bn"] = "mlp"
    """Projection head: v1 linear, v2 mlp; mlp_bn adds batch normalisation after the hidden layer."""
    queue_length: int = 65536
    """K, number of queued negatives."""
    momentum: float = 0.999
    """m of the key encoder's moving average."""
    temperature: float = 0.2
    """T of the InfoNCE loss."""
    bn_group_size: int = 32
    """Images that share batch statistics; keys are shuffled over the global batch before they are grouped."""

    def __post_init__(self) -> None:
        require_positive(self, "moco", "queue_length")
        require(0 <= self.momentum <= 1, f"moco.momentum is {self.momentum}: it must be in [0, 1]")
        require_positive(self, "moco", "temperature")
        require(
            self.bn_group_size >= 2,
            f"moco.bn_group_size is {self.bn_group_size}: it must be at least 2",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoV3Config:
    """MoCo v3 (Chen, Xie, He 2021): the keys of the batch, both ways, and a predictor; SyncBN over all workers."""

    embedding_size: int = 256
    """C, size of a query or key."""
    hidden_size: int = 4096
    """Width of the hidden layers of projector and predictor."""
    momentum: float = 0.99
    """m of the key encoder's moving average at the first step; a half cosine takes it to 1 at the last."""
    temperature: float = 1.0
    """T of the InfoNCE loss."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum <= 1, f"moco.momentum is {self.momentum}: it must be in [0, 1]")
        require_positive(self, "moco", "embedding_size", "hidden_size", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum and weight decay on all parameters (v1, v2), or LARS (v3)."""

    kind: Literal["sgd", "lars"] = "sgd"
    """`lars` (You et al. 2017): biases and normalisation layers take plain steps without weight decay."""
    lr: float = 0.03
    """Learning rate at this recipe's global batch size."""
    momentum: float = 0.9
    """No Nesterov."""
    weight_decay: float = 1e-4
    """SGD: on all parameters, BN and biases included."""
    trust: float = 0.001
    """LARS only: length of a step relative to that of the parameter."""
    schedule: Literal["cosine", "cosine_per_step", "step"] = "cosine"
    """`cosine` to 0, set once per epoch or per step, or `step`: x0.1 at 60% and 80% of the epochs."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up from 0, set per step."""

    def __post_init__(self) -> None:
        require_positive(self, "optimizer", "lr", "trust")
        require_not_negative(self, "optimizer", "weight_decay", "warmup_epochs")
        require(
            0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: it must be in [0, 1)"
        )
