"""How other libraries lay out a ResNet: where its tensors are in a file, what they are called, what is beside them."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from hemoco.errors import CheckpointError

EncoderChoice = Literal["query", "key"]
Renames = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]

PLAIN_ARCHITECTURES = (
    *(
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
)
"""The architectures whose names and layers are the same in torchvision and timm."""

_TO_DETECTRON2: Renames = (
    (r"^(?!layer)", "stem."),
    (r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}"),
    (r"bn(\d)", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)
_FROM_DETECTRON2: Renames = (
    (r"^stem\.", ""),
    (r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}"),
    (r"conv(\d)\.norm", r"bn\1"),
    (r"shortcut\.norm", "downsample.1"),
    (r"shortcut", "downsample.0"),
)
_FROM_CHILDREN: Renames = (  # of nn.Sequential(*list(resnet.children())[:-1])
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda found: f"layer{int(found[1]) - 3}."),
)


class Layout(NamedTuple):
    """The names in a state dict, behind the `module.` of DistributedDataParallel."""

    name: str
    mark: str
    """Pattern with which a name begins in this layout and in none below it in the table."""
    query: str
    """Prefix of the encoder that its authors evaluate."""
    key: str | None = None
    """Prefix of the key encoder, where there is one."""
    head: str = ""
    """Pattern of names behind the prefix that are not the backbone's."""
    others: str = ""
    """Pattern of names without the prefix; all else is unexpected."""
    renames: Renames = ()
    """From the names behind the prefix to torchvision's."""


_LAYOUTS = (
    Layout(
        "lightly",
        r"backbone\.\d\.",
        "backbone.",
        "backbone_momentum.",
        others=r".*",
        renames=_FROM_CHILDREN,
    ),
    Layout("solo-learn", r"momentum_backbone\.", "backbone.", "momentum_backbone.", others=r".*"),
    Layout("solo-learn or mmselfsup", r"backbone\.", "backbone.", others=r".*"),
    Layout(
        *("MoCo v1/v2", r"encoder_q\.", "encoder_q.", "encoder_k."),
        head=r"fc\..*",
        others=r"encoder_[qk]\..*|queue|queue_ptr",
    ),
    Layout(
        *("MoCo v3", r"base_encoder\.", "base_encoder.", "momentum_encoder."),
        head=r"fc\..*",
        others=r"(base|momentum)_encoder\..*|predictor\..*",
    ),
    Layout("vissl", r"_feature_blocks\.", "_feature_blocks.", others=r".*"),
    Layout("detectron2", r"stem\.", "", head=r"stem\.fc\..*", renames=_FROM_DETECTRON2),
    Layout("torchvision or timm", r"(conv1|layer1)\.", "", head=r"fc\.(weight|bias)"),
)
_PLACES = (("classy_state_dict", "base_model", "model", "trunk"), ("state_dict",), ("model",), ())


class ForeignBackbone(NamedTuple):
    """The tensors of one encoder, and what else was in the file."""

    layout: str
    tensors: dict[str, Tensor]
    """By torchvision's names; the unexpected by their own."""
    left_out: list[str]


def find_backbone(url: str, content: Mapping[str, Any], encoder: EncoderChoice) -> ForeignBackbone:
    """The backbone in the content of a file, whose layout its names tell.

    Raises:
        CheckpointError: the layout is unknown or has no such encoder.
    """
    tensors = _without_prefix(_state_dict(url, content), "module.")
    layout = next(
        (each for each in _LAYOUTS if any(re.match(each.mark, name) for name in tensors)), None
    )
    if layout is None:
        known = ", ".join(each.name for each in _LAYOUTS)
        raise CheckpointError(
            f"{url}: its tensors ({', '.join(sorted(tensors)[:3])}, ...) are named as in no known layout; "
            f"known are {known}"
        )
    prefix = layout.query if encoder == "query" else layout.key
    if prefix is None:
        raise CheckpointError(
            f"{url}: layout {layout.name} has no key encoder; import the query encoder"
        )
    left_out = [name for name in tensors if _is_left_out(name, layout, prefix)]
    # an unexpected name without the prefix stays as it is and will fit no architecture
    named = {
        rename(name.removeprefix(prefix), layout.renames): tensors[name]
        for name in tensors.keys() - left_out
    }
    if len(named) < len(tensors) - len(left_out):
        raise CheckpointError(
            f"{url}: layout {layout.name}: two tensors have the same name in torchvision"
        )
    return ForeignBackbone(layout.name, named, left_out)


def detectron2_name(name: str) -> str:
    """detectron2's name of a torchvision tensor."""
    return rename(name, _TO_DETECTRON2)


def rename(name: str, renames: Renames) -> str:
    """The name after all replacements, in their order."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def _is_left_out(name: str, layout: Layout, prefix: str) -> bool:
    if name.startswith(prefix):
        return re.fullmatch(layout.head, name.removeprefix(prefix)) is not None
    return re.fullmatch(layout.others, name) is not None


def _state_dict(url: str, content: Mapping[str, Any]) -> dict[str, Tensor]:
    for place in _PLACES:
        found: Any = content
        for step in place:
            found = found.get(step) if isinstance(found, Mapping) else None
        if (
            isinstance(found, Mapping)
            and found
            and all(isinstance(value, Tensor) for value in found.values())
        ):
            return {str(name): tensor for name, tensor in found.items()}
    raise CheckpointError(
        f"{url}: has no state dict, alone or under 'state_dict' or 'model'; its content is "
        f"{', '.join(map(repr, list(content)[:5]))}"
    )


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    if not all(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
