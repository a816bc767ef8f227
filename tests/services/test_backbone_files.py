"""Backbones of other libraries are written to and read from object storage."""

from pathlib import Path

import torch

from hemoco.backbones.export import export_checkpoint
from hemoco.backbones.file import export_backbone, load_backbone, random_backbone
from hemoco.backbones.imports import Normalisation, import_backbone
from hemoco.config import EncoderConfig


def test_an_export_to_object_storage_is_imported_from_there(tmp_path: Path, bucket: str) -> None:
    normalisation = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    backbone = random_backbone(EncoderConfig(architecture="resnet18"), 0, *normalisation)
    export_backbone(backbone, str(tmp_path / "ours"), {"data_digest": "d", "run_id": "r"})
    export_checkpoint(str(tmp_path / "ours"), f"{bucket}/theirs.pth", "torchvision")
    import_backbone(
        f"{bucket}/theirs.pth", f"{bucket}/again.safetensors", normalisation=normalisation
    )
    expected = backbone.encoder.state_dict()
    found = load_backbone(f"{bucket}/again.safetensors").encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
