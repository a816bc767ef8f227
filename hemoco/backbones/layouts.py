"""File layouts of ResNets in other libraries, and the search for a backbone in such a file.

A layout is recognised by its tensor names. It determines the prefix of the encoder, the tensors
that are not part of the backbone, and how names are mapped to torchvision's.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hemoco.errors import CheckpointError

EncoderChoice = Literal["query", "key"]
Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

PLAIN_ARCHITECTURES = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "wide_resnet50_2",
    "wide_resnet101_2",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
"""The architectures with the same names and layers in torchvision and timm."""

_TO_DETECTRON2: Renames = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}"),
    (r"bn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
_FROM_DETECTRON2: Renames = (
    (r"^stem\.", ""),
    (r"^res(\d)", lambda match: f"layer{int(match[1]) - 1}"),
    (r"conv(\d)\.norm", r"bn\1"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut", "downsample.0"),
)
# from the numbered children of nn.Sequential(*list(resnet.children())[:-1])
_FROM_CHILDREN: Renames = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda match: f"layer{int(match[1]) - 3}."),
)


class Layout(NamedTuple):
    """The tensor names of a library, without the `module.` of DistributedDataParallel."""

    name: str
    mark: str
    """Regular expression; some name starts with it in this layout and in none below it."""
    query: str
    """Prefix of the encoder that its authors evaluate."""
    key: str | None = None
    """Prefix of the key encoder; None if the layout has no key encoder."""
    head: str = ""
    """Regular expression of names after the prefix that are not part of the backbone."""
    others: str = ""
    """Regular expression of names without the prefix that may occur; others are errors."""
    renames: Renames = ()
    """Replacements that turn the names after the prefix into torchvision's."""


# The order counts: the first layout whose mark occurs is taken.
_LAYOUTS = (
    Layout(
        name="lightly",
        mark=r"backbone\.\d\.",
        query="backbone.",
        key="backbone_momentum.",
        others=r".*",
        renames=_FROM_CHILDREN,
    ),
    Layout(
        name="solo-learn",
        mark=r"momentum_backbone\.",
        query="backbone.",
        key="momentum_backbone.",
        others=r".*",
    ),
    Layout(
        name="solo-learn or mmselfsup",
        mark=r"backbone\.",
        query="backbone.",
        others=r".*",
    ),
    Layout(
        name="MoCo v1/v2",
        mark=r"encoder_q\.",
        query="encoder_q.",
        key="encoder_k.",
        head=r"fc\..*",
        others=r"encoder_[qk]\..*|queue|queue_ptr",
    ),
    Layout(
        name="MoCo v3",
        mark=r"base_encoder\.",
        query="base_encoder.",
        key="momentum_encoder.",
        head=r"fc\..*",
        others=r"(base|momentum)_encoder\..*|predictor\..*",
    ),
    Layout(
        name="vissl",
        mark=r"_feature_blocks\.",
        query="_feature_blocks.",
        others=r".*",
    ),
    Layout(
        name="detectron2",
        mark=r"stem\.",
        query="",
        head=r"stem\.fc\..*",
        renames=_FROM_DETECTRON2,
    ),
    Layout(
        name="torchvision or timm",
        mark=r"(conv1|layer1)\.",
        query="",
        head=r"fc\.(weight|bias)",
    ),
)
# key paths of the state dict in a file, the first that leads to tensors is taken
_STATE_DICT_PATHS = (
    ("classy_state_dict", "base_model", "model", "trunk"),
    ("state_dict",),
    ("model",),
    (),
)


class ForeignBackbone(NamedTuple):
    """The backbone tensors of a file, and what else the file had."""

    layout: str
    tensors: dict[str, Tensor]
    """Tensors by torchvision's names; unexpected ones by their own names."""
    left_out: list[str]
    """Names of tensors that are not part of the backbone."""


def find_backbone(url: str, content: Mapping[str, Any], encoder: EncoderChoice) -> ForeignBackbone:
    """Finds the backbone in the content of a file.

    Args:
        url: URL of the file, for messages.
        content: content of the file.
        encoder: the encoder to take; `key` is the moving average.

    Raises:
        CheckpointError: there is no state dict, its layout is unknown or has no such encoder.
    """
    tensors = _without_prefix(_state_dict(url, content), "module.")
    layout = _find_layout(url, tensors)
    prefix = layout.query if encoder == "query" else layout.key
    if prefix is None:
        raise CheckpointError(
            f"{url}: layout {layout.name} has no key encoder; import the query encoder"
        )
    backbone: dict[str, Tensor] = {}
    left_out = []
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            ignored = re.fullmatch(layout.head, name.removeprefix(prefix))
        else:
            ignored = re.fullmatch(layout.others, name)
        if ignored:
            left_out.append(name)
            continue
        # An unexpected name without the prefix stays as it is; it fits no architecture, so the
        # import refuses it by name.
        torchvision_name = rename(name.removeprefix(prefix), layout.renames)
        if torchvision_name in backbone:
            raise CheckpointError(
                f"{url}: layout {layout.name}: two tensors have the same name in torchvision "
                f"({torchvision_name})"
            )
        backbone[torchvision_name] = tensor
    return ForeignBackbone(layout.name, backbone, left_out)


def detectron2_name(name: str) -> str:
    """The name in detectron2 of a torchvision tensor."""
    return rename(name, _TO_DETECTRON2)


def rename(name: str, renames: Renames) -> str:
    """Applies all replacements to a name, in order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _find_layout(url: str, tensors: Mapping[str, Tensor]) -> Layout:
    for layout in _LAYOUTS:
        if any(re.match(layout.mark, name) for name in tensors):
            return layout
    known = ", ".join(layout.name for layout in _LAYOUTS)
    raise CheckpointError(
        f"{url}: its tensors ({', '.join(sorted(tensors)[:3])}, ...) are named as in no known "
        f"layout; known are {known}"
    )


def _state_dict(url: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for path in _STATE_DICT_PATHS:
        value: Any = content
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not value:
            continue
        if all(isinstance(item, Tensor) for item in value.values()):
            return {str(name): tensor for name, tensor in value.items()}
    raise CheckpointError(
        f"{url}: has no state dict, alone or under 'state_dict' or 'model'; its content is "
        f"{', '.join(map(repr, list(content)[:5]))}"
    )


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
