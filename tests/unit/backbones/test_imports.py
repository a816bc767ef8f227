"""Import of files in the formats of other libraries, filled with random tensors."""

import hashlib
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

from hemoco.backbones.export import export_checkpoint
from hemoco.backbones.file import backbone_metadata, export_backbone, load_backbone, random_backbone
from hemoco.backbones.imports import Imported, Normalisation, import_backbone
from hemoco.backbones.layouts import PLAIN_ARCHITECTURES, detectron2_name
from hemoco.config import EncoderConfig
from hemoco.errors import CheckpointError, ConfigError
from jobs.cli import main
from tests.helpers.foreign_files import (
    KEY,
    LAYOUTS,
    QUERY,
    State,
    body,
    hollow,
    moco_v1_v2,
    save,
    under,
)

IMAGES = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> State:
    """The state dict after a forward pass in training mode, which changes the BN statistics."""
    model.train()(IMAGES)
    return model.state_dict()


def imported(url: str, **settings: Any) -> tuple[Imported, State]:
    """Imports a file; returns the outcome and the tensors of the imported backbone."""
    dest = f"{url}.safetensors"
    done = import_backbone(url, dest, **settings)
    return done, load_backbone(dest).encoder.state_dict()


def assert_same(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_its_backbone_tensor_for_tensor(layout, tmp_path):
    write, name = LAYOUTS[layout]
    done, tensors = imported(save(tmp_path, write(QUERY)))
    assert (done.layout, done.tensors) == (name, 120)
    assert done.config == EncoderConfig(architecture="resnet18")
    assert_same(tensors, body(QUERY))


@pytest.mark.parametrize("fmt", ["torchvision", "timm", "detectron2", "moco"])
def test_export_then_import_gives_the_backbone_again(fmt, tmp_path):
    config = EncoderConfig(architecture="resnet18")
    backbone = random_backbone(config, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)).train()
    backbone(IMAGES)
    export_backbone(backbone, str(tmp_path / "ours"), {"data_digest": "d", "run_id": "r"})
    export_checkpoint(str(tmp_path / "ours"), str(tmp_path / "theirs"), fmt)
    done, tensors = imported(str(tmp_path / "theirs"))
    expected = backbone.encoder.state_dict()
    if fmt == "detectron2":  # its files have no counters of batches
        for name in expected:
            if name.endswith("num_batches_tracked"):
                expected[name] = torch.tensor(0)
    assert_same(tensors, expected)
    # timm's is the only format that records the normalisation
    assert (done.normalisation.mean == (0.5, 0.4, 0.3)) == (fmt == "timm")


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_torchvision_timm_and_hemoco_compute_bit_equal_features(architecture, tmp_path):
    theirs = getattr(torchvision.models, architecture)()
    state = trained(theirs)
    import_backbone(save(tmp_path, state), str(tmp_path / "b"))
    theirs.fc = nn.Identity()
    timms = timm.create_model(architecture, num_classes=0)
    timms.load_state_dict(body(state), strict=True)
    with torch.no_grad():
        features = load_backbone(str(tmp_path / "b"))(IMAGES)
        assert torch.equal(features, theirs.eval()(IMAGES))
        assert torch.equal(features, timms.eval()(IMAGES))


@pytest.mark.parametrize("layout", ["moco v1/v2", "moco v3", "solo-learn"])
def test_the_key_encoder_is_taken_only_when_asked_for(layout, tmp_path):
    url = save(tmp_path, LAYOUTS[layout][0](QUERY))
    _, tensors = imported(url, encoder="key")
    assert_same(tensors, body(KEY))
    assert "key encoder" in backbone_metadata(f"{url}.safetensors")["source"]


def test_a_file_with_one_encoder_has_no_key_encoder(tmp_path):
    with pytest.raises(CheckpointError, match="layout torchvision or timm has no key encoder"):
        imported(save(tmp_path, QUERY), encoder="key")


def test_heads_are_named_and_modules_counted(tmp_path):
    done, _ = imported(save(tmp_path, {"state_dict": moco_v1_v2(QUERY)}))
    expected = [
        "encoder_q.fc.0.weight",
        "encoder_q.fc.2.bias",
        "encoder_k.* (122)",
        "queue",
        "queue_ptr",
    ]
    assert sorted(done.left_out) == sorted(expected)


def test_the_metadata_record_the_import_and_its_source(tmp_path):
    url = save(tmp_path, QUERY)
    imported(url)
    metadata = backbone_metadata(f"{url}.safetensors")
    assert metadata["source"] == "imported from torchvision or timm (query encoder)"
    assert metadata["source_sha256"] == hashlib.sha256(Path(url).read_bytes()).hexdigest()
    assert (metadata["run_id"], metadata["data_digest"]) == ("", "unknown")


@pytest.mark.parametrize(
    ("layout", "declared"), [("timm", ""), *((name, "resnet18") for name in LAYOUTS)]
)
def test_a_missing_tensor_is_named(layout, declared, tmp_path):
    state = {name: tensor for name, tensor in QUERY.items() if name != "layer3.1.bn2.running_var"}
    write, name = LAYOUTS[layout]
    with pytest.raises(
        CheckpointError, match=rf"layout {name}: .*resnet18: layer3\.1\.bn2\.running_var is missing"
    ):
        imported(save(tmp_path, write(state)), architecture=declared)


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        ("moco v1/v2", "module.encoder_q.layer5.weight"),
        ("moco v1/v2", "module.classifier.weight"),
        ("moco v3", "module.base_encoder.layer5.weight"),
        ("moco v3", "module.queue"),
        ("solo-learn", "backbone.layer5.weight"),
        ("solo-learn", "backbone.fc.weight"),
        ("vissl", "_feature_blocks.layer5.weight"),
        ("main_lincls", "module.layer5.weight"),
        ("timm", "fc.2.weight"),
    ],
)
def test_an_unexpected_tensor_is_named(layout, extra, tmp_path):
    content: Any = LAYOUTS[layout][0](QUERY)
    inner = (
        content["classy_state_dict"]["base_model"]["model"]["trunk"]
        if layout == "vissl"
        else content["state_dict"]
    )
    inner[extra] = torch.ones(1)
    last = ".".join(extra.split(".")[-2:]) if extra.count(".") > 1 else extra.split(".")[-1]
    with pytest.raises(CheckpointError, match=rf"is not a resnet18: (\w+\.)?{last} is unexpected"):
        imported(save(tmp_path, content), architecture="resnet18")


def test_another_shape_or_kind_of_number_is_named(tmp_path):
    wider = QUERY | {"layer2.0.conv1.weight": torch.ones(129, 64, 3, 3)}
    with pytest.raises(
        CheckpointError, match=r"layer2\.0\.conv1\.weight has shape \(129, 64, 3, 3\), not \(128,"
    ):
        imported(save(tmp_path, wider))
    whole = QUERY | {"bn1.weight": torch.ones(64, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"bn1\.weight is torch\.int8, not torch\.float32"):
        imported(save(tmp_path, whole))


def test_few_of_many_differences_are_named(tmp_path):
    url = save(tmp_path, {"arch": "resnet34", "state_dict": QUERY})
    with pytest.raises(
        CheckpointError,
        match=r"is not a resnet34: layer1\.2\.conv1\.weight is missing; .* and 93 more",
    ):
        imported(url)


@pytest.mark.parametrize("architecture", ["resnet34", "resnext50_32x4d"])
def test_the_architecture_is_inferred_from_the_tensors_alone(architecture, tmp_path):
    done, _ = imported(save(tmp_path, hollow(architecture, 1)))
    assert done.config.architecture == architecture


def test_no_two_plain_architectures_have_the_same_tensors():
    shapes = []
    for architecture in PLAIN_ARCHITECTURES:
        state = hollow(architecture, 1)
        shapes.append({name: tensor.shape for name, tensor in state.items()})
    assert not [pair for pair in itertools.combinations(shapes, 2) if pair[0] == pair[1]]


def test_an_architecture_that_cannot_be_inferred_must_be_named(tmp_path):
    url = save(tmp_path, timm.create_model("resnet10t").state_dict())
    with pytest.raises(
        CheckpointError, match=r"nearest is resnet18: .*; name the architecture with --architecture"
    ):
        imported(url)
    assert imported(url, architecture="resnet10t")[0].config.architecture == "resnet10t"


def test_a_vision_transformer_is_no_resnet(tmp_path):
    state = {"module.base_encoder.blocks.0.attn.qkv.weight": torch.ones(3, 1)}
    with pytest.raises(
        CheckpointError, match=r"layout MoCo v3: .*'vit_small': it must be one of timm's ResNets"
    ):
        imported(save(tmp_path, {"arch": "vit_small", "state_dict": state}))


def test_the_small_stem_is_recognised_by_the_shape_of_the_first_convolution(tmp_path):
    model = torchvision.models.resnet18()
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    model.fc = nn.Identity()
    url = save(tmp_path, {"state_dict": under("backbone.", trained(model))})
    done, _ = imported(url)
    assert done.config.stem == "small"
    with torch.no_grad():
        assert torch.equal(load_backbone(f"{url}.safetensors")(IMAGES), model.eval()(IMAGES))


def test_counters_of_batches_may_be_absent_altogether_but_not_in_part(tmp_path):
    counters = [name for name in QUERY if name.endswith("num_batches_tracked")]
    without = {name: tensor for name, tensor in QUERY.items() if name not in counters}
    done, _ = imported(save(tmp_path, without))  # like torchvision's files of 2017 and 2018
    assert done.tensors == 120
    with pytest.raises(CheckpointError, match=rf"{counters[1]} is missing"):
        imported(save(tmp_path, without | {counters[0]: torch.tensor(1)}))


def test_half_precision_becomes_float32(tmp_path):
    _, tensors = imported(save(tmp_path, torchvision.models.resnet18().half().state_dict()))
    assert tensors["conv1.weight"].dtype == torch.float32


def test_safetensors_of_others_are_read(tmp_path):
    safetensors.torch.save_file(
        {name: t.contiguous() for name, t in QUERY.items()},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    done, tensors = imported(str(tmp_path / "model.safetensors"))
    assert_same(tensors, body(QUERY))
    assert done.normalisation.mean == (0.485, 0.456, 0.406)


def test_an_invalid_mean_in_the_file_must_be_given_instead(tmp_path):
    tensors = {name: t.contiguous() for name, t in QUERY.items()}
    safetensors.torch.save_file(
        tensors, tmp_path / "model.safetensors", {"mean": "[0.5]", "std": "[0.5]"}
    )
    with pytest.raises(CheckpointError, match="give --mean and --std"):
        imported(str(tmp_path / "model.safetensors"))


def test_a_backbone_of_ours_is_refused(tmp_path):
    backbone = random_backbone(EncoderConfig(architecture="resnet18"), 0, (0.5,) * 3, (0.5,) * 3)
    export_backbone(backbone, str(tmp_path / "b"), {})
    with pytest.raises(CheckpointError, match="a backbone of hemoco already"):
        imported(str(tmp_path / "b"))


def test_mean_and_std_are_settings_of_images_in_0_to_1(tmp_path):
    url = save(tmp_path, QUERY)
    imported(url, normalisation=Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))
    backbone = load_backbone(f"{url}.safetensors")
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    with pytest.raises(
        ConfigError, match=r"mean is \(123.*: it must be that of images in \[0, 1\]"
    ):
        imported(url, normalisation=Normalisation((123.675, 116.28, 103.53), (0.2, 0.3, 0.25)))


@pytest.mark.parametrize(
    "content", [{"optimizer": {"lr": 1}}, {"conv9.weight": torch.ones(1)}, [1]]
)
def test_the_content_of_a_file_without_a_known_state_dict_is_named(content, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"'optimizer'|conv9.*in no known layout; known are|holds a list"
    ):
        imported(save(tmp_path, content))


def test_a_pickle_of_detectron2_is_read_and_its_classifier_named(tmp_path):
    state = {name: t for name, t in QUERY.items() if not name.endswith("num_batches_tracked")}
    arrays = {detectron2_name(name): tensor.numpy() for name, tensor in state.items()}
    content = {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "r18.pkl").write_bytes(pickle.dumps(content))
    done, tensors = imported(str(tmp_path / "r18.pkl"))
    assert (done.layout, done.left_out) == ("detectron2", ["stem.fc.weight", "stem.fc.bias"])
    assert not [name for name in body(state) if not torch.equal(tensors[name], state[name])]


def test_the_command_prints_the_imported_and_the_left_out_tensors(tmp_path, capsys):
    url, dest = save(tmp_path, QUERY), str(tmp_path / "b.safetensors")
    assert main(["import", url, dest, "--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{dest}: resnet18, 120 tensors of {url}, layout torchvision or timm"
    assert lines[1:] == [
        "mean (0.5, 0.5, 0.5), std (0.2, 0.2, 0.2)",
        "left out: fc.weight, fc.bias",
    ]


def test_the_command_fails_in_one_line_and_writes_nothing(tmp_path, capsys):
    url = save(tmp_path, {name: t for name, t in QUERY.items() if name != "conv1.weight"})
    assert main(["import", url, str(tmp_path / "b"), "--architecture", "resnet18"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "conv1.weight is missing" in lines[0]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    "options", [["--mean", ".5", ".5", ".5"], ["--mean", "9", "9", "9", "--std", "1", "1", "1"]]
)
def test_half_or_wrong_normalisation_is_wrong_usage(options, tmp_path, capsys):
    url = save(tmp_path, QUERY)
    assert main(["import", url, str(tmp_path / "b"), *options]) == 2
    assert main(["import", url, url]) == 2
    assert "mean" in capsys.readouterr().err


def test_help_lists_the_formats_and_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    printed = set(capsys.readouterr().out.split())
    options = {"--architecture", "--encoder", "--mean", "--std"}
    assert {"solo-learn,", "FILE", "DEST"} | options <= printed
