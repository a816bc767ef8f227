import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import functional
from torchvision.transforms.v2 import RandomResizedCrop

from hemoco.config import ViewsConfig
from hemoco.data import transforms as views
from hemoco.data.decode import decode_image

ODD = Path(__file__).parents[2] / "data" / "odd"
PLAIN = ViewsConfig(size=32, jitter=0, grayscale=0, blur=(0, 0), mean=(0, 0, 0), std=(1, 1, 1))
AT = {"seed": 3, "epoch": 1, "step": 5}


def odd(name: str) -> Tensor:
    return decode_image((ODD / name).read_bytes())


def two_crops(image: Tensor, draws: views.CropDraws) -> Tensor:
    crops = torch.empty((2, 64, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    views.crop_into(crops, image, draws, 0)
    return crops


def images(count: int, size: int = 32) -> Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, size, size),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.uint8,
    )


def colours(count: int, **changed: NDArray[Any]) -> views.AugmentDraws:
    neutral = {
        "flips": np.zeros(count, bool),
        "jitter": np.zeros(count, bool),
        "order": np.tile(np.arange(4), (count, 1)),
        "factors": np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        "grayscale": np.zeros(count, bool),
        "blur": np.zeros(count, bool),
        "sigmas": np.ones(count),
        "solarize": np.zeros(count, bool),
    }
    return views.AugmentDraws(**(neutral | changed))


@pytest.mark.parametrize(
    "draw", [views.draw_crops, functools.partial(views.draw_augmentation, view=1)]
)
def test_slots_of_ranks_together_draw_what_the_whole_batch_draws(draw: Any) -> None:
    whole = draw(ViewsConfig(), **AT, slots=(0, 12))
    parts = [draw(ViewsConfig(), **AT, slots=slots) for slots in ((0, 5), (5, 6), (6, 12))]
    for field in dataclasses.fields(whole):
        values = [getattr(drawn, field.name) for drawn in (whole, *parts)]
        assert np.array_equal(np.concatenate(values[1:]), values[0])


def test_draws_of_some_images_are_theirs_in_the_order_asked_for() -> None:
    whole = views.draw_augmentation(ViewsConfig(), **AT, slots=(0, 12), view=0)
    some = whole.take(np.array([7, 2]))
    for field in dataclasses.fields(whole):
        assert np.array_equal(getattr(some, field.name), getattr(whole, field.name)[[7, 2]])


def test_draws_differ_between_views_slots_steps_and_epochs() -> None:
    keys = [AT, AT | {"step": 6}, AT | {"epoch": 2}, AT | {"seed": 4}]
    drawn = [views.draw_crops(ViewsConfig(), **key, slots=(0, 50)).corners.ravel() for key in keys]
    assert len(np.unique(drawn)) == 4 * 50 * 2 * 2
    sigmas = [
        views.draw_augmentation(ViewsConfig(), **AT, slots=(0, 50), view=view).sigmas
        for view in range(2)
    ]
    assert len(np.unique(sigmas)) == 100


def test_rates_and_ranges_are_those_of_the_config() -> None:
    config = ViewsConfig(blur=(0.5, 0.1), solarize=(0.0, 0.2))
    draws, key_draws = (
        views.draw_augmentation(config, **AT, slots=(0, 10_000), view=view) for view in range(2)
    )
    rates = [
        (draws.jitter, 0.8),
        (draws.grayscale, 0.2),
        (draws.flips, 0.5),
        (key_draws.flips, 0.5),
    ]
    rates += [
        (draws.blur, 0.5),
        (key_draws.blur, 0.1),
        (draws.solarize, 0),
        (key_draws.solarize, 0.2),
    ]
    for drawn, rate in rates:
        assert abs(drawn.mean() - rate) < 0.015  # three standard deviations
    assert np.allclose(draws.factors.min(0), [0.6, 0.6, 0.6, -0.1], atol=1e-3)
    assert np.allclose(draws.factors.max(0), [1.4, 1.4, 1.4, 0.1], atol=1e-3)
    assert np.allclose([draws.sigmas.min(), draws.sigmas.max()], [0.1, 2.0], atol=2e-3)
    orders = np.unique(draws.order, axis=0, return_counts=True)[1]
    assert len(orders) == 24 and orders.min() > 300


def test_crop_boxes_are_distributed_as_torchvision_draws_them() -> None:
    draws = views.draw_crops(ViewsConfig(), **AT, slots=(0, 1000))
    ours = [
        views._crop_size(300, 500, draws.areas[row, 0], draws.ratios[row, 0]) for row in range(1000)
    ]
    torch.manual_seed(0)
    theirs = RandomResizedCrop(32, scale=(0.2, 1.0))
    image = torch.empty(3, 300, 500)
    drawn = [theirs.make_params([image]) for _ in range(1000)]
    reference = np.array([(params["height"], params["width"]) for params in drawn])
    assert np.allclose(np.mean(ours, 0), reference.mean(0), rtol=0.04)
    assert np.allclose(np.std(ours, 0), reference.std(0), rtol=0.1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 2000), (1, 1)), ((2000, 1), (1, 1)), ((10, 100), (10, 13)), ((100, 10), (13, 10))],
)
def test_images_too_narrow_for_any_try_get_the_central_crop(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert views._crop_size(*size, np.full(10, 1.0), np.full(10, 1.0)) == expected


def test_crops_are_resized_as_pillow_does() -> None:
    picture = Image.open(ODD / "pillow/flower.jpg")
    draws = views.draw_crops(ViewsConfig(), **AT, slots=(0, 1))
    draws = dataclasses.replace(draws, corners=np.zeros((1, 2, 2)))
    crops = two_crops(odd("pillow/flower.jpg"), draws)
    for view in range(2):
        high, wide = views._crop_size(360, 480, draws.areas[0, view], draws.ratios[0, view])
        expected = picture.crop((0, 0, wide, high)).resize((64, 64), Image.Resampling.BILINEAR)
        reference = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert (crops[view].int() - reference.int()).abs().max() <= 2


def test_crops_do_not_depend_on_the_layout_of_the_image() -> None:
    image, draws = odd("pillow/flower.jpg"), views.draw_crops(ViewsConfig(), **AT, slots=(0, 1))
    assert torch.equal(two_crops(image.contiguous(), draws), two_crops(image, draws))


@pytest.mark.parametrize("number", range(4))
def test_each_adjustment_equals_torchvision(number: int) -> None:
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    batch = images(6).float() / 255
    batch[0] = 0.5  # grey: no hue
    factors = (
        torch.tensor([-0.1, -0.05, 0.0, 0.02, 0.1, 0.5])
        if number == 3
        else torch.linspace(0.6, 1.4, 6)
    )
    ours = getattr(views, names[number])(batch, factors)
    theirs = [
        getattr(functional, names[number])(x, float(f)) for x, f in zip(batch, factors, strict=True)
    ]
    assert torch.allclose(ours, torch.stack(theirs), atol=2e-5)


def test_jitter_takes_each_sample_in_its_own_order() -> None:
    batch, config = images(24), dataclasses.replace(PLAIN, jitter=0.8)
    draws = views.draw_augmentation(ViewsConfig(blur=(0, 0)), **AT, slots=(0, 24), view=0)
    draws = dataclasses.replace(draws, grayscale=np.zeros(24, bool), flips=np.zeros(24, bool))
    out = views.augment(batch, draws, config)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for row in range(24):
        expected = batch[row].float() / 255
        for op in draws.order[row] if draws.jitter[row] else ():
            expected = getattr(functional, names[op])(expected, float(draws.factors[row, op]))
        assert torch.allclose(out[row], expected, atol=1e-4)


def test_blur_is_gaussian_with_each_sample_its_sigma() -> None:
    batch, sigmas = images(5, 48).float(), [0.1, 0.5, 1.0, 1.7, 2.0]
    ours = views.gaussian_blur(batch, torch.tensor(sigmas))
    theirs = torch.stack(
        [functional.gaussian_blur(x, [31, 31], [s, s]) for x, s in zip(batch, sigmas, strict=True)]
    )
    inside = slice(12, -12)  # at the border the paddings differ
    assert torch.allclose(ours[..., inside, inside], theirs[..., inside, inside], atol=1e-2)
    assert torch.allclose(
        views.gaussian_blur(torch.ones(1, 3, 16, 16), torch.tensor([2.0])), torch.ones(1, 3, 16, 16)
    )


def test_blur_is_pillows_to_a_grey_level_and_a_half() -> None:
    image = views.center_view(odd("pillow/flower.jpg"), 224, 224)
    ours = views.gaussian_blur(image[None].float(), torch.tensor([1.0]))[0]
    blurred = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(1.0))
    assert (ours - torch.from_numpy(np.array(blurred)).permute(2, 0, 1)).abs().mean() < 1.5


def test_real_images_come_out_about_standardised() -> None:
    names = ("pillow/flower.jpg", "pillow/hopper.jpg")
    crops = torch.stack([views.center_view(odd(name), 96, 96) for name in names for _ in range(16)])
    draws = views.draw_augmentation(ViewsConfig(size=96), **AT, slots=(0, len(crops)), view=0)
    out = views.augment(crops, draws, ViewsConfig(size=96))
    assert out.mean().abs() < 0.6 and 0.6 < out.std() < 1.4  # two photos are not ImageNet
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    plain = views.augment(
        red, colours(1), dataclasses.replace(PLAIN, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.5))
    )
    torch.testing.assert_close(plain[0, :, 0, 0], torch.tensor([5.0, -2.0, -0.6]))


def test_only_the_drawn_samples_are_changed() -> None:
    batch, first, second, third, fourth = images(5), *np.eye(5, dtype=bool)[:4]
    draws = colours(5, grayscale=first, blur=second, flips=third, solarize=fourth)
    out = views.augment(batch, draws, PLAIN)
    plain = batch.float() / 255
    assert torch.allclose(out[3], functional.solarize(batch[3], 128).float() / 255, atol=1e-6)
    assert torch.allclose(out[0], functional.rgb_to_grayscale(plain[0], 3), atol=1e-6)
    assert torch.equal(out[2], functional.hflip(plain[2]))
    assert torch.equal(out[4], plain[4]) and not torch.equal(out[1], plain[1])


@pytest.mark.parametrize("first", [False, True])
def test_grey_comes_before_or_after_the_jitter(first: bool) -> None:
    config = dataclasses.replace(PLAIN, jitter=1.0, grayscale_first=first)
    every, factors = np.ones(2, bool), np.tile([1.0, 1.0, 1.0, 0.3], (2, 1))
    out = views.augment(
        images(2), colours(2, jitter=every, grayscale=every, factors=factors), config
    )
    plain = images(2).float() / 255
    turned = plain if first else functional.adjust_hue(plain, 0.3)  # grey has no hue to turn
    assert torch.allclose(out, functional.rgb_to_grayscale(turned, 3), atol=1e-4)


def test_normalisation_is_torchvisions_and_the_crops_stay_untouched() -> None:
    config = dataclasses.replace(PLAIN, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    batch = images(2)
    before = batch.clone()
    expected = functional.normalize(batch.float() / 255, config.mean, config.std)
    assert torch.allclose(views.augment(batch, colours(2), config), expected, atol=1e-6)
    assert torch.equal(batch, before)


def test_center_view_equals_torchvisions_resize_and_crop() -> None:
    image = odd("pillow/flower.jpg")
    expected = functional.center_crop(functional.resize(image, 40, antialias=True), 40)
    assert (views.center_view(image, 40, 40).int() - expected.int()).abs().max() <= 2
    assert views.center_view(odd("made/tall_1x2000.jpg"), 16, 16).shape == (3, 16, 16)
    assert torch.equal(views.center_view(image[:, :32, :32], 32, 32), image[:, :32, :32])
