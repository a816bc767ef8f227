"""Backbones of other libraries as hemoco's backbone.safetensors."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hemoco.backbones.file import export_backbone
from hemoco.backbones.layouts import PLAIN_ARCHITECTURES, EncoderChoice, find_backbone
from hemoco.config import EncoderConfig, ViewsConfig
from hemoco.config.checks import require
from hemoco.errors import CheckpointError, ConfigError
from hemoco.models.resnet import Backbone, build_encoder
from hemoco.storage.objects import read_bytes
from hemoco.storage.tensor_files import parse_file

_NAMED_DIFFERENCES = 3
_NAMED_TENSORS = 12


class Normalisation(NamedTuple):
    """Of images in [0, 1], per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Imported(NamedTuple):
    """What was taken from a file."""

    layout: str
    config: EncoderConfig
    tensors: int
    normalisation: Normalisation
    left_out: list[str]
    """Tensors of heads by name; whole modules as `name.* (count)`."""


def import_backbone(
    url: str,
    dest: str,
    *,
    architecture: str = "",
    encoder: EncoderChoice = "query",
    normalisation: Normalisation | None = None,
) -> Imported:
    """Writes the encoder in a file of another library as a backbone that `load_backbone` reads.

    The layout is told by the names; names and shapes must be exactly the architecture's. Only BN's counters of batches,
    which nothing reads, may be absent altogether, as in detectron2's files.

    Args:
        url: URL or path of the file.
        dest: URL or path of the backbone.safetensors to write.
        architecture: timm name; empty: the one that the file names, else the plain ResNet that alone has its tensors.
        encoder: `key` takes the moving average instead of the encoder that is usually evaluated.
        normalisation: of the images in pretraining; None: what the file says, else ImageNet's.

    Raises:
        CheckpointError: the file cannot be read, its layout is unknown, or its tensors fit no or another architecture.
        ConfigError: mean or std are not those of images in [0, 1].
    """
    data = read_bytes(url)
    content = _content(url, data)
    normalisation = normalisation or _normalisation(url, content)
    _check(normalisation)
    found = find_backbone(url, content, encoder)
    origin = f"{url}: layout {found.layout}"
    tensors = _with_counters(found.tensors)
    named = architecture or content.get("arch") or content.get("architecture")
    config = EncoderConfig(
        architecture=str(named or _infer_architecture(origin, tensors)), stem=_stem(tensors)
    )
    backbone = Backbone(_filled_encoder(origin, config, tensors), config, *normalisation)
    source = {
        "source": f"imported from {found.layout} ({encoder} encoder)",
        "source_sha256": hashlib.sha256(data).hexdigest(),
    }
    export_backbone(backbone, dest, {"data_digest": "unknown", "run_id": "", **source})
    return Imported(found.layout, config, len(tensors), normalisation, _summary(found.left_out))


def _content(url: str, data: bytes) -> dict[str, Any]:
    content = parse_file(url, data)
    if str(content.get("format")).startswith("hemoco"):
        raise CheckpointError(f"{url}: is a backbone of hemoco already; use it as it is")
    return content


def _normalisation(url: str, content: Mapping[str, Any]) -> Normalisation:
    """The file's own, as `export --format timm` writes it, else ImageNet's."""
    if not isinstance(content.get("mean"), str):
        return Normalisation(ViewsConfig().mean, ViewsConfig().std)
    try:
        mean, std = (tuple(map(float, json.loads(content[name]))) for name in ("mean", "std"))
        return Normalisation((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{url}: its mean and std cannot be read; give --mean and --std"
        ) from error


def _check(normalisation: Normalisation) -> None:
    for name, values in normalisation._asdict().items():
        low = 0 if name == "mean" else 1e-6
        require(
            all(low <= value <= 1 for value in values),
            f"{name} is {values}: it must be that of images in [0, 1]",
        )


def _stem(tensors: Mapping[str, Tensor]) -> Any:
    weight = tensors.get("conv1.weight")
    return "small" if weight is not None and weight.shape[2:] == (3, 3) else "imagenet"


def _with_counters(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds BN's counters of batches where a file has none at all."""
    if any(name.endswith(".num_batches_tracked") for name in tensors):
        return tensors
    norms = [
        name.removesuffix(".running_mean") for name in tensors if name.endswith(".running_mean")
    ]
    return tensors | {f"{name}.num_batches_tracked": torch.tensor(0) for name in norms}


def _infer_architecture(origin: str, tensors: Mapping[str, Tensor]) -> str:
    """The plain ResNet that has exactly these tensors; no two have the same."""
    differences: dict[str, list[str]] = {}
    for architecture in PLAIN_ARCHITECTURES:
        config = EncoderConfig(architecture=architecture, stem=_stem(tensors))
        differences[architecture] = _differences(
            _empty_encoder(origin, config).state_dict(), tensors
        )
        if not differences[architecture]:
            return architecture
    nearest = min(differences, key=lambda name: len(differences[name]))
    raise CheckpointError(
        f"{origin}: is no ResNet that its tensors alone could tell, nearest is {nearest}: "
        f"{_some(differences[nearest])}; name another with --architecture"
    )


def _filled_encoder(origin: str, config: EncoderConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    encoder = _empty_encoder(origin, config)
    expected = encoder.state_dict()
    if differences := _differences(expected, tensors):
        raise CheckpointError(f"{origin}: is no {config.architecture}: {_some(differences)}")
    encoder.load_state_dict(
        {name: tensors[name].to(expected[name].dtype) for name in expected}, assign=True
    )
    return encoder


def _empty_encoder(origin: str, config: EncoderConfig) -> nn.Module:
    """Its tensors have names and shapes, no values."""
    try:
        with torch.device("meta"):
            return build_encoder(config, 0)
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in found]
    unexpected = [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    both = [(name, tensor, found[name]) for name, tensor in expected.items() if name in found]
    shapes = [
        f"{name} has shape {tuple(b.shape)}, not {tuple(a.shape)}"
        for name, a, b in both
        if a.shape != b.shape
    ]
    kinds = [
        f"{name} is {b.dtype}, not {a.dtype}"
        for name, a, b in both
        if a.is_floating_point() != b.is_floating_point()
    ]
    return missing + unexpected + shapes + kinds


def _some(differences: list[str]) -> str:
    shown = "; ".join(differences[:_NAMED_DIFFERENCES])
    more = len(differences) - _NAMED_DIFFERENCES
    return f"{shown} and {more} more" if more > 0 else shown


def _summary(names: list[str]) -> list[str]:
    """Few tensors of a module by name, many as their number."""
    modules = Counter(name.partition(".")[0] for name in names)
    few = {name for name, count in modules.items() if count <= _NAMED_TENSORS}
    single = [name for name in names if name.partition(".")[0] in few]
    return single + [f"{name}.* ({count})" for name, count in modules.items() if name not in few]
