"""The parts of docs/reference/files.md that are read from files written for the purpose."""

import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch

from hemoco.backbones.file import export_backbone
from hemoco.config import (
    EncoderConfig,
    MoCoConfig,
    MoCoV3Config,
    OptimizerConfig,
    PretrainConfig,
    ViewsConfig,
)
from hemoco.data.shards.index import INDEX_NAME, read_index, read_table
from hemoco.data.shards.table import SampleTable
from hemoco.models.resnet import Backbone
from hemoco.report.files import contract_json
from hemoco.results.records import Pretraining, Row, RunResults
from hemoco.storage.objects import join_url, read_bytes
from hemoco.storage.tensor_files import read_safetensors_metadata
from hemoco.train.checkpoint import save_checkpoint
from hemoco.train.pretrain import build_state
from tests.helpers.reference_text import code
from tests.helpers.shard_folders import write_shards

_CPU = torch.device("cpu")
SMALL = PretrainConfig(
    global_batch_size=16,
    views=ViewsConfig(size=32),
    encoder=EncoderConfig(architecture="test_resnet"),
    moco=MoCoConfig(embedding_size=8, queue_length=32, bn_group_size=4),
)
SMALL_V3 = PretrainConfig(
    global_batch_size=16,
    encoder=EncoderConfig(architecture="test_resnet"),
    moco=MoCoV3Config(embedding_size=8, hidden_size=16),
    optimizer=OptimizerConfig(kind="lars"),
)


def files_blocks() -> dict[str, str]:
    """Text of each block of the page, with the keys of files that are written for it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        return {
            **_shard_blocks(root / "shards"),
            **_checkpoint_blocks(root / "checkpoints"),
            "header": _header(root / "backbone.safetensors"),
            "comparison": f"```text\n{_comparison()}\n```",
        }


def _shard_blocks(folder: Path) -> dict[str, str]:
    url = write_shards(folder.as_uri(), [2])
    index = json.loads((folder / INDEX_NAME).read_text())
    with safetensors.safe_open(next((folder / "samples").iterdir()), "numpy") as file:
        others = sorted(set(file.keys()) - set(SampleTable._fields))
    assert len(read_table(url, read_index(url).shards[0]).keys) == 2
    return {
        "index": f"- `format` is `{index['format']}`, `version` is {index['version']}\n"
        f"- keys: {code(index)}\n- keys of a shard: {code(index['shards'][0])}",
        "table": f"- columns: {code(SampleTable._fields)}\n- checksum of them all: {code(others)}",
    }


def _checkpoint_blocks(folder: Path) -> dict[str, str]:
    methods = {"v1 and v2": SMALL, "v3": SMALL_V3}
    lines = []
    for name, config in methods.items():
        state = build_state(config, _CPU, data_digest="digest")
        url = save_checkpoint(state, (folder / name).as_uri(), attempt=0, keep_last=1)
        manifest = json.loads(read_bytes(join_url(url, "manifest.json")))
        data = read_bytes(join_url(url, "state.pt"))
        saved = torch.load(io.BytesIO(data), weights_only=True)
        lines.append(f"- `model` of {name}: {code(_modules(saved['model']))}")
    return {
        "manifest": f"- `format` is `{manifest['format']}`\n- keys: {code(manifest)}",
        "state": "\n".join([f"- keys: {code(saved)}", *lines]),
    }


def _modules(names: Iterable[str]) -> list[str]:
    """The modules of a method in which tensors lie; of an encoder, its two parts."""
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        depth = 2 if parts[0].endswith("_encoder") else 1
        modules[".".join(parts[:depth]) + (".*" if len(parts) > depth else "")] = None
    return list(modules)


def _header(path: Path) -> str:
    state = build_state(SMALL, _CPU, data_digest="digest")
    views = ViewsConfig()
    backbone = Backbone(state.model.query_encoder.encoder, SMALL.encoder, views.mean, views.std)
    facts = {"data_digest": "DIGEST", "run_id": "RUN_ID", "size": str(views.size)}
    export_backbone(backbone, path.as_uri(), facts)
    header = read_safetensors_metadata(path.as_uri())
    return "\n".join(f"- `{name}`: `{header[name]}`" for name in sorted(header))


def _comparison() -> str:
    pretraining = Pretraining(
        run="NAME",
        run_id="RUN_ID",
        status="FINISHED",
        backbone_url="s3://bucket/runs/NAME/pretrain/backbone.safetensors",
        recipe="RECIPE",
        data_digest="DIGEST",
        loss=4.1,
        chance_loss=6.2,
        embedding_std=0.93,
        knn_top1=float("nan"),
    )
    row = Row(transfer="knn", metric="top1", init="pretrained", seed=0, value=0.83, run_id="RUN_ID")
    return contract_json(RunResults(pretraining=pretraining, rows=(row,), failed=())).strip()
