"""`python -m jobs import CHECKPOINT DEST`: a checkpoint of another library as a backbone."""

from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url
from jobs.arguments import Name, read_arguments

_Channels = Annotated[
    tuple[float, float, float] | None,
    tyro.conf.arg(metavar="RED GREEN BLUE", help_behavior_hint=""),
]


def main(argv: list[str]) -> None:
    """Converts the checkpoint."""
    read_arguments(import_checkpoint, argv, command="import")


def import_checkpoint(
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    architecture: Name = "",
    encoder: Literal["query", "key"] = "query",
    mean: _Channels = None,
    std: _Channels = None,
) -> None:
    """Converts a checkpoint of another library to a backbone.safetensors of hemoco.

    Checkpoints of these libraries are recognised by the names of their tensors:
    - MoCo v1, v2 and v3, torchvision, timm, detectron2
    - solo-learn, lightly, vissl, mmselfsup

    Names and shapes must be exactly those of the architecture. Tensors left out are printed.

    Files that hold Python objects besides tensors are refused, never executed.

    Args:
        checkpoint: URL or path of the file (.pth, .pth.tar, .pt, .ckpt, .torch, .safetensors,
            detectron2's .pkl).
        dest: URL or path of the backbone.safetensors to write.
        architecture: timm name, such as resnet50; default: the one named in the file, else the one
            ResNet that has exactly these tensors.
        encoder: for a file with two encoders. The query encoder was trained and is usually the one
            evaluated; the key encoder is its moving average.
        mean: channel means subtracted from images in [0, 1] in pretraining; default: those in the
            file, else ImageNet's.
        std: channel deviations by which the images were then divided; goes with --mean.
    """
    if absolute_url(checkpoint) == absolute_url(dest):
        raise UsageError(f"{dest}: is the file to import; name another DEST")
    if (mean is None) != (std is None):
        raise UsageError("--mean and --std go together: give both or none")
    # imported late: torch takes seconds, and wrong usage is reported at once
    from hemoco.backbones.imports import Normalisation, import_backbone

    normalisation = None if mean is None or std is None else Normalisation(mean, std)
    done = import_backbone(
        checkpoint, dest, architecture=architecture, encoder=encoder, normalisation=normalisation
    )
    print(
        f"{dest}: {done.config.architecture}, {done.tensors} tensors of {checkpoint}, "
        f"layout {done.layout}"
    )
    print(f"mean {done.normalisation.mean}, std {done.normalisation.std}")
    print(f"left out: {', '.join(done.left_out) or 'nothing'}")
    if done.config.stem == "small":
        print(
            "warning: 3x3 stem: hemoco's has padding 1 and no max-pooling; checkpoint files do not "
            "record what theirs had"
        )
