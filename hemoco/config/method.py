"""Config classes for the method: views, encoder, loss, optimiser; `hemoco.config` re-exports them.

Defaults are those of MoCo v2 on ImageNet (docs/official-recipes.md) unless a field says otherwise.
"""

import dataclasses
from typing import Literal

from hemoco.config.checks import require, require_not_negative, require_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Augmentation of the two views of an image (MoCo v2: Chen et al. 2020, arXiv:2003.04297).

    A pair of values is for the first view (query) and the second view (key). The defaults are those
    of v2 on ImageNet; docs/official-recipes.md lists those of v1 and v3.
    """

    size: int = 224
    """Side of a view, pixels."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a random resized crop, as a share of the image."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    brightness: float = 0.4
    """Strength b of the jitter: brightness is multiplied by a factor from [1 - b, 1 + b]."""
    contrast: float = 0.4
    """Strength c of the jitter: contrast is multiplied by a factor from [1 - c, 1 + c]."""
    saturation: float = 0.4
    """Strength s of the jitter: saturation is multiplied by a factor from [1 - s, 1 + s]."""
    hue: float = 0.1
    """Strength h of the jitter: hue is shifted by [-h, h] turns of the colour circle; h <= 0.5."""
    grayscale: float = 0.2
    """Probability of conversion to grey."""
    grayscale_first: bool = False
    """Convert to grey before the colour jitter, as MoCo v1 does, instead of after it."""
    blur: tuple[float, float] = (0.5, 0.5)
    """Probability of Gaussian blur in the first and in the second view.
    Sigma is drawn from [0.1, 2] pixels."""
    solarize: tuple[float, float] = (0.0, 0.0)
    """Probability of solarisation in the first and in the second view; used by MoCo v3.
    Values of 128 and above, of 255, are inverted."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of each channel (RGB in [0, 1]), subtracted from every image; that of ImageNet."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of each channel, by which every image is divided; that of ImageNet."""

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        require(self.size >= 8, f"views.size is {self.size}: it must be at least 8 pixels")
        require(
            0 < low <= high <= 1,
            f"views.crop_scale is {self.crop_scale}: it must satisfy 0 < low <= high <= 1",
        )
        for name in ("jitter", "grayscale", "flip", "blur", "solarize"):
            value = getattr(self, name)
            probabilities = value if isinstance(value, tuple) else (value,)
            require(
                all(0 <= probability <= 1 for probability in probabilities),
                f"views.{name} is {value}: a probability must be in [0, 1]",
            )
        require(0 <= self.hue <= 0.5, f"views.hue is {self.hue}: it must be in [0, 0.5]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The ResNet and its initial weights."""

    architecture: str = "resnet50"
    """Name of a ResNet in timm: resnet10t, resnet18, resnet50, wide_resnet50_2, ..."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """`imagenet`: 7x7 convolution of stride 2, then max-pooling.
    `small`: 3x3 convolution of stride 1 without max-pooling, for images of about 32 pixels."""
    shortcuts: bool = True
    """Add the input of each block to its output.
    Without it the network is the plain one of He et al. 2016 (arXiv:1512.03385), section 3.3."""
    zero_init_last: bool = False
    """Start with 0 as the scale of the last BN of each residual block, as MoCo v3 does."""
    init: Literal["kaiming", "xavier"] = "kaiming"
    """Variance of the initial weights of convolutions, which are normal.
    That of He et al. 2015 (arXiv:1502.01852, section 2.2), or of Glorot and Bengio 2010."""
    fan_mode: Literal["fan_in", "fan_out"] = "fan_out"
    """Kaiming only: keep the variance of activations (`fan_in`) or of gradients (`fan_out`).
    The default is that of torchvision's ResNets."""
    nonlinearity: Literal["relu", "linear"] = "relu"
    """Kaiming only: `relu` doubles the variance of the weights.
    ReLU cuts off half of the activations."""

    def __post_init__(self) -> None:
        require(
            self.shortcuts or not self.zero_init_last,
            "encoder.zero_init_last is True: without shortcuts it would make every block constant; "
            "set it to False",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """MoCo v1 and v2, with a queue of keys as negatives.

    He et al. 2020 (arXiv:1911.05722), section 3; Chen et al. 2020 (arXiv:2003.04297), section 2.
    """

    embedding_size: int = 128
    """C, components of a query or key."""
    head: Literal["linear", "mlp", "mlp_bn"] = "mlp"
    """Projection head: `linear` in v1, `mlp` in v2; `mlp_bn` adds BN after the hidden layer."""
    queue_length: int = 65536
    """K, number of keys in the queue, which are the negatives.
    Must be a multiple of the global batch size; at most a quarter of the data set is advised."""
    momentum: float = 0.999
    """m of the key encoder's moving average, in [0, 1]: key = m * key + (1 - m) * query.
    Its time constant is 1 / (1 - m) steps; a short training needs a lower m."""
    temperature: float = 0.2
    """T of the InfoNCE loss; 0.07 in v1."""
    bn_group_size: int = 32
    """Images that share BN statistics, at least 2.
    The default is that of the papers, which have 32 images on each of 8 GPUs.
    Keys are shuffled over the global batch before they are grouped."""

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
    """MoCo v3 (Chen, Xie, He 2021, arXiv:2104.02057), whose negatives are the keys of the batch.

    The loss is symmetric, a predictor follows the query encoder, and BN is synchronised over all
    workers. Defaults are those for a ResNet-50 trained for 100 or 300 epochs.
    """

    embedding_size: int = 256
    """C, components of a query or key."""
    hidden_size: int = 4096
    """D, width of the hidden layers of projector and predictor."""
    momentum: float = 0.99
    """m of the key encoder's moving average at the first step, in [0, 1].
    It rises to 1 along half a cosine until the last step; 0.996 for 1000 epochs."""
    temperature: float = 1.0
    """T of the InfoNCE loss."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum <= 1, f"moco.momentum is {self.momentum}: it must be in [0, 1]")
        require_positive(self, "moco", "embedding_size", "hidden_size", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD with momentum (MoCo v1 and v2), or LARS (v3)."""

    kind: Literal["sgd", "lars"] = "sgd"
    """`sgd`, or `lars` (You et al. 2017, arXiv:1708.03888).
    LARS applies neither weight decay nor scaling to biases and normalisation layers."""
    lr: float = 0.03
    """Learning rate at this global batch size; it is not scaled.
    The papers scale it linearly with the batch: 0.03 is for 256 images."""
    momentum: float = 0.9
    """Momentum, in [0, 1); not Nesterov."""
    weight_decay: float = 1e-4
    """L2 penalty; with SGD on all parameters, BN and biases included, as in the official code."""
    trust: float = 0.001
    """LARS only: norm of a scaled gradient relative to that of its parameter."""
    schedule: Literal["cosine", "cosine_per_step", "step"] = "cosine"
    """`cosine`: half a cosine to 0, set once per epoch (v2).
    `cosine_per_step`: half a cosine to 0, set at every step (v3).
    `step`: x0.1 at 60% and again at 80% of the epochs (v1)."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate grows linearly from 0, set at every step; v3 has 10."""

    def __post_init__(self) -> None:
        require_positive(self, "optimizer", "lr", "trust")
        require_not_negative(self, "optimizer", "weight_decay", "warmup_epochs")
        require(
            0 <= self.momentum < 1, f"optimizer.momentum is {self.momentum}: it must be in [0, 1)"
        )
