"""Uses of storage, tracking and checkpoints in one process with full logging, for test_secrets.

python tests/helpers/secrets_walk.py STORAGE MLFLOW_THAT_REFUSES SQLITE
"""

import os
import sys
import traceback
from collections.abc import Callable

import torch

from hemoco.backbones.file import export_backbone, random_backbone
from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, flat_params
from hemoco.errors import HemocoError
from hemoco.storage.fetch import FetchCounts, fetch_range
from hemoco.storage.objects import (
    check_writable,
    exists,
    filesystem,
    join_url,
    list_names,
    read_bytes,
    remove,
    write_bytes,
)
from hemoco.tracking import client, metric_queue
from hemoco.tracking import runs as tracking
from hemoco.train.checkpoint import save_checkpoint
from hemoco.train.pretrain import build_state
from jobs.cli import main
from jobs.options import load_recipe
from tests.helpers.shard_folders import write_shards

CONFIG = PretrainConfig(
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=8, queue_length=16, bn_group_size=2),
    global_batch_size=16,
)


def expect_error(act: Callable[[], object]) -> None:
    """Prints an expected error in every form in which it could be shown."""
    try:
        act()
    except HemocoError as error:
        traceback.print_exc()
        print(
            "EXPECTED",
            str(error),
            repr(error),
            error.args,
            repr(error.__cause__),
            vars(error.__cause__ or error),
        )
    else:
        raise AssertionError("no error")


def use_storage(url: str) -> None:
    check_writable(url)
    write_shards(join_url(url, "shards"), [3])
    print(list_names(url), filesystem(url), vars(filesystem(url)[0]))
    names = [name for name in list_names(join_url(url, "shards")) if name.endswith(".tar")]
    print(len(fetch_range(join_url(url, "shards", names[0]), 0, 100, FetchCounts())))
    expect_error(lambda: read_bytes(join_url(url, "none")))
    expect_error(lambda: fetch_range(join_url(url, "none.tar"), 0, 9, FetchCounts()))
    expect_error(lambda: write_bytes("s3://no-such-bucket/x", b""))


def use_wrong_secret(url: str) -> None:
    right = os.environ["AWS_SECRET_ACCESS_KEY"]
    os.environ["AWS_SECRET_ACCESS_KEY"] = os.environ["WRONG_SECRET"]
    filesystem(url)[0].clear_instance_cache()
    expect_error(lambda: read_bytes(join_url(url, "a")))
    expect_error(lambda: write_bytes(join_url(url, "a"), b""))
    expect_error(lambda: exists(url))
    expect_error(
        lambda: fetch_range(join_url(url, "shards", "train-000000.tar"), 0, 100, FetchCounts())
    )
    os.environ["AWS_SECRET_ACCESS_KEY"] = right
    filesystem(url)[0].clear_instance_cache()


def use_tracking(url: str, refusing: str, sqlite: str) -> None:
    expect_error(lambda: client.connect(refusing))
    expect_error(
        lambda: client.connect(refusing.replace("://", f"://someone:{os.environ['URI_PASSWORD']}@"))
    )
    recipe = load_recipe("demo")
    tags = {"hemoco.run": "a", "hemoco.storage": url}
    params = flat_params(recipe)
    run_id = tracking.open_run(
        sqlite, client.connect(sqlite), name="a", parent=None, tags=tags, params=params
    )
    tracking.set_tags(
        sqlite, run_id, {"hemoco.backbone_url": join_url(url, "backbone.safetensors")}
    )
    tracking.log_dataset_input(
        sqlite, run_id, "cells", join_url(url, "shards"), "d" * 64, "pretraining"
    )
    tracking.log_artifact_bytes(
        sqlite, run_id, "a.txt", repr((recipe, tracking.run_facts(sqlite, run_id))).encode()
    )
    for uri in (sqlite, refusing):
        tracker = metric_queue.Tracker(uri, run_id, join_url(url, "unsent_metrics", run_id))
        tracker.log(1, {"loss": 1.0})
        tracker.close(timeout_s=3)
        print(tracker, vars(tracker))


def use_checkpoints(url: str) -> None:
    state = build_state(CONFIG, torch.device("cpu"), data_digest="d")
    print(
        save_checkpoint(state, join_url(url, "checkpoints"), attempt=0, keep_last=1),
        state.params,
        CONFIG,
    )
    backbone = random_backbone(CONFIG.encoder, 0, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    export_backbone(
        backbone, join_url(url, "backbone.safetensors"), {"data_digest": "d", "run_id": "r"}
    )
    remove(join_url(url, "nothing"))


if __name__ == "__main__":
    storage, refusing, sqlite = sys.argv[1:]
    main(["recipes", "--debug"])  # logs are from here on what --debug makes them
    use_storage(storage)
    use_wrong_secret(storage)
    use_tracking(storage, refusing, sqlite)
    use_checkpoints(storage)
    print("WALKED")
