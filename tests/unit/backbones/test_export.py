import dataclasses
import functools
import pickle
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from hemoco.backbones.export import export_checkpoint, official_names
from hemoco.backbones.file import export_backbone, load_backbone, random_backbone
from hemoco.backbones.imports import import_backbone
from hemoco.config import EncoderConfig, MoCoConfig, MoCoV3Config, PretrainConfig
from hemoco.errors import CheckpointError
from hemoco.models.build import Method, build_method
from hemoco.train.checkpoint import save_checkpoint
from hemoco.train.pretrain import build_state
from jobs.cli import main

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@functools.cache
def backbone_bytes(architecture: str, stem: Any) -> bytes:
    """A backbone whose BN statistics are not the initial ones, as after training."""
    backbone = random_backbone(
        EncoderConfig(architecture=architecture, stem=stem), 0, MEAN, STD
    ).train()
    backbone(IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        export_backbone(backbone, f"{folder}/b.safetensors", {"data_digest": "d", "run_id": "r"})
        return Path(folder, "b.safetensors").read_bytes()


def backbone_file(folder: Path, architecture: str, stem: Any = "imagenet") -> str:
    """The path of such a backbone, written into the folder."""
    (folder / "b.safetensors").write_bytes(backbone_bytes(architecture, stem))
    return str(folder / "b.safetensors")


def strip_fc(model: torch.nn.Module) -> torch.nn.Module:
    model.fc = torch.nn.Identity()
    return model.eval()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_torchvision_loads_it_strictly_and_computes_the_same(
    tmp_path: Path, architecture: str
) -> None:
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


def test_a_network_without_shortcuts_is_refused(tmp_path: Path) -> None:
    config = EncoderConfig(architecture="resnet18", shortcuts=False)
    export_backbone(random_backbone(config, 0, MEAN, STD), str(tmp_path / "b"), {})
    with pytest.raises(CheckpointError, match="has no shortcuts, and timm has no such ResNet"):
        export_checkpoint(str(tmp_path / "b"), str(tmp_path / "out"), "timm")


@pytest.mark.parametrize("fmt", ["torchvision", "detectron2", "moco"])
def test_architectures_that_others_lack_are_refused(tmp_path: Path, fmt: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{fmt} has no resnet10t.*format timm"):
        export_checkpoint(backbone_file(tmp_path, "resnet10t"), str(tmp_path / "out"), fmt)


def pretraining(
    moco: MoCoConfig | MoCoV3Config, architecture: str, **encoder: Any
) -> PretrainConfig:
    return PretrainConfig(encoder=EncoderConfig(architecture=architecture, **encoder), moco=moco)


def built(moco: MoCoConfig | MoCoV3Config, architecture: str = "resnet50") -> Method:
    return build_method(pretraining(moco, architecture), torch.device("cpu"))


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def assert_parts(state: dict[str, Tensor], expected: dict[str, int]) -> None:
    assert all(name.startswith("module.") for name in state)
    assert Counter(name.split(".")[1] for name in state) == expected


@pytest.mark.parametrize(("head", "tensors"), [("linear", 320), ("mlp", 322)])
def test_v1_and_v2_have_the_tensors_of_the_official_files(head: Any, tensors: int) -> None:
    """The files themselves are not available here, so counts, names and shapes are compared."""
    state = official_names(built(MoCoConfig(head=head)).state_dict())
    assert_parts(state, {"encoder_q": tensors, "encoder_k": tensors, "queue": 1, "queue_ptr": 1})
    assert state["module.queue"].shape == (128, 65536)
    assert (state["module.queue_ptr"].shape, state["module.queue_ptr"].dtype) == ((1,), torch.int64)
    model = torchvision.models.resnet50(num_classes=128)
    if head == "mlp":
        model.fc = nn.Sequential(nn.Linear(2048, 2048), nn.ReLU(), model.fc)
    model.load_state_dict(part(state, "module.encoder_k."), strict=True)
    model.load_state_dict(part(state, "module.encoder_q."), strict=True)


def test_v3_has_the_tensors_of_the_official_file() -> None:
    """The file itself is not available here, so counts, names and shapes are compared."""
    state = official_names(built(MoCoV3Config()).state_dict())
    assert_parts(state, {"base_encoder": 328, "momentum_encoder": 328, "predictor": 7})
    model = torchvision.models.resnet50()
    first, last = nn.Linear(2048, 4096, bias=False), nn.Linear(4096, 256, bias=False)
    model.fc = nn.Sequential(
        first, nn.BatchNorm1d(4096), nn.ReLU(), last, nn.BatchNorm1d(256, affine=False)
    )
    model.load_state_dict(part(state, "module.base_encoder."), strict=True)
    model.load_state_dict(part(state, "module.momentum_encoder."), strict=True)
    first, last = nn.Linear(256, 4096, bias=False), nn.Linear(4096, 256, bias=False)
    predictor = nn.Sequential(first, nn.BatchNorm1d(4096), nn.ReLU(), last)
    predictor.load_state_dict(part(state, "module.predictor."), strict=True)


SMALL = {
    "v1": MoCoConfig(head="linear", queue_length=256),
    "v2": MoCoConfig(queue_length=256),
    "v3": MoCoV3Config(),
}


@pytest.mark.parametrize("version", SMALL)
def test_an_official_file_of_ours_comes_back_with_equal_features(
    tmp_path: Path, version: str
) -> None:
    method = built(SMALL[version], "resnet18")
    method.query_encoder(IMAGES.repeat(16, 1, 1, 1))
    content = {
        "epoch": 1,
        "arch": "resnet18",
        "state_dict": official_names(method.state_dict()),
        "optimizer": {"state": {}},
    }
    torch.save(content, tmp_path / "official.pth.tar")
    import_backbone(str(tmp_path / "official.pth.tar"), str(tmp_path / "b"))
    with torch.no_grad():
        encoder = method.query_encoder.encoder.eval().to(memory_format=torch.contiguous_format)
        assert torch.equal(load_backbone(str(tmp_path / "b"))(IMAGES), encoder(IMAGES))


@pytest.mark.parametrize("version", SMALL)
def test_a_checkpoint_is_exported_as_an_official_file(tmp_path: Path, version: str) -> None:
    state = build_state(
        pretraining(SMALL[version], "resnet18"), torch.device("cpu"), data_digest="d"
    )
    url = save_checkpoint(state, str(tmp_path), attempt=0, keep_last=1)
    assert main(["export", url, str(tmp_path / "moco.pth"), "--format", "moco"]) == 0
    saved = torch.load(tmp_path / "moco.pth", weights_only=True)
    assert (saved["epoch"], saved["arch"]) == (0, "resnet18")
    expected = official_names(state.model.state_dict())
    assert saved["state_dict"].keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(saved["state_dict"][name], tensor), name


def test_a_checkpoint_has_no_other_format_and_no_small_stem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_state(
        pretraining(SMALL["v1"], "resnet18", stem="small"), torch.device("cpu"), data_digest="d"
    )
    url = save_checkpoint(state, str(tmp_path), attempt=0, keep_last=1)
    assert main(["export", url, str(tmp_path / "out"), "--format", "timm"]) == 2
    assert "format timm holds a backbone only" in capsys.readouterr().err
    assert main(["export", url, str(tmp_path / "out"), "--format", "moco"]) == 1
    assert "stem is 'small', which moco does not have" in capsys.readouterr().err


def test_a_head_that_no_official_version_has_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moco = dataclasses.replace(SMALL["v2"], head="mlp_bn")
    state = build_state(pretraining(moco, "resnet18"), torch.device("cpu"), data_digest="d")
    url = save_checkpoint(state, str(tmp_path), attempt=0, keep_last=1)
    assert main(["export", url, str(tmp_path / "out"), "--format", "moco"]) == 1
    assert "its head has batch normalisation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
