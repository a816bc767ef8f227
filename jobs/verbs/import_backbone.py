"""`python -m jobs import CHECKPOINT DEST`: a backbone of another library as hemoco's."""

from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url

_Channels = Annotated[
    tuple[float, float, float] | None,
    tyro.conf.arg(metavar="RED GREEN BLUE", help_behavior_hint=""),
]


def main(argv: list[str]) -> None:
    """Imports."""
    tyro.cli(import_checkpoint, args=argv, prog="python -m jobs import", use_underscores=True)


def import_checkpoint(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    architecture: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = "",
    encoder: Literal["query", "key"] = "query",
    mean: _Channels = None,
    std: _Channels = None,
) -> None:
    """A backbone of another library as a backbone.safetensors for hemoco.load_backbone and for transfers.

    Known by the names of their tensors are files of MoCo v1, v2 and v3, torchvision, timm, detectron2, solo-learn,
    lightly, vissl and mmselfsup. Names and shapes must be exactly those of the architecture; what is left out is
    printed. Files with Python objects beside tensors are refused, not run.

    Args:
        checkpoint: URL or path of the file (.pth, .pth.tar, .pt, .ckpt, .torch, .safetensors, detectron2's .pkl).
        dest: URL or path of the backbone.safetensors to write.
        architecture: timm name, such as resnet50; default: what the file says, else the one ResNet that has exactly
            these tensors.
        encoder: of two in a file: query is the one that was trained and is usually evaluated, key its moving average.
        mean: subtracted from images in [0, 1] in pretraining; default: what the file says, else ImageNet's.
        std: by which they were then divided; goes with --mean.
    """
    if absolute_url(checkpoint) == absolute_url(dest):
        raise UsageError(f"{dest}: is the file to import; name another DEST")
    if (mean is None) != (std is None):
        raise UsageError("--mean and --std go together: give both or none")
    from hemoco.backbones.imports import (  # torch takes seconds to import, errors should not
        Normalisation,
        import_backbone,
    )

    normalisation = None if mean is None or std is None else Normalisation(mean, std)
    done = import_backbone(
        checkpoint, dest, architecture=architecture, encoder=encoder, normalisation=normalisation
    )
    print(
        f"{dest}: {done.config.architecture}, {done.tensors} tensors of {checkpoint}, layout {done.layout}"
    )
    print(f"mean {done.normalisation.mean}, std {done.normalisation.std}")
    print(f"left out: {', '.join(done.left_out) or 'nothing'}")
    if done.config.stem == "small":
        print(
            "warning: 3x3 stem: hemoco's has padding 1 and no max-pooling; no file says what its own had"
        )
