"""Export of backbones and of whole methods to the file formats of other libraries.

All formats hold the backbone without a classifier. Images must be normalised as in pretraining;
only timm's format records how. For detectron2 set INPUT.FORMAT to RGB, PIXEL_MEAN and PIXEL_STD to
255 times ours, and RESNETS.STRIDE_IN_1X1 to False.
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

# prefixes of our tensor names -> those of the official MoCo files
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
    """Writes a backbone as a file that another library can load.

    `torchvision`: a state dict for `torch.load`; set the model's `fc` to `nn.Identity()` and load
    it strictly.
    `timm`: a safetensors file for `create_model(architecture, num_classes=0, checkpoint_path=...)`,
    with mean and std in its metadata.
    `detectron2`: a pickle of NumPy arrays for MODEL.WEIGHTS.
    `moco`: a file for `--pretrained` of the official main_lincls.py and its detection converter.

    Args:
        backbone_url: URL or path of a backbone.safetensors.
        dest: URL or path of the file to write.
        fmt: format of the file to write.

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
        about = {name: metadata[name] for name in ("architecture", "mean", "std")}
        data = safetensors.torch.save(tensors, {"format": "pt", **about})
    elif fmt == "detectron2":
        data = pickle.dumps(_detectron2_content(tensors))
    else:
        state_dict = {f"module.encoder_q.{name}": tensor for name, tensor in tensors.items()}
        data = _torch_bytes(
            {"epoch": 0, "arch": backbone.config.architecture, "state_dict": state_dict}
        )
    write_bytes(dest, data)


def export_method(checkpoint_url: str, dest: str) -> None:
    """Writes a checkpoint's whole method in the format of the official MoCo code.

    The file has both encoders with their heads, and the queue (v1, v2) or the predictor (v3). The
    optimiser is left out, since its state differs from that of the official code.

    Args:
        checkpoint_url: URL or path of a checkpoint's folder.
        dest: URL or path of the file to write.

    Raises:
        CheckpointError: the checkpoint fails its verification, or the official code has no such
            architecture, stem or head.
    """
    saved = load_method(checkpoint_url)
    config = saved.encoder
    _check_exportable(checkpoint_url, config, "moco")
    has_head_norm = any(name.endswith("head.1.running_mean") for name in saved.tensors)
    if "queue" in saved.tensors and has_head_norm:
        raise CheckpointError(
            f"{checkpoint_url}: its head has batch normalisation (moco.head mlp_bn), which the "
            "official v1 and v2 do not have; export the backbone alone"
        )
    content = {
        "epoch": saved.epoch,
        "arch": config.architecture,
        "state_dict": official_names(saved.tensors),
    }
    write_bytes(dest, _torch_bytes(content))


def official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the tensors of a method to the names and shapes of the official MoCo files.

    A method with a queue becomes v1/v2, any other v3.
    """
    prefixes = _V1_V2 if "queue" in tensors else _V3
    official = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        official_name = f"module.{prefixes[prefix]}{name.removeprefix(prefix)}"
        official[official_name] = tensor.detach().cpu().contiguous()
    if "queue" in tensors:
        # ours is a scalar, theirs has shape (1,)
        official["module.queue_ptr"] = official["module.queue_ptr"].view(1)
    return official


def _check_exportable(url: str, config: EncoderConfig, fmt: Format) -> None:
    if config.stem != "imagenet":
        raise CheckpointError(
            f"{url}: its stem is {config.stem!r}, which {fmt} does not have; only backbones with "
            "encoder.stem imagenet can be exported; load this one with hemoco.load_backbone"
        )
    if not config.shortcuts:
        raise CheckpointError(
            f"{url}: it has no shortcuts, and {fmt} has no such ResNet; load it with "
            "hemoco.load_backbone"
        )
    if fmt != "timm" and config.architecture not in PLAIN_ARCHITECTURES:
        raise CheckpointError(
            f"{url}: {fmt} has no {config.architecture}; it has {', '.join(PLAIN_ARCHITECTURES)}; "
            "export this one with format timm"
        )


def _detectron2_content(tensors: dict[str, Tensor]) -> dict[str, object]:
    arrays = {}
    for name, tensor in tensors.items():
        if not name.endswith("num_batches_tracked"):  # detectron2's BN does not count batches
            arrays[detectron2_name(name)] = tensor.numpy()
    return {"model": arrays, "__author__": "hemoco", "matching_heuristics": True}


def _torch_bytes(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
