"""Backbones, and whole methods, in the files of other libraries.

All formats hold the backbone without a classifier. Images must be normalised as in pretraining: the exported file says
so only in timm's format; for detectron2 set INPUT.FORMAT RGB, PIXEL_MEAN and PIXEL_STD to 255 times ours, and
RESNETS.STRIDE_IN_1X1 False.
"""

import io
import pickle
from collections.abc import Mapping
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from hemoco.backbones.file import backbone_metadata, load_backbone
from hemoco.backbones.layouts import PLAIN_ARCHITECTURES, detectron2_name
from hemoco.config import EncoderConfig
from hemoco.errors import CheckpointError
from hemoco.storage.objects import write_bytes
from hemoco.train.checkpoint import load_method

Format = Literal["torchvision", "timm", "detectron2", "moco"]

# beginnings of our names -> of those in the official files
_V1_V2 = {
    "query_encoder.encoder.": "encoder_q.",
    "query_encoder.head.": "encoder_q.fc.",
    "key_encoder.encoder.": "encoder_k.",
    "key_encoder.head.": "encoder_k.fc.",
    "queue_pointer": "queue_ptr",
    "queue": "queue",
}
_V3 = {
    "query_encoder.encoder.": "base_encoder.",
    "query_encoder.head.": "base_encoder.fc.",
    "key_encoder.encoder.": "momentum_encoder.",
    "key_encoder.head.": "momentum_encoder.fc.",
    "predictor.": "predictor.",
}


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
    backbone = load_backbone(backbone_url)
    _check_exportable(backbone_url, backbone.config, fmt)
    tensors: dict[str, Tensor] = backbone.encoder.state_dict()
    if fmt == "torchvision":
        data = _torch_bytes(tensors)
    elif fmt == "timm":
        kept = {name: metadata[name] for name in ("architecture", "mean", "std")}
        data = safetensors.torch.save(tensors, {"format": "pt", **kept})
    elif fmt == "detectron2":
        data = pickle.dumps(_detectron2_content(tensors))
    else:
        named = {f"module.encoder_q.{name}": tensor for name, tensor in tensors.items()}
        data = _torch_bytes({"epoch": 0, "arch": backbone.config.architecture, "state_dict": named})
    write_bytes(dest, data)


def export_method(checkpoint_url: str, dest: str) -> None:
    """Writes both encoders, their heads and the queue or the predictor of a checkpoint as the official code does.

    The optimiser stays behind: its state is another one than theirs.

    Args:
        checkpoint_url: URL or path of a checkpoint's folder.
        dest: URL or path of the file to write.

    Raises:
        CheckpointError: the checkpoint does not verify, or the official code has no such architecture, stem or head.
    """
    saved = load_method(checkpoint_url)
    config = saved.encoder
    _check_exportable(checkpoint_url, config, "moco")
    if "queue" in saved.tensors and any(
        name.endswith("head.1.running_mean") for name in saved.tensors
    ):
        raise CheckpointError(
            f"{checkpoint_url}: its head has batch normalisation (moco.head mlp_bn), which no official v1 or v2 has; "
            "export the backbone alone"
        )
    content = {
        "epoch": saved.epoch,
        "arch": config.architecture,
        "state_dict": official_names(saved.tensors),
    }
    write_bytes(dest, _torch_bytes(content))


def official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a whole method under the names, and in the shapes, of the official MoCo v1, v2 or v3 files."""
    prefixes = _V1_V2 if "queue" in tensors else _V3
    named = {}
    for name, tensor in tensors.items():
        ours = next(prefix for prefix in prefixes if name.startswith(prefix))
        named[f"module.{prefixes[ours]}{name.removeprefix(ours)}"] = (
            tensor.detach().cpu().contiguous()
        )
    if "queue" in tensors:
        named["module.queue_ptr"] = named["module.queue_ptr"].view(1)
    return named


def _check_exportable(url: str, config: EncoderConfig, fmt: Format) -> None:
    if config.stem != "imagenet":
        raise CheckpointError(
            f"{url}: its stem is {config.stem!r}, which {fmt} does not have; only backbones with encoder.stem imagenet "
            "can be exported, this one can be used by hemoco.load_backbone"
        )
    if not config.shortcuts:
        raise CheckpointError(
            f"{url}: has no shortcuts, and {fmt} no such ResNet; it can be used by hemoco.load_backbone"
        )
    if fmt != "timm" and config.architecture not in PLAIN_ARCHITECTURES:
        raise CheckpointError(
            f"{url}: {fmt} has no {config.architecture}; it has {', '.join(PLAIN_ARCHITECTURES)}; export this one with "
            "format timm"
        )


def _detectron2_content(tensors: dict[str, Tensor]) -> dict[str, object]:
    # detectron2 has no counters of batches
    kept = {
        name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")
    }
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in kept.items()}
    return {"model": arrays, "__author__": "hemoco", "matching_heuristics": True}


def _torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
