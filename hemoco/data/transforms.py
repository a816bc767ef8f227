"""The two views of an image (MoCo v2, Chen et al. 2020, section 2).

Loader processes crop on the CPU; the rest of the augmentation runs batched on the device.

Every random number is keyed by (seed, epoch, step, slot), so a view depends neither on the number
of ranks nor on that of loader processes. Each operation has its own columns of the draws: changing
the setting of one does not change the draws of another.

Shapes: N images, H x W an image, S x S a view.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from hemoco.config import ViewsConfig

_RATIOS = (3 / 4, 4 / 3)  # width / height of a crop, as in torchvision
_SIGMAS = (0.1, 2.0)  # pixels, as in SimCLR's blur
_SOLARIZE_FROM = 128 / 255
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as in torchvision

_DRAW_VIEWS = 2  # purpose of the draws, part of their key; data/stream/order.py uses 0 and 1
# Uniform numbers per view: columns 0 to 21 for the crop, 22 to 35 for the augmentation. A multiple
# of 4, the numbers that one Philox counter yields.
_DRAWS = 36


@dataclasses.dataclass(frozen=True)
class CropDraws:
    """Random resized crops of N images, two views each; ten tries for the size, as torchvision."""

    areas: NDArray[np.float64]
    """Area of each try, as a fraction of the image (N, 2, 10)."""
    ratios: NDArray[np.float64]
    """Width / height of each try (N, 2, 10)."""
    corners: NDArray[np.float64]
    """Top and left in [0, 1), as a fraction of the possible positions (N, 2, 2)."""


@dataclasses.dataclass(frozen=True)
class AugmentDraws:
    """Random choices for one view of N images, after it is cropped."""

    flips: NDArray[np.bool_]
    """True to mirror the image (N,)."""
    jitter: NDArray[np.bool_]
    """True to jitter the colours (N,)."""
    order: NDArray[np.int64]
    """Order of brightness (0), contrast (1), saturation (2) and hue (3), first to last (N, 4)."""
    factors: NDArray[np.float64]
    """Factors of brightness, contrast and saturation, and hue shift in whole turns (N, 4)."""
    grayscale: NDArray[np.bool_]
    """True to turn the image grey (N,)."""
    blur: NDArray[np.bool_]
    """True to blur the image (N,)."""
    sigmas: NDArray[np.float64]
    """Standard deviation of the blur in pixels (N,)."""
    solarize: NDArray[np.bool_]
    """True to solarise the image (N,)."""

    def take(self, rows: NDArray[np.int64]) -> "AugmentDraws":
        """The choices for some of the images, in the order of `rows` (n,)."""
        fields = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}
        return AugmentDraws(**fields)


def draw_crops(
    config: ViewsConfig, *, seed: int, epoch: int, step: int, slots: tuple[int, int]
) -> CropDraws:
    """Draws the crops of the slots [start, stop) of a global batch."""
    draws = _uniform(seed, epoch, step, slots)  # (N, 2, 36)
    low, high = config.crop_scale
    ratio_low, ratio_high = math.log(_RATIOS[0]), math.log(_RATIOS[1])
    return CropDraws(
        areas=low + (high - low) * draws[..., :10],
        ratios=np.exp(ratio_low + (ratio_high - ratio_low) * draws[..., 10:20]),
        corners=draws[..., 20:22],
    )


def draw_augmentation(
    config: ViewsConfig, *, seed: int, epoch: int, step: int, slots: tuple[int, int], view: int
) -> AugmentDraws:
    """Draws the augmentation of one view, 0 or 1, of the slots [start, stop) of a global batch."""
    draws = _uniform(seed, epoch, step, slots)[:, view]  # (N, 36)
    strengths = np.array([config.brightness, config.contrast, config.saturation])
    low = np.append(np.maximum(1 - strengths, 0), -config.hue)
    high = np.append(1 + strengths, config.hue)
    return AugmentDraws(
        flips=draws[:, 22] < config.flip,
        jitter=draws[:, 23] < config.jitter,
        order=np.argsort(draws[:, 24:28], axis=1),
        factors=low + (high - low) * draws[:, 28:32],
        grayscale=draws[:, 32] < config.grayscale,
        blur=draws[:, 33] < config.blur[view],
        sigmas=_SIGMAS[0] + (_SIGMAS[1] - _SIGMAS[0]) * draws[:, 34],
        solarize=draws[:, 35] < config.solarize[view],
    )


def crop_into(crops: Tensor, image: Tensor, draws: CropDraws, row: int) -> None:
    """Writes random resized crops of an image into the memory of a batch, which saves a copy.

    Args:
        crops: receives the views, uint8 (2, 3, S, S), or (1, 3, S, S) for the first view alone;
            channels last in memory.
        image: uint8 (3, H, W).
        draws: random draws for N images.
        row: index of this image among the N.
    """
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    for view in range(len(crops)):
        high, wide = _crop_size(height, width, draws.areas[row, view], draws.ratios[row, view])
        down, right = draws.corners[row, view]
        top = int(down * (height - high + 1))
        left = int(right * (width - wide + 1))
        crop = _as_batch(pixels[top : top + high, left : left + wide])  # (1, 3, high, wide)
        target = crops[view : view + 1]  # (1, 3, S, S)
        # `interpolate` calls this operator, but has no argument for the memory of the result
        torch.ops.aten._upsample_bilinear2d_aa.out(
            crop, target.shape[2:], align_corners=False, out=target
        )


def center_view(image: Tensor, size: int, shorter: int) -> Tensor:
    """The centre of an image, scaled so that its shorter side has `shorter` pixels.

    Args:
        image: uint8 (3, H, W).
        size: S.
        shorter: pixels; where it is less than S, the image is scaled to S.

    Returns:
        uint8 (3, S, S).
    """
    height, width = image.shape[1:]
    scale = shorter / min(height, width)
    high, wide = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (high - size) // 2, (wide - size) // 2
    return resize(image, (high, wide))[:, top : top + size, left : left + size]  # (3, S, S)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (3, H, W) at another (height, width): bilinear, antialiased as in Pillow."""
    batch = _as_batch(image.permute(1, 2, 0).numpy())  # (1, 3, H, W)
    return interpolate(batch, size, mode="bilinear", antialias=True)[0]


@torch.no_grad()
def augment(crops: Tensor, draws: AugmentDraws, config: ViewsConfig) -> Tensor:
    """Flip, colour jitter, greyscale, blur, solarisation and normalisation, drawn for each image.

    The operations are torchvision's on floats. Differences from the reference recipe, which runs on
    Pillow images: nothing is rounded between operations, and the blur is exactly Gaussian where
    Pillow approximates it, with its weights renormalised at the border.

    Args:
        crops: uint8 (N, 3, S, S), on the device that computes.
        draws: random draws for these N crops.

    Returns:
        float32 (N, 3, S, S), normalised.
    """
    images = crops.float().div_(255)
    _change(images, draws.flips, lambda chosen: chosen.flip(-1))
    if config.grayscale_first:
        _change(images, draws.grayscale, to_grayscale)
    _jitter(images, draws, config)
    if not config.grayscale_first:
        _change(images, draws.grayscale, to_grayscale)
    sigmas = torch.from_numpy(draws.sigmas[draws.blur]).to(images.device, torch.float32)
    _change(images, draws.blur, lambda chosen: gaussian_blur(chosen, sigmas))
    _change(images, draws.solarize, solarize)
    return normalise(images, config.mean, config.std)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Subtracts the mean and divides by the deviation of each channel, in place (N, 3, H, W)."""
    return images.sub_(_channels(mean, images)).div_(_channels(std, images))


def to_grayscale(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) with the luminance in all three channels."""
    return _luma(images).expand(-1, 3, -1, -1)


def solarize(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) in [0, 1] with all values of at least 128 / 255 inverted."""
    return torch.where(images >= _SOLARIZE_FROM, 1 - images, images)


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Blurred images (N, 3, S, S), each by its own sigma in pixels (N,).

    Weights are renormalised at the border.
    """
    positions = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    distances = (positions[:, None] - positions[None, :]).square()  # (S, S)
    # The blur is a product with an S x S matrix on each side: one kernel launch for all sigmas,
    # faster than a grouped convolution with 3 N groups.
    kernels = (-distances / (2 * sigmas.square()[:, None, None])).softmax(dim=-1)  # (N, S, S)
    rows = images.flatten(1, 2) @ kernels.transpose(1, 2)  # (N, 3 S, S)
    return kernels[:, None] @ rows.view_as(images)  # (N, 3, S, S)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) times a factor each (N,), clamped to [0, 1]."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) with their distance from their mean grey scaled by a factor each (N,)."""
    means = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(means, images, factors[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) with their distance from their greyscale scaled by a factor each (N,)."""
    return torch.lerp(_luma(images), images, factors[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) with their HSV hue rotated by a shift each (N,), in whole turns."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)  # (N, S, S)
    chroma = value - images.amin(1)  # (N, S, S)
    divisor = torch.where(chroma == 0, 1, chroma)
    # hue in sixths of a turn, by the channel that is largest
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = hue + 6 * factors[:, None, None]
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device)[:, None, None]
    sector = (hue[:, None] + offsets).remainder_(6)  # (N, 3, S, S)
    weight = torch.minimum(sector, 4 - sector).clamp_(0, 1)
    return value[:, None] - chroma[:, None] * weight


_ADJUSTMENTS = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def _jitter(images: Tensor, draws: AugmentDraws, config: ViewsConfig) -> None:
    strengths = (config.brightness, config.contrast, config.saturation, config.hue)
    for turn in range(4):
        for number, adjust in enumerate(_ADJUSTMENTS):
            chosen = draws.jitter & (draws.order[:, turn] == number)
            factors = torch.from_numpy(draws.factors[chosen, number])
            factors = factors.to(images.device, torch.float32)
            if strengths[number] > 0:
                _change(images, chosen, functools.partial(adjust, factors=factors))


def _change(images: Tensor, chosen: NDArray[np.bool_], change: Callable[[Tensor], Tensor]) -> None:
    """Applies a function to the chosen images (N,), in place."""
    if chosen.any():
        # `chosen` lies on the CPU: a mask on the device would wait for the device to be counted
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
        images.index_copy_(0, rows, change(images.index_select(0, rows)))


def _luma(images: Tensor) -> Tensor:
    """Grey (N, 1, S, S) of RGB (N, 3, S, S)."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]


def _uniform(seed: int, epoch: int, step: int, slots: tuple[int, int]) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) for two views of the slots [start, stop), (N, 2, 36).

    Philox is a counter-based generator. Each slot starts at a counter of its own, so its numbers do
    not depend on which other slots are drawn with it.
    """
    start, stop = slots
    key = np.random.SeedSequence([seed, epoch, step, _DRAW_VIEWS]).generate_state(2, np.uint64)
    philox = np.random.Philox(key=key, counter=start * 2 * _DRAWS // 4)
    return np.random.Generator(philox).random((stop - start, 2, _DRAWS))


def _crop_size(
    height: int, width: int, areas: NDArray[np.float64], ratios: NDArray[np.float64]
) -> tuple[int, int]:
    """Height and width of the first try that fits into the image, as torchvision chooses them.

    If none fits, the largest central crop with an allowed aspect ratio.
    """
    for area, ratio in zip(areas.tolist(), ratios.tolist(), strict=True):
        pixels = area * height * width
        high, wide = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < high <= height and 0 < wide <= width:
            return high, wide
    # the whole image, with its longer side cut to the narrowest or widest allowed ratio
    return min(height, round(width / _RATIOS[0])), min(width, round(height * _RATIOS[1]))


def _as_batch(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels (H, W, 3) as a batch of one image (1, 3, H, W), channels last in memory.

    torch's fast uint8 kernels require that layout. They detect it by the strides, which
    `image[None]` of a permuted image would not show.
    """
    # a crop is not contiguous; NumPy copies it in half the time that torch takes
    return torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
