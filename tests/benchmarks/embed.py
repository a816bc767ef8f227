"""Cost of `python -m jobs embed` beside the backbone alone; takes minutes.

    uv run python tests/benchmarks/embed.py --data DIR [--device cpu|cuda] [--threads 1]
        [--rounds 5] [--images 640] [--quick]

`embed_shards` makes Parquet files from shards on the disk: it reads, verifies, decodes, scales,
computes, writes. The bare forward pass has the same images decoded in memory, on the CPU, in the
same batches and precision. Their ratio shows how near embedding is to its bound, the backbone.
Reading and decoding alone is the third way.

Images are photos, scaled to at most 500 pixels and saved with quality 90, as ImageNet's are; crops
of 224. Ways take turns. On the CPU the figure is CPU time of all threads: decoding and computing
share the cores there, so the ratio is the share of the backbone. On a GPU it is wall time: decoding
is hidden as long as `--threads` cores keep up.
"""

import argparse
import dataclasses
import hashlib
import itertools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from big_sets import add_data_option
from decode import photos
from machine import describe_machine, table
from step_rounds import Goal, over_rounds, print_goals, take_turns
from torch import Tensor

from hemoco.backbones.file import export_backbone, load_backbone, random_backbone
from hemoco.config import EncoderConfig
from hemoco.data.decode import decode_image
from hemoco.data.shards.index import (
    Shard,
    ShardIndex,
    read_index,
    read_shard,
    write_index,
    write_table,
)
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar
from hemoco.data.transforms import center_view
from hemoco.features.embed import embed_shards
from hemoco.features.extract import extract_features
from hemoco.features.plan import EmbedConfig, EmbedPlan, plan_embedding
from hemoco.storage.objects import join_url, write_bytes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARD = 320
EMBED, FORWARD, DECODE = "embed", "bare forward pass", "read and decode only"
GOALS = {"cpu": 0.85, "cuda": 0.9}


def write_photos(data: Path, url: str, count: int) -> None:
    """Shards of so many photos, each repeated as often as needed."""
    images, shards = itertools.cycle(list(photos(data))), []
    for number in range(count // SHARD):
        data = encode_shard([Sample(f"{number}_{row}", next(images), 0) for row in range(SHARD)])
        shard = Shard(
            f"train-{number:06d}.tar", "train", SHARD, len(data), hashlib.sha256(data).hexdigest()
        )
        write_bytes(join_url(url, shard.name), data)
        write_table(url, shard, parse_tar(data, shard.name).table)
        shards.append(shard)
    write_index(url, ShardIndex(tuple(shards), ("a",), ()))


def decoded(plan: EmbedPlan, threads: int) -> list[Tensor]:
    """The crops of each shard (M, 3, S, S)."""
    config = plan.config
    with ThreadPoolExecutor(threads) as pool:
        return [
            torch.stack(
                list(
                    pool.map(
                        lambda sample: _crop(sample, config), read_shard(plan.shards_url, shard)
                    )
                )
            )
            for shard in read_index(plan.shards_url).shards
        ]


def forward(plan: EmbedPlan, shards: list[Tensor], device: torch.device) -> Callable[[], None]:
    """A pass over images in memory."""
    backbone = load_backbone(plan.backbone_url).to(device, memory_format=torch.channels_last)
    parts = [part.contiguous(memory_format=torch.channels_last) for part in shards]
    parts = [part.pin_memory() if device.type == "cuda" else part for part in parts]
    lower = plan.config.precision != "float32"

    def run() -> None:
        with torch.autocast(
            device.type, getattr(torch, plan.config.precision) if lower else None, enabled=lower
        ):
            for part in parts:
                for images in part.split(plan.config.batch_size):
                    features = extract_features(
                        backbone, images.to(device, non_blocking=True), plan.config.batch_size
                    )
        features.cpu()

    return run


def measure(plan: EmbedPlan, device: torch.device, threads: int, rounds: int) -> Goal:
    """Prints images per second of each way, and how near embedding is to the backbone alone."""
    shards, images = read_index(plan.shards_url).shards, decoded(plan, threads)
    ways: dict[str, Callable[[], object]] = {
        EMBED: lambda: list(embed_shards(plan, shards, device=device, threads=threads)),
        FORWARD: forward(plan, images, device),
        DECODE: lambda: decoded(plan, threads),
    }
    for way in ways.values():
        way()
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    found = take_turns(list(ways), rounds, lambda name: _seconds(ways[name], clock))
    count = sum(map(len, images))
    rows = []
    for name in ways:
        speed = over_rounds(found, lambda seconds, name=name: count / seconds[name])
        rows.append((name, speed.median, speed.spread()))
    what = f"{load_backbone(plan.backbone_url).config.architecture}, {plan.config.precision}"
    unit = "CPU-s" if device.type == "cpu" else "s"
    print(
        table(
            f"{what}: {count} photos, crops of {plan.config.size}",
            ("way", f"images/{unit}", "range"),
            rows,
        )
    )
    return Goal(
        f"{what}: embed / bare",
        over_rounds(found, lambda s: s[FORWARD] / s[EMBED]),
        GOALS[device.type],
    )


def _crop(sample: Sample, config: EmbedConfig) -> Tensor:
    return center_view(decode_image(sample.image), config.size, config.resize)


def _seconds(way: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    way()
    return clock() - began


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="that decode, and on the CPU compute"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument(
        "--quick", action="store_true", help="one network, one round, to see that it runs"
    )
    add_data_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU time of all threads"
    print(
        describe_machine(("torch", "simplejpeg", "pyarrow"), f"{where}; {options.threads} threads"),
        flush=True,
    )
    precisions = ("float32",) if options.device == "cpu" else ("float32", "bfloat16")
    names, rounds = (
        (("resnet18",), 1) if options.quick else (("resnet18", "resnet50"), options.rounds)
    )
    goals = []
    with tempfile.TemporaryDirectory() as folder:
        write_photos(options.data, f"{folder}/shards", SHARD if options.quick else options.images)
        for name, precision in itertools.product(names, precisions):
            made, url = (
                random_backbone(EncoderConfig(architecture=name), 0, MEAN, STD),
                f"{folder}/{name}",
            )
            export_backbone(made, url, {})
            config = EmbedConfig(size=224, resize=256, precision=precision)
            plan = plan_embedding(
                f"{folder}/shards", read_index(f"{folder}/shards"), url, f"{folder}/out", config
            )
            plan = dataclasses.replace(plan, dest=f"{folder}/{name}-{precision}")
            goals.append(measure(plan, torch.device(options.device), options.threads, rounds))
    print_goals("embed: goals", goals)
    print(describe_machine(("torch",), "at the end"))


if __name__ == "__main__":
    main()
