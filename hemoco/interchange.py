"""Backbones in the files of other libraries.

All formats hold the backbone without a classifier. Images must be normalised as in pretraining: the exported file says
so only in timm's format; for detectron2 set INPUT.FORMAT RGB, PIXEL_MEAN and PIXEL_STD to 255 times ours, and
RESNETS.STRIDE_IN_1X1 False.
"""

import io
import pickle
import re
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from hemoco.checkpoint import backbone_metadata, load_backbone
from hemoco.errors import CheckpointError
from hemoco.storage import write_bytes

Format = Literal["torchvision", "timm", "detectron2", "moco"]

# of these, torchvision's names and layers are timm's
_PLAIN = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
_DETECTRON2_NAMES = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"bn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


def export_checkpoint(backbone_url: str, dest: str, fmt: Format) -> None:
    """Writes a backbone as a file that another library loads.

    `torchvision`: a state dict for `torch.load`; set the model's `fc` to `nn.Identity()` and load it strictly.
    `timm`: safetensors for `create_model(architecture, num_classes=0, checkpoint_path=...)`; metadata: mean and std.
    `detectron2`: a pickle of NumPy arrays for MODEL.WEIGHTS.
    `moco`: for `--pretrained` of the official main_lincls.py and its detection converter.

    Args:
        backbone_url: URL or path of a backbone.safetensors.
        dest: URL or path of the file to write.
        fmt: whose names and layout.

    Raises:
        CheckpointError: the other library has no such architecture or stem.
    """
    metadata = backbone_metadata(backbone_url)
    architecture = metadata["architecture"]
    _check_exportable(backbone_url, architecture, metadata["stem"], fmt)
    tensors: dict[str, Tensor] = load_backbone(backbone_url).encoder.state_dict()
    if fmt == "torchvision":
        data = _torch_bytes(tensors)
    elif fmt == "timm":
        kept = {name: metadata[name] for name in ("architecture", "mean", "std")}
        data = safetensors.torch.save(tensors, {"format": "pt", **kept})
    elif fmt == "detectron2":
        data = pickle.dumps(_detectron2_content(tensors))
    else:
        named = {f"module.encoder_q.{name}": tensor for name, tensor in tensors.items()}
        data = _torch_bytes({"epoch": 0, "arch": architecture, "state_dict": named})
    write_bytes(dest, data)


def detectron2_name(name: str) -> str:
    """detectron2's name of a torchvision tensor."""
    for pattern, replacement in _DETECTRON2_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _check_exportable(url: str, architecture: str, stem: str, fmt: Format) -> None:
    if stem != "imagenet":
        raise CheckpointError(
            f"{url}: its stem is {stem!r}, which {fmt} does not have; only backbones with encoder.stem imagenet can be "
            "exported, this one can be used by hemoco.load_backbone"
        )
    if fmt != "timm" and architecture not in _PLAIN:
        raise CheckpointError(
            f"{url}: {fmt} has no {architecture}; it has {', '.join(_PLAIN)}; export this one with format timm"
        )


def _detectron2_content(tensors: dict[str, Tensor]) -> dict[str, object]:
    # detectron2 has no counters of batches
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in kept.items()}
    return {"model": arrays, "__author__": "hemoco", "matching_heuristics": True}


def _torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
