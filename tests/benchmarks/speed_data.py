"""Images of stream_speed.py: photos of ImageNet's size in tars and in other loaders' formats.

`main` converts, in an environment that has the other loader; its arguments are `mds` or `litdata`
and the folder that is served as a bucket, with the tars in `all` and `few`.
"""

import hashlib
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from big_sets import photo_files
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from hemoco.data.shards.index import Shard, ShardIndex, write_index, write_table
from hemoco.data.shards.tar import Sample, encode_shard, parse_tar

LONGEST_SIDE, QUALITY = 500, 90
SHARPER = ImageFilter.UnsharpMask(
    radius=1, percent=60
)  # gives them the bytes per pixel of ImageNet's photos
SHARDS, IMAGES_PER_SHARD = 36, 250
FEW_SHARDS, FEW_IMAGES_PER_SHARD = 2, 64
SIZES = {"all": [IMAGES_PER_SHARD] * SHARDS, "few": [FEW_IMAGES_PER_SHARD] * FEW_SHARDS}
"""Images per shard of each folder: one to measure, one to know what merely starting costs."""


def make_photos(data: Path, count: int) -> Iterator[bytes]:
    """JPEGs of real photos, each time another part, mirrored or not, a little lighter or darker."""
    paths = photo_files(data)
    rng = np.random.default_rng(0)
    for number in range(count):
        with Image.open(paths[number % len(paths)]) as photo:
            share = rng.uniform(0.8, 1)
            wide, high = int(photo.width * share), int(photo.height * share)
            left, top = rng.integers(photo.width - wide + 1), rng.integers(photo.height - high + 1)
            part = photo.convert("RGB").crop((left, top, left + wide, top + high))
        part.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        part = part.filter(SHARPER)
        if rng.random() < 0.5:
            part = ImageOps.mirror(part)
        buffer = io.BytesIO()
        ImageEnhance.Brightness(part).enhance(rng.uniform(0.8, 1.2)).save(
            buffer, "jpeg", quality=QUALITY
        )
        yield buffer.getvalue()


def write_tars(bucket: Path, data: Path) -> None:
    """Writes the shard folders `all` and `few`.

    Existing tars are kept; the files that hemoco writes beside them are made anew.
    """
    photos = make_photos(data, sum(map(sum, SIZES.values())))
    for name, sizes in SIZES.items():
        url, shards = (bucket / name).as_uri(), []
        (bucket / name).mkdir(parents=True, exist_ok=True)
        for place, (size, tar) in enumerate(zip(sizes, tar_names(name), strict=True)):
            path = bucket / name / tar
            if not path.exists():
                samples = [
                    Sample(f"{place:03d}_{number:04d}", next(photos), number % 10)
                    for number in range(size)
                ]
                path.write_bytes(encode_shard(samples))
            data = path.read_bytes()
            shard = Shard(path.name, "train", size, len(data), hashlib.sha256(data).hexdigest())
            write_table(url, shard, parse_tar(data, shard.name).table)
            shards.append(shard)
        write_index(url, ShardIndex(tuple(shards), tuple("abcdefghij"), ()))


def tar_names(name: str) -> list[str]:
    """The tars of a folder."""
    return [f"train-{place:06d}.tar" for place in range(len(SIZES[name]))]


def read_photos(bucket: Path, name: str) -> list[bytes]:
    """The JPEGs of a folder of tars."""
    tars = [bucket / name / tar for tar in tar_names(name)]
    return [
        sample.image for tar in tars for sample in parse_tar(tar.read_bytes(), tar.name).samples
    ]


def write_mds(bucket: Path) -> None:
    """The folders as mosaicml-streaming's shards of about the tars' size."""
    from streaming import MDSWriter

    for name in SIZES:
        with MDSWriter(
            out=str(bucket / f"{name}-mds"),
            columns={"jpg": "bytes"},
            size_limit=_shard_bytes(bucket),
        ) as out:
            for photo in read_photos(bucket, name):
                out.write({"jpg": photo})


def write_litdata(bucket: Path) -> None:
    """The folders as litdata's chunks of about the tars' size."""
    import litdata

    for name in SIZES:
        photos = read_photos(bucket, name)
        litdata.optimize(
            _jpg,
            photos,
            output_dir=str(bucket / f"{name}-litdata"),
            chunk_bytes=_shard_bytes(bucket),
            num_workers=1,
        )


def main() -> None:
    """Converts the tars as the command line says, unless that was done."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if not (folder / f"converted-{kind}").exists():
        for name in SIZES:  # what an interrupted conversion left
            shutil.rmtree(folder / f"{name}-{kind}", ignore_errors=True)
        {"mds": write_mds, "litdata": write_litdata}[kind](folder)
        (folder / f"converted-{kind}").touch()


def _jpg(photo: bytes) -> dict[str, bytes]:
    return {"jpg": photo}


def _shard_bytes(bucket: Path) -> int:
    return max(
        shard["bytes"]
        for shard in json.loads((bucket / "all" / "index.json").read_text())["shards"]
    )
