import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision

from hemoco.checkpoint import export_backbone, load_backbone, random_backbone
from hemoco.config import EncoderConfig
from hemoco.errors import CheckpointError
from hemoco.interchange import export_checkpoint
from hemoco.storage import read_bytes

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def backbone_file(folder: Path, architecture: str, stem: Any = "imagenet") -> str:
    """A backbone whose BN statistics are not the initial ones, as after training."""
    backbone = random_backbone(EncoderConfig(architecture=architecture, stem=stem), 0, MEAN, STD).train()
    backbone(IMAGES)
    export_backbone(backbone, str(folder / "b.safetensors"), {"data_digest": "d", "run_id": "r"})
    return str(folder / "b.safetensors")


def strip_fc(model: torch.nn.Module) -> torch.nn.Module:
    model.fc = torch.nn.Identity()
    return model.eval()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_torchvision_loads_it_strictly_and_computes_the_same(tmp_path: Path, architecture: str) -> None:
    url = backbone_file(tmp_path, architecture)
    export_checkpoint(url, str(tmp_path / "tv.pth"), "torchvision")
    model = strip_fc(getattr(torchvision.models, architecture)())
    model.load_state_dict(torch.load(tmp_path / "tv.pth", weights_only=True), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), load_backbone(url)(IMAGES))


@pytest.mark.parametrize("architecture", ["resnet50", "resnet10t"])
def test_timm_loads_it_strictly_and_computes_the_same(tmp_path: Path, architecture: str) -> None:
    url = backbone_file(tmp_path, architecture)
    dest = tmp_path / "timm.safetensors"
    export_checkpoint(url, str(dest), "timm")
    model = timm.create_model(architecture, num_classes=0, checkpoint_path=str(dest)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), load_backbone(url)(IMAGES))


def test_detectron2_file_has_its_names_and_layout(tmp_path: Path) -> None:
    url = backbone_file(tmp_path, "resnet50")
    export_checkpoint(url, str(tmp_path / "d2.pkl"), "detectron2")
    content = pickle.loads((tmp_path / "d2.pkl").read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    assert len(content["model"]) == 53 * 5  # 53 convolutions, each with a BN of four
    ours = load_backbone(url).encoder.state_dict()
    pairs = {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
        "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias",
        "res4.5.conv2.weight": "layer3.5.conv2.weight",
        "res5.2.conv3.norm.running_mean": "layer4.2.bn3.running_mean",
    }
    for theirs, name in pairs.items():
        assert np.array_equal(content["model"][theirs], ours[name].numpy())


def test_official_linear_probe_finds_all_but_its_classifier(tmp_path: Path) -> None:
    url = backbone_file(tmp_path, "resnet18")
    export_checkpoint(url, str(tmp_path / "moco.pth"), "moco")
    saved = torch.load(tmp_path / "moco.pth", weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (0, "resnet18")
    prefix = "module.encoder_q."
    assert all(name.startswith(prefix) for name in saved["state_dict"])
    tensors = {name.removeprefix(prefix): tensor for name, tensor in saved["state_dict"].items()}
    model = torchvision.models.resnet18()
    report = model.load_state_dict(tensors, strict=False)
    assert (set(report.missing_keys), report.unexpected_keys) == ({"fc.weight", "fc.bias"}, [])
    with torch.no_grad():
        torch.testing.assert_close(strip_fc(model)(IMAGES), load_backbone(url)(IMAGES))


@pytest.mark.parametrize("fmt", ["torchvision", "timm", "detectron2", "moco"])
def test_small_stem_is_refused_everywhere(tmp_path: Path, fmt: Any) -> None:
    with pytest.raises(CheckpointError, match=f"stem is 'small', which {fmt} does not have"):
        export_checkpoint(backbone_file(tmp_path, "resnet18", "small"), str(tmp_path / "out"), fmt)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fmt", ["torchvision", "detectron2", "moco"])
def test_architectures_that_others_lack_are_refused(tmp_path: Path, fmt: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{fmt} has no resnet10t.*format timm"):
        export_checkpoint(backbone_file(tmp_path, "resnet10t"), str(tmp_path / "out"), fmt)


def test_export_goes_to_object_storage_too(tmp_path: Path, bucket: str) -> None:
    export_checkpoint(backbone_file(tmp_path, "resnet18"), f"{bucket}/tv.pth", "torchvision")
    assert len(torch.load(io.BytesIO(read_bytes(f"{bucket}/tv.pth")), weights_only=True)) == 120
