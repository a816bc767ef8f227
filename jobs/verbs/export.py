"""`python -m jobs export BACKBONE DEST --format F`: a backbone for other libraries."""

from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError
from jobs.arguments import read_arguments


def main(argv: list[str]) -> None:
    """Writes the file."""
    read_arguments(export, argv, command="export")


def export(
    backbone: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BACKBONE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    format: Literal["torchvision", "timm", "detectron2", "moco"],
) -> None:
    """Writes a backbone as a file that another library loads.

    Args:
        backbone: URL or path of a backbone.safetensors. For format moco also the folder of a
            checkpoint, which gives both encoders, their heads, and the queue or the predictor.
        dest: URL or path of the file to write.
        format: library whose tensor names and file layout are used.
    """
    # imported late: torch takes seconds, and wrong usage is reported at once
    from hemoco.backbones.export import export_checkpoint, export_method
    from hemoco.train.checkpoint import is_checkpoint

    if not is_checkpoint(backbone):
        export_checkpoint(backbone, dest, format)
    elif format == "moco":
        export_method(backbone, dest)
    else:
        raise UsageError(
            f"{backbone} is a checkpoint: format {format} holds a backbone only, give a "
            "backbone.safetensors"
        )
    print(f"{dest}: {backbone} in the layout of {format}")
