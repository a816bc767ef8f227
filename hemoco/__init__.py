"""hemoco: pretrain ResNets with MoCo on streamed image shards and measure how they transfer."""

from typing import TYPE_CHECKING, Any

from hemoco.version import __version__

if TYPE_CHECKING:
    from hemoco.backbones.file import load_backbone

__all__ = ["__version__", "load_backbone"]


def __getattr__(name: str) -> Any:
    """Imports `load_backbone` on first use, so that `import hemoco` does not import torch."""
    if name == "load_backbone":
        from hemoco.backbones.file import load_backbone

        return load_backbone
    raise AttributeError(f"module 'hemoco' has no attribute {name!r}")
