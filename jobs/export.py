"""`python -m jobs export BACKBONE DEST --format F`: a backbone for other libraries."""

from typing import Annotated, Literal

import tyro

from hemoco.interchange import export_checkpoint


def main(argv: list[str]) -> None:
    """Writes the file."""
    tyro.cli(export, args=argv, prog="python -m jobs export")


def export(
    backbone: Annotated[str, tyro.conf.Positional],
    dest: Annotated[str, tyro.conf.Positional],
    /,
    *,
    format: Literal["torchvision", "timm", "detectron2", "moco"],
) -> None:
    """A backbone as a file that another library loads.

    Args:
        backbone: URL or path of a backbone.safetensors.
        dest: file to write.
        format: whose names and layout.
    """
    export_checkpoint(backbone, dest, format)
    print(f"{dest}: {backbone} in the layout of {format}")
