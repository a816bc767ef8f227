"""`python -m jobs export BACKBONE DEST --format F`: a backbone for other libraries."""

from typing import Annotated, Literal

import tyro

from hemoco.errors import UsageError


def main(argv: list[str]) -> None:
    """Writes the file."""
    tyro.cli(export, args=argv, prog="python -m jobs export")


def export(
    backbone: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BACKBONE")],
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    /,
    *,
    format: Literal["torchvision", "timm", "detectron2", "moco"],
) -> None:
    """A backbone as a file that another library loads.

    Args:
        backbone: URL or path of a backbone.safetensors; for format moco also of a checkpoint's folder, which gives both
            encoders, their heads and the queue or the predictor.
        dest: URL or path of the file to write.
        format: whose names and layout.
    """
    from hemoco.backbones.export import (  # torch takes seconds to import, errors should not
        export_checkpoint,
        export_method,
    )
    from hemoco.train.checkpoint import is_checkpoint

    if not is_checkpoint(backbone):
        export_checkpoint(backbone, dest, format)
    elif format == "moco":
        export_method(backbone, dest)
    else:
        raise UsageError(
            f"{backbone} is a checkpoint: format {format} has only backbones, give a backbone.safetensors"
        )
    print(f"{dest}: {backbone} in the layout of {format}")
