"""MoCo v2 steps of other libraries for step.py, each wired as in its own script, on the same case.

A step covers the same work as ours: both forward passes, backward, moving average, queue and SGD
with momentum, and whatever the script measures in every step. Each is timed as shipped and with
bf16 autocast and channels_last. Left out, in their favour, are DistributedDataParallel around the
official model, which its script requires, and Lightning's trainer.

None of their code is here: packages that are in no registry are read from a checkout.
"""

import copy
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from step_case import (
    EMBEDDING_SIZE,
    KEY_MOMENTUM,
    LR,
    MOMENTUM,
    TEMPERATURE,
    WEIGHT_DECAY,
    Case,
    Step,
    made_views,
    optimizer,
    precision,
)
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Peer:
    """Another library."""

    name: str
    build: Callable[[Case, str, Path], dict[bool, Step]]
    """Steps of a case on a device, from a checkout; by whether they have bf16 and channels_last."""
    module: str = ""
    """Which must be importable."""
    packages: tuple[str, ...] = ()
    """Which `uv run --with` brings where it is not."""
    checkout: str = ""
    """Option that names a checkout, and a file in it: `--option FILE`; none where empty."""
    passes: int = 1
    """Query passes per image; as many of keys. hemoco's step has one."""


def version(peer: Peer, checkout: Path) -> str:
    """Version of a package, or for a checkout a digest of the file that counts."""
    if not peer.checkout:
        return importlib.metadata.version(peer.module)
    file = peer.checkout.partition(" ")[2]
    return f"{file} {hashlib.sha256((checkout / file).read_bytes()).hexdigest()[:12]}"


def official(case: Case, device: str, checkout: Path) -> dict[bool, Step]:
    """facebookresearch/moco: its builder in a process group of one, stepped as in main_moco.py."""
    if device == "cpu":  # the builder moves indices and labels by .cuda()
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor  # type: ignore[method-assign,assignment]
    else:
        torch.backends.cudnn.benchmark = True  # as main_moco.py
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    builder = _module_of(checkout / "moco/builder.py")
    views, made = made_views(case, device), {}
    for lower in (False, True):
        model = builder.MoCo(
            _torchvision_encoder(case),
            EMBEDDING_SIZE,
            case.queue,
            KEY_MOMENTUM,
            TEMPERATURE,
            mlp=True,
        )
        made[lower] = _official_step(_formatted(model, device, lower), views, device, lower)
    return made


def lightly(case: Case, device: str, _: Path) -> dict[bool, Step]:
    """lightly: the blocks of its pytorch example.

    SGD has momentum, and the shuffling is that of its MoCo benchmark.
    """
    views = made_views(case, device)
    return {lower: _lightly_step(case, views, device, lower) for lower in (False, True)}


def solo_learn(case: Case, device: str, checkout: Path) -> dict[bool, Step]:
    """solo-learn: its MoCo v2+, symmetric, with the online classifier.

    Its scripts set 16 bits and channels_last.
    """
    # its package imports all methods and loaders; one is wanted
    for name in ("solo", "solo.methods"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    logging.getLogger("lightning").setLevel(logging.ERROR)
    views = made_views(case, device)
    return {lower: _solo_step(case, views, device, lower) for lower in (False, True)}


PEERS = (
    Peer("official", official, checkout="--moco-checkout moco/builder.py"),
    Peer("lightly", lightly, "lightly", ("lightly",)),
    Peer(
        "solo-learn",
        solo_learn,
        "lightning",
        ("lightning", "omegaconf", "timm<1"),
        checkout="--solo-checkout solo/methods/mocov2plus.py",
        passes=2,
    ),
)


def _module_of(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None, f"{file} is no Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torchvision_encoder(case: Case) -> Callable[..., nn.Module]:
    """A ResNet by number of classes; the small stem is that of MoCo's CIFAR demo."""

    def build(**settings: int) -> nn.Module:
        encoder: nn.Module = getattr(torchvision.models, case.architecture)(**settings)
        if case.stem == "small":
            encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            encoder.maxpool = nn.Identity()
        return encoder

    return build


def _formatted(model: nn.Module, device: str, lower: bool) -> nn.Module:
    layout = torch.channels_last if lower else torch.preserve_format
    return model.to(device).train().to(memory_format=layout)  # type: ignore[call-overload,no-any-return]


def _as_format(views: Sequence[Tensor], lower: bool) -> list[Tensor]:
    return [view.contiguous(memory_format=torch.channels_last) if lower else view for view in views]


def _official_step(
    model: nn.Module, views: tuple[Tensor, Tensor], device: str, lower: bool
) -> Step:
    sgd, criterion = optimizer(model.parameters()), nn.CrossEntropyLoss()

    def step() -> tuple[float, Tensor, Tensor]:
        queries, keys = _as_format(views, lower)
        with precision(device, lower=lower):
            output, target = model(im_q=queries, im_k=keys)
            loss = criterion(output, target)
        with torch.no_grad():
            hits = output.topk(5, dim=1).indices == target[:, None]  # (N, 5)
            top1, top5 = (hits[:, :top].any(dim=1).float().mean() for top in (1, 5))
        value = loss.item()
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        return value, top1, top5

    return step


def _lightly_step(case: Case, views: tuple[Tensor, Tensor], device: str, lower: bool) -> Step:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import (
        batch_shuffle,
        batch_unshuffle,
        deactivate_requires_grad,
        update_momentum,
    )

    resnet = _torchvision_encoder(case)()
    features = int(resnet.fc.in_features)  # type: ignore[union-attr,arg-type]
    backbone = _formatted(nn.Sequential(*list(resnet.children())[:-1]), device, lower)
    head = MoCoProjectionHead(features, features, EMBEDDING_SIZE).to(device)
    key_backbone, key_head = copy.deepcopy(backbone), copy.deepcopy(head)
    for module in (key_backbone, key_head):
        deactivate_requires_grad(module)
    criterion = NTXentLoss(
        temperature=TEMPERATURE, memory_bank_size=(case.queue, EMBEDDING_SIZE)
    ).to(device)
    sgd, total = (
        optimizer([*backbone.parameters(), *head.parameters()]),
        torch.zeros((), device=device),
    )

    def step() -> None:
        update_momentum(backbone, key_backbone, m=KEY_MOMENTUM)
        update_momentum(head, key_head, m=KEY_MOMENTUM)
        queries, keys = _as_format(views, lower)
        with precision(device, lower=lower):
            query = head(backbone(queries).flatten(start_dim=1))
            with torch.no_grad():
                shuffled, order = batch_shuffle(keys)
                key = batch_unshuffle(key_head(key_backbone(shuffled).flatten(start_dim=1)), order)
            loss = criterion(query, key)
        total.add_(loss.detach())
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    return step


def _solo_step(case: Case, views: tuple[Tensor, Tensor], device: str, lower: bool) -> Step:
    import omegaconf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from solo.methods.mocov2plus import MoCoV2Plus

    features = 512 if case.architecture == "resnet18" else 2048
    settings = {
        "method": "mocov2plus",
        "backbone": {"name": case.architecture},
        "data": {
            "dataset": "cifar10" if case.stem == "small" else "imagenet100",
            "num_classes": 100,
            "num_large_crops": 2,
            "num_small_crops": 0,
        },
        "max_epochs": 1,
        "optimizer": {
            "name": "sgd",
            "batch_size": case.batch,
            "lr": LR,
            "classifier_lr": LR,
            "weight_decay": WEIGHT_DECAY,
            "kwargs": {"momentum": MOMENTUM},
        },
        "scheduler": {"name": "none"},
        "momentum": {"base_tau": KEY_MOMENTUM, "final_tau": KEY_MOMENTUM},
        "method_kwargs": {
            "proj_hidden_dim": features,
            "proj_output_dim": EMBEDDING_SIZE,
            "temperature": TEMPERATURE,
            "queue_size": case.queue,
        },
        "performance": {"disable_channel_last": not lower},
    }
    model = MoCoV2Plus(omegaconf.OmegaConf.create(settings))
    model.log = model.log_dict = lambda *_, **__: None  # there is no trainer to take them
    _formatted(model, device, lower)
    sgd = model.configure_optimizers()
    batch = [
        torch.arange(case.batch),
        list(views),
        torch.zeros(case.batch, dtype=torch.int64, device=device),
    ]

    def step() -> None:
        with precision(device, lower=lower):
            loss = model.training_step(batch, 0)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        for pair in model.momentum_pairs:
            model.momentum_updater.update(*pair)

    return step
