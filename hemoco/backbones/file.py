"""The backbone file: one safetensors file with timm's names whose metadata say how to use it."""

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
    """Writes one safetensors file.

    Args:
        backbone: its encoder's tensors get timm's names.
        url: of the file.
        metadata: `data_digest`, `run_id` and `size` of the images of the pretraining, and where else it comes from.
    """
    # contiguous: training keeps them channels-last, which safetensors cannot say
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
    """format, architecture, stem, shortcuts, zero_init_last, mean, std, data_digest, run_id and the pretraining's size.

    Those of imports have a source and no size. From storage only the header of the file is read.

    Raises:
        CheckpointError: the file is not a hemoco backbone.
    """
    if url.startswith(SCHEME):
        return parse_metadata(url, read_backbone(url))
    metadata = read_safetensors_metadata(url)
    _check_format(url, metadata)
    return metadata


def parse_metadata(url: str, data: bytes) -> dict[str, str]:
    """The metadata in the bytes of a backbone's file, as `backbone_metadata` reads them from storage.

    Raises:
        CheckpointError: the file is not a hemoco backbone.
    """
    return _parse_backbone(url, data)[0]


def read_backbone(url: str) -> bytes:
    """The bytes of a backbone's file, wherever `load_backbone` would read it."""
    return read_model(url) if url.startswith(SCHEME) else read_bytes(url)


def load_backbone(url: str) -> Backbone:
    """A backbone in evaluation mode on the CPU: normalised (N, 3, H, W) -> features (N, F).

    Args:
        url: URL or path of a backbone.safetensors, or its name in MLflow's registry: models:/NAME@ALIAS,
            models:/NAME/VERSION, models:/NAME/latest or models:/m-...

    Raises:
        CheckpointError: the file is not a hemoco backbone, or its tensors are not exactly those of its architecture.
        StorageError: the file cannot be read.
        TrackingError: MLflow has no such model, or cannot be used.
        UsageError: a name beginning with models:/ is none of these.
    """
    metadata, tensors = _parse_backbone(url, read_backbone(url))
    try:
        config = EncoderConfig(
            architecture=metadata["architecture"],
            stem="small" if metadata["stem"] == "small" else "imagenet",
            shortcuts=json.loads(metadata.get("shortcuts", "true")),  # older files do not say so
            zero_init_last=json.loads(metadata["zero_init_last"]),
        )
        mean, std = (_triple(json.loads(metadata[name])) for name in ("mean", "std"))
        backbone = random_backbone(config, 0, mean, std)
        # torch's strict loading lets BN's counters be absent
        if absent := backbone.encoder.state_dict().keys() - tensors.keys():
            raise CheckpointError(f"{sorted(absent)} are missing")
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
    """An untrained backbone in evaluation mode; to use it frozen, calibrate its BN statistics first."""
    return Backbone(build_encoder(config, seed), config, mean, std).eval()


def _triple(values: list[float]) -> tuple[float, float, float]:
    red, green, blue = values
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
