"""The backbone file: a safetensors file with timm's tensor names and metadata on its use."""

import json

import safetensors.torch
import torch

from hemoco.config import EncoderConfig
from hemoco.errors import CheckpointError, ConfigError
from hemoco.models.resnet import Backbone, build_encoder
from hemoco.storage.objects import read_bytes, write_bytes
from hemoco.storage.tensor_files import parse_safetensors, read_safetensors_metadata
from hemoco.tracking.models import SCHEME
from hemoco.tracking.versions import read_model

_FORMAT = "hemoco-backbone-1"


def export_backbone(backbone: Backbone, url: str, metadata: dict[str, str]) -> None:
    """Writes a backbone as one safetensors file.

    Args:
        backbone: backbone whose encoder is written, under timm's names.
        url: URL of the file.
        metadata: origin of the backbone: for a pretraining `data_digest`, `run_id` and the `size`
            of its images.
    """
    # Contiguous, since training keeps weights in channels-last order, which safetensors refuses.
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in backbone.encoder.state_dict().items()
    }
    own = {
        "format": _FORMAT,
        "architecture": backbone.config.architecture,
        "stem": backbone.config.stem,
        "shortcuts": json.dumps(backbone.config.shortcuts),
        "zero_init_last": json.dumps(backbone.config.zero_init_last),
        "mean": json.dumps(backbone.mean),
        "std": json.dumps(backbone.std),
    }
    write_bytes(url, safetensors.torch.save(tensors, metadata | own))


def backbone_metadata(url: str) -> dict[str, str]:
    """Reads a backbone's metadata; from storage, only the header of the file is read.

    Keys: format, architecture, stem, shortcuts, zero_init_last, mean, std, data_digest, run_id and
    the size of the pretraining's images. Imported backbones have a source and no size.

    Raises:
        CheckpointError: the file is not a hemoco backbone.
    """
    if url.startswith(SCHEME):
        return parse_metadata(url, read_backbone(url))
    metadata = read_safetensors_metadata(url)
    _check_format(url, metadata)
    return metadata


def parse_metadata(url: str, data: bytes) -> dict[str, str]:
    """Parses the metadata from the bytes of a backbone's file; keys as in `backbone_metadata`.

    Args:
        url: URL of the file, for messages.
        data: content of the file.

    Raises:
        CheckpointError: the file is not a hemoco backbone.
    """
    return _parse_backbone(url, data)[0]


def read_backbone(url: str) -> bytes:
    """Reads the bytes of a backbone's file from storage or from MLflow's registry."""
    return read_model(url) if url.startswith(SCHEME) else read_bytes(url)


def load_backbone(url: str) -> Backbone:
    """Loads a backbone to the CPU, in evaluation mode.

    It maps normalised images (N, 3, H, W) to features (N, F).

    Args:
        url: URL or path of a backbone.safetensors, or a name in MLflow's registry:
            models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or models:/m-...

    Raises:
        CheckpointError: the file is not a hemoco backbone, or its tensors are not exactly those of
            its architecture.
        StorageError: the file cannot be read.
        TrackingError: MLflow has no such model, or cannot be used.
        UsageError: a name that starts with models:/ has none of these forms.
    """
    metadata, tensors = _parse_backbone(url, read_backbone(url))
    try:
        config = EncoderConfig(
            architecture=metadata["architecture"],
            stem="small" if metadata["stem"] == "small" else "imagenet",
            shortcuts=json.loads(metadata.get("shortcuts", "true")),  # missing in older files
            zero_init_last=json.loads(metadata["zero_init_last"]),
        )
        mean, std = _triple(metadata["mean"]), _triple(metadata["std"])
        backbone = random_backbone(config, 0, mean, std)
        # Even strict loading in torch accepts a file without BN's counters of batches.
        missing = backbone.encoder.state_dict().keys() - tensors.keys()
        if missing:
            raise CheckpointError(f"{sorted(missing)} are missing")
        backbone.encoder.load_state_dict(tensors)
    except KeyError as error:
        raise CheckpointError(
            f"{url}: its metadata lacks {error}; export the backbone again"
        ) from error
    except (ConfigError, CheckpointError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{url}: does not fit its architecture: {' '.join(str(error).split())}"
        ) from error
    return backbone


def random_backbone(
    config: EncoderConfig,
    seed: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> Backbone:
    """Builds an untrained backbone in evaluation mode.

    Before it is used frozen, its BN statistics must be calibrated (`calibrate_batch_norm`).
    """
    return Backbone(build_encoder(config, seed), config, mean, std).eval()


def _triple(text: str) -> tuple[float, float, float]:
    red, green, blue = json.loads(text)
    return red, green, blue


def _parse_backbone(url: str, data: bytes) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    metadata, tensors = parse_safetensors(url, data)
    _check_format(url, metadata)
    return metadata, tensors


def _check_format(url: str, metadata: dict[str, str]) -> None:
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(
            f"{url}: is not a hemoco backbone: its metadata says format {metadata.get('format')}, "
            f"not {_FORMAT}; pretrain writes backbone.safetensors"
        )
