"""Files as other libraries write them, with the tensors of a resnet18."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

State = dict[str, Tensor]


def hollow(architecture: str, start: int) -> State:
    """Returns torchvision's state dict; each tensor repeats one number, so that it is small."""
    with torch.device("meta"):
        tensors = getattr(torchvision.models, architecture)().state_dict()
    return {
        name: torch.tensor(start + i, dtype=t.dtype).expand(t.shape)
        for i, (name, t) in enumerate(tensors.items())
    }


QUERY, KEY = hollow("resnet18", 1), hollow("resnet18", 1000)


def body(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def save(folder: Path, content: object, name: str = "theirs.pth") -> str:
    torch.save(content, folder / name)
    return str(folder / name)


def moco_v1_v2(state: State) -> State:
    head = {"fc.0.weight": torch.ones(2, 2), "fc.2.bias": torch.ones(2)}
    queue = {"queue": torch.ones(2, 4), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return under(
        "module.",
        under("encoder_q.", body(state) | head) | under("encoder_k.", body(KEY) | head) | queue,
    )


def moco_v3(state: State) -> State:
    head = {"fc.0.weight": torch.ones(2, 2), "fc.4.running_mean": torch.ones(2)}
    encoders = under("base_encoder.", body(state) | head) | under(
        "momentum_encoder.", body(KEY) | head
    )
    return under("module.", encoders | {"predictor.0.weight": torch.ones(2, 2)})


def vissl(state: State) -> dict[str, Any]:
    trunk = {
        "trunk": under("_feature_blocks.", body(state)),
        "heads": {"0.clf.0.weight": torch.ones(2, 2)},
    }
    return {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": trunk}}}


def lightly(state: State) -> dict[str, Any]:
    places = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    split = {name: name.partition(".") for name in body(state)}
    renamed = {
        f"backbone.{places[top]}.{rest}": state[name] for name, (top, _, rest) in split.items()
    }
    return {
        "pytorch-lightning_version": "2.0",
        "state_dict": renamed | {"projection_head.layers.0.bias": torch.ones(2)},
    }


def solo_learn(state: State) -> dict[str, Any]:
    others = {
        "projector.0.weight": torch.ones(2, 2),
        "queue": torch.ones(2, 2),
        "classifier.bias": torch.ones(2),
    }
    return {
        "epoch": 9,
        "state_dict": under("backbone.", body(state))
        | under("momentum_backbone.", body(KEY))
        | others,
    }


def mmselfsup(state: State) -> dict[str, Any]:
    sequential = under("encoder_q.0.", body(state)) | under("encoder_k.0.", body(state))
    return {
        "meta": {"epoch": 1},
        "state_dict": under("backbone.", body(state)) | sequential | {"queue": torch.ones(2)},
    }


LAYOUTS: dict[str, tuple[Callable[[State], object], str]] = {
    "moco v1/v2": (
        lambda state: {"epoch": 1, "arch": "resnet18", "state_dict": moco_v1_v2(state)},
        "MoCo v1/v2",
    ),
    "moco v3": (lambda state: {"arch": "resnet18", "state_dict": moco_v3(state)}, "MoCo v3"),
    "main_lincls": (lambda state: {"state_dict": under("module.", state)}, "torchvision or timm"),
    "torchvision": (lambda state: state, "torchvision or timm"),
    "torchvision references": (lambda state: {"model": state, "epoch": 3}, "torchvision or timm"),
    "timm": (lambda state: {"arch": "resnet18", "state_dict": dict(state)}, "torchvision or timm"),
    "solo-learn": (solo_learn, "solo-learn"),
    "lightly": (lightly, "lightly"),
    "vissl": (vissl, "vissl"),
    "mmselfsup": (mmselfsup, "solo-learn or mmselfsup"),
}
