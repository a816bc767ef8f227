"""The global batches of a pretraining, from the stream in this process alone."""

import dataclasses

import torch

from hemoco.config import PretrainConfig
from hemoco.data.shards.index import read_index
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.batches import batches, pretraining_plan
from hemoco.train.pretrain import batch_fingerprint


def fingerprints(shards: str, split: str, config: PretrainConfig) -> dict[int, float]:
    """Returns `batch_fingerprint` of every step, from 1, of a run that is never interrupted."""
    plan = pretraining_plan(config)
    source = batches(
        shards,
        read_index(shards),
        split,
        dataclasses.replace(plan, stream=dataclasses.replace(plan.stream, workers=0)),
        rank=0,
        world_size=1,
        start=None,
        device=torch.device("cpu"),
        bad_samples=BadSampleFile("memory://unwritten"),
    )
    return {
        step: batch_fingerprint(batch.keys, torch.device("cpu"))
        for step, batch in enumerate(source, 1)
    }
