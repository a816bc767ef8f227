"""Import of backbones from the files of other libraries."""

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

_MAX_DIFFERENCES_LISTED = 3  # of a message
_MAX_TENSORS_LISTED = 12  # of a module; above, only their number is listed


class Normalisation(NamedTuple):
    """Mean and standard deviation per channel, for images in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Imported(NamedTuple):
    """The outcome of an import."""

    layout: str
    config: EncoderConfig
    tensors: int
    """Number of tensors of the backbone."""
    normalisation: Normalisation
    left_out: list[str]
    """Tensors outside the backbone by name, large modules as `name.* (count)`."""


def import_backbone(
    url: str,
    dest: str,
    *,
    architecture: str = "",
    encoder: EncoderChoice = "query",
    normalisation: Normalisation | None = None,
) -> Imported:
    """Writes the encoder in a file of another library as a backbone that `load_backbone` reads.

    The layout is recognised by the tensor names; names and shapes must be exactly those of the
    architecture. Only BN's counters of batches, which nothing reads, may all be missing, as in
    detectron2's files.

    Args:
        url: URL or path of the file.
        dest: URL or path of the backbone.safetensors to write.
        architecture: timm name; if empty, the name in the file or, without one, the plain ResNet
            with exactly these tensors.
        encoder: `key` takes the moving average instead of the encoder that is usually evaluated.
        normalisation: normalisation of the images in pretraining; None takes the one in the file
            or, without one, ImageNet's.

    Raises:
        CheckpointError: the file cannot be read, its layout is unknown, or its tensors do not fit
            the architecture.
        ConfigError: mean or std are not those of images in [0, 1].
    """
    data = read_bytes(url)
    content = parse_file(url, data)
    if str(content.get("format")).startswith("hemoco"):
        raise CheckpointError(f"{url}: is a backbone of hemoco already; use it as it is")
    normalisation = normalisation or _normalisation(url, content)
    _check(normalisation)
    foreign = find_backbone(url, content, encoder)
    origin = f"{url}: layout {foreign.layout}"
    tensors = _with_counters(foreign.tensors)
    name = architecture or content.get("arch") or content.get("architecture")
    if not name:
        name = _infer_architecture(origin, tensors)
    config = EncoderConfig(architecture=str(name), stem=_stem(tensors))
    backbone = Backbone(_filled_encoder(origin, config, tensors), config, *normalisation)
    metadata = {
        "data_digest": "unknown",
        "run_id": "",
        "source": f"imported from {foreign.layout} ({encoder} encoder)",
        "source_sha256": hashlib.sha256(data).hexdigest(),
    }
    export_backbone(backbone, dest, metadata)
    left_out = _summary(foreign.left_out)
    return Imported(foreign.layout, config, len(tensors), normalisation, left_out)


def _normalisation(url: str, content: Mapping[str, Any]) -> Normalisation:
    """The normalisation in the file, as `export --format timm` writes it, or ImageNet's."""
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
    """Adds BN's counters of batches if the file has none at all."""
    if any(name.endswith(".num_batches_tracked") for name in tensors):
        return tensors
    counters = {}
    for name in tensors:
        if name.endswith(".running_mean"):
            norm = name.removesuffix(".running_mean")
            counters[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    return tensors | counters


def _infer_architecture(origin: str, tensors: Mapping[str, Tensor]) -> str:
    """Returns the plain ResNet with exactly these tensors; no two have the same."""
    differences: dict[str, list[str]] = {}
    for architecture in PLAIN_ARCHITECTURES:
        config = EncoderConfig(architecture=architecture, stem=_stem(tensors))
        expected = _empty_encoder(origin, config).state_dict()
        differences[architecture] = _differences(expected, tensors)
        if not differences[architecture]:
            return architecture
    nearest = min(differences, key=lambda name: len(differences[name]))
    raise CheckpointError(
        f"{origin}: its tensors are those of no plain ResNet; the nearest is {nearest}: "
        f"{_shorten(differences[nearest])}; name the architecture with --architecture"
    )


def _filled_encoder(origin: str, config: EncoderConfig, tensors: Mapping[str, Tensor]) -> nn.Module:
    encoder = _empty_encoder(origin, config)
    expected = encoder.state_dict()
    differences = _differences(expected, tensors)
    if differences:
        raise CheckpointError(f"{origin}: is not a {config.architecture}: {_shorten(differences)}")
    converted = {name: tensors[name].to(expected[name].dtype) for name in expected}
    encoder.load_state_dict(converted, assign=True)
    return encoder


def _empty_encoder(origin: str, config: EncoderConfig) -> nn.Module:
    """An encoder on torch's meta device, whose tensors have names and shapes but no values."""
    try:
        with torch.device("meta"):
            return build_encoder(config, 0)
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _differences(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> list[str]:
    missing = [f"{name} is missing" for name in expected if name not in actual]
    unexpected = [f"{name} is unexpected" for name in sorted(actual.keys() - expected.keys())]
    shapes, dtypes = [], []
    for name, wanted in expected.items():
        if name not in actual:
            continue
        given = actual[name]
        if given.shape != wanted.shape:
            shapes.append(f"{name} has shape {tuple(given.shape)}, not {tuple(wanted.shape)}")
        if given.is_floating_point() != wanted.is_floating_point():
            dtypes.append(f"{name} is {given.dtype}, not {wanted.dtype}")
    return missing + unexpected + shapes + dtypes


def _shorten(differences: list[str]) -> str:
    text = "; ".join(differences[:_MAX_DIFFERENCES_LISTED])
    more = len(differences) - _MAX_DIFFERENCES_LISTED
    return f"{text} and {more} more" if more > 0 else text


def _summary(names: list[str]) -> list[str]:
    """Lists the tensors of small modules by name and large modules by their number of tensors."""
    counts = Counter(name.partition(".")[0] for name in names)
    small = {module for module, count in counts.items() if count <= _MAX_TENSORS_LISTED}
    single = [name for name in names if name.partition(".")[0] in small]
    large = [f"{name}.* ({count})" for name, count in counts.items() if name not in small]
    return single + large
