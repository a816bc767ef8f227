"""The two views of an image (MoCo v2, Chen et al. 2020, section 2): cropped on the CPU, the rest batched on the device.

Every random number is keyed by (seed, epoch, step, slot): a view depends neither on ranks nor on loader processes, and
a setting changed does not shift the draws of another.

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

_RATIOS = (3 / 4, 4 / 3)  # width / height of a crop, as torchvision
_SIGMAS = (0.1, 2.0)  # pixels, SimCLR's blur
_VIEWS = 2  # purpose of the draws, part of their key; those of the order have others
_DRAWS = 36  # uniform numbers per view; a multiple of 4, what one Philox counter gives
_SOLARIZE_FROM = 128 / 255
_LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601-2, as torchvision


@dataclasses.dataclass(frozen=True)
class CropDraws:
    """Random resized crops of N images, two views each."""

    areas: NDArray[np.float64]
    """Tried areas as a fraction of the image (N, 2, 10)."""
    ratios: NDArray[np.float64]
    """Tried width / height (N, 2, 10)."""
    corners: NDArray[np.float64]
    """Top and left in [0, 1) of the room there is (N, 2, 2)."""


@dataclasses.dataclass(frozen=True)
class AugmentDraws:
    """What happens to one view of N images after it is cropped."""

    flips: NDArray[np.bool_]
    """Whether left and right are swapped (N,)."""
    jitter: NDArray[np.bool_]
    """Whether the colours are jittered (N,)."""
    order: NDArray[np.int64]
    """Which of brightness 0, contrast 1, saturation 2, hue 3 comes first to last (N, 4)."""
    factors: NDArray[np.float64]
    """Brightness, contrast and saturation factor, hue shift in turns (N, 4)."""
    grayscale: NDArray[np.bool_]
    """(N,)."""
    blur: NDArray[np.bool_]
    """(N,)."""
    sigmas: NDArray[np.float64]
    """Of the blur, pixels (N,)."""
    solarize: NDArray[np.bool_]
    """(N,)."""

    def take(self, rows: NDArray[np.int64]) -> "AugmentDraws":
        """Those of some of the images, in the order of `rows` (n,)."""
        fields = {field.name: getattr(self, field.name)[rows] for field in dataclasses.fields(self)}
        return AugmentDraws(**fields)


def draw_crops(
    config: ViewsConfig, *, seed: int, epoch: int, step: int, slots: tuple[int, int]
) -> CropDraws:
    """The crops of the slots [first, last) of a global batch."""
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
    """What follows the crops of one view, 0 or 1, of the slots [first, last) of a global batch."""
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
    """Random resized crops of an image, written where they belong: that saves a copy of each.

    Args:
        crops: receives the views, uint8 (2, 3, S, S), or (1, 3, S, S) for the first alone; channels last in memory.
        image: uint8 (3, H, W).
        draws: of several images.
        row: which of the draws' images this is.
    """
    height, width = image.shape[1:]
    pixels = image.permute(1, 2, 0).numpy()  # (H, W, 3)
    for view in range(len(crops)):
        areas, ratios, corner = (
            draws.areas[row, view],
            draws.ratios[row, view],
            draws.corners[row, view],
        )
        high, wide = _crop_size(height, width, areas, ratios)
        top, left = int(corner[0] * (height - high + 1)), int(corner[1] * (width - wide + 1))
        batch, target = (
            _as_batch(pixels[top : top + high, left : left + wide]),
            crops[view : view + 1],
        )
        # what `interpolate` calls, which cannot be given a target
        torch.ops.aten._upsample_bilinear2d_aa.out(
            batch, target.shape[2:], align_corners=False, out=target
        )


def center_view(image: Tensor, size: int, shorter: int) -> Tensor:
    """The middle of an image scaled so that its shorter side is `shorter`: uint8 (3, H, W) -> (3, S, S)."""
    height, width = image.shape[1:]
    scale = shorter / min(height, width)
    high, wide = max(size, round(height * scale)), max(size, round(width * scale))
    top, left = (high - size) // 2, (wide - size) // 2
    return resize(image, (high, wide))[:, top : top + size, left : left + size]


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 image (3, H, W) at another height and width: bilinear and antialiased, as Pillow does it."""
    batch = _as_batch(image.permute(1, 2, 0).numpy())
    return interpolate(batch, size, mode="bilinear", antialias=True)[0]


@torch.no_grad()
def augment(crops: Tensor, draws: AugmentDraws, config: ViewsConfig) -> Tensor:
    """Flip, colour jitter, greyscale, blur, solarisation and normalisation, each image with its own draws.

    The operations are torchvision's on floats: unlike on Pillow images nothing is rounded in between. The blur is
    exactly Gaussian where the reference recipe has Pillow's approximation, and at the border its weights are
    renormalised.

    Args:
        crops: uint8 (N, 3, S, S), on the device that computes.
        draws: of these N crops.

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
    """Images in [0, 1] (N, 3, H, W) minus the mean, over the standard deviation of each channel; in place."""
    return images.sub_(_channels(mean, images)).div_(_channels(std, images))


def to_grayscale(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) with their luminance in all channels."""
    return _luma(images).expand(-1, 3, -1, -1)


def solarize(images: Tensor) -> Tensor:
    """Images (N, 3, S, S) whose values from 128 of 255 up are inverted."""
    return torch.where(images >= _SOLARIZE_FROM, 1 - images, images)


def gaussian_blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Images (N, 3, S, S) blurred, each with its own sigma in pixels (N,); weights renormalised at the border."""
    place = torch.arange(images.shape[-1], device=images.device, dtype=images.dtype)
    distances = (place[:, None] - place[None, :]).square()  # (S, S)
    # as a product with a banded matrix: one kernel for all sigmas, faster than grouped convolutions of 3 N kernels
    kernels = (-distances / (2 * sigmas.square()[:, None, None])).softmax(dim=-1)  # (N, S, S)
    rows = images.flatten(1, 2) @ kernels.transpose(1, 2)  # (N, 3 S, S)
    return kernels[:, None] @ rows.view_as(images)  # (N, 3, S, S)


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) times a factor each (N,), at most 1."""
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) moved from their mean grey by a factor each (N,)."""
    means = _luma(images).mean(dim=(1, 2, 3), keepdim=True)
    return torch.lerp(means, images, factors[:, None, None, None]).clamp_(0, 1)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) moved from their own grey by a factor each (N,)."""
    return torch.lerp(_luma(images), images, factors[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: Tensor, factors: Tensor) -> Tensor:
    """Images (N, 3, S, S) with their HSV hue turned by a shift each (N,), in whole turns."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)  # (N, S, S)
    chroma = value - images.amin(1)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = (
        torch.where(value == red, (green - blue) / safe, hue) + 6 * factors[:, None, None]
    )  # sixths of a turn
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
            factors = torch.from_numpy(draws.factors[chosen, number]).to(
                images.device, torch.float32
            )
            if strengths[number] > 0:
                _change(images, chosen, functools.partial(adjust, factors=factors))


def _change(images: Tensor, chosen: NDArray[np.bool_], how: Callable[[Tensor], Tensor]) -> None:
    """Changes the chosen images (N,) in place."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
        images.index_copy_(0, rows, how(images.index_select(0, rows)))


def _luma(images: Tensor) -> Tensor:
    """Grey (N, 1, S, S) of RGB (N, 3, S, S)."""
    red, green, blue = images.unbind(1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])[:, None]


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None, None]


def _uniform(seed: int, epoch: int, step: int, slots: tuple[int, int]) -> NDArray[np.float64]:
    """Numbers in [0, 1) for two views of each slot (N, 2, 36), whoever asks for which slots."""
    first, last = slots
    key = np.random.SeedSequence([seed, epoch, step, _VIEWS]).generate_state(2, np.uint64)
    counter = first * 2 * _DRAWS // 4
    draws = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(
        (last - first, 2, _DRAWS)
    )
    return draws


def _crop_size(
    height: int, width: int, areas: NDArray[np.float64], ratios: NDArray[np.float64]
) -> tuple[int, int]:
    """Height and width of the first try that fits, else of the largest central crop of an allowed ratio."""
    for area, ratio in zip(areas.tolist(), ratios.tolist(), strict=True):
        pixels = area * height * width
        high, wide = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
        if 0 < high <= height and 0 < wide <= width:
            return high, wide
    # none fits: the whole image, its longer side cut to the widest or highest allowed ratio
    return min(height, round(width / _RATIOS[0])), min(width, round(height * _RATIOS[1]))


def _as_batch(pixels: NDArray[np.uint8]) -> Tensor:
    """Pixels (H, W, 3) as a batch of one (1, 3, H, W), channels last as torch's fast uint8 kernels want it."""
    # numpy copies a crop in half of torch's time; torch knows the layout by strides that image[None] does not show
    return torch.from_numpy(np.ascontiguousarray(pixels))[None].permute(0, 3, 1, 2)
