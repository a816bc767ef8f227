"""A pretraining without Ray, in the loop that runs in Ray's workers.

    torchrun --nproc-per-node 2 tests/helpers/torchrun_training.py SHARDS OUT

It writes the losses of all steps to OUT.
"""

import dataclasses
import json
import sys
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed as dist

from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, pretraining_plan, steps_per_epoch
from hemoco.distributed import rank, world_size
from hemoco.train.pretrain import build_state, train_steps

CONFIG = PretrainConfig(
    epochs=1,
    global_batch_size=16,
    log_every_steps=1,
    views=ViewsConfig(size=32),
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    moco=MoCoConfig(embedding_size=16, queue_length=32, bn_group_size=4),
    stream=StreamConfig(workers=0, lanes=2),
)


def train(shards: str) -> list[float]:
    """Returns the losses of one epoch, the same on every rank."""
    index, device = read_index(shards), torch.device("cpu")
    state = build_state(CONFIG, device, data_digest=index.digest)
    plan = pretraining_plan(CONFIG)
    per_epoch = steps_per_epoch(index, "train", plan)
    with (
        closing(BadSampleFile("memory://bad.jsonl")) as bad_samples,
        closing(
            batches(
                shards,
                read_index(shards),
                "train",
                dataclasses.replace(plan, epochs=1),
                rank=rank(),
                world_size=world_size(),
                start=state.position,
                device=device,
                bad_samples=bad_samples,
            )
        ) as source,
    ):
        return [metrics.values["loss"] for metrics in train_steps(state, source, per_epoch)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    losses = train(sys.argv[1])
    if rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps({"ranks": world_size(), "losses": losses}))
    dist.destroy_process_group()
