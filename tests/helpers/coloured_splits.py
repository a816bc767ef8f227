"""Labelled splits of plain colours, and a backbone's digest."""

import hashlib

import torch

from hemoco.config import EncoderConfig
from hemoco.data.labelled import LabelledSplit
from hemoco.models.resnet import Backbone
from tests.helpers.labelled import in_memory

TINY = EncoderConfig(architecture="resnet10t", stem="small")


def coloured(count: int, seed: int) -> LabelledSplit:
    """Makes noisy images of four shades, so that neighbouring classes overlap."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    shades = torch.tensor([[90, 120, 120], [120, 90, 120], [120, 120, 90], [120, 120, 120]])[labels]
    noise = torch.randn(count, 3, 1, 1, generator=generator) * 12 + torch.randn(
        count, 3, 8, 8, generator=generator
    )
    return in_memory((shades.view(-1, 3, 1, 1) + noise).clamp(0, 255).to(torch.uint8), labels)


def digest(backbone: Backbone) -> str:
    data = hashlib.sha256()
    for tensor in backbone.state_dict().values():
        data.update(tensor.numpy().tobytes())
    return data.hexdigest()
