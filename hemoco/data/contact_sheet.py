"""A contact sheet: some samples of a shard folder side by side, for a person to look at."""

import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby
from operator import itemgetter
from threading import Lock
from typing import NamedTuple

import google_crc32c
from PIL import Image, ImageDraw, ImageFont

from hemoco.data.decode import UndecodableImage, decode_image
from hemoco.data.fetch import FetchCounts, fetch_range
from hemoco.data.shards import ShardIndex, read_table, shard_url
from hemoco.errors import ShardError

_decoding = Lock()  # Pillow's warnings are filtered for the whole process
_COLUMNS = 8
_SIDE = 160  # of a tile, pixels
_LINE = 16  # of a caption, pixels
_GAP = 6
_THREADS = 16


class SheetSample(NamedTuple):
    """One picture of the sheet."""

    image: Image.Image | None
    """None where it could not be decoded."""
    caption: str
    split: str


def sheet_samples(url: str, index: ShardIndex, count: int) -> list[SheetSample]:
    """Evenly spaced samples over all splits; only their own bytes are read.

    Raises:
        ShardError: a table is missing or damaged, or the bytes of a sample are not those that were packed.
        StorageError: the storage refuses or does not answer.
    """
    places = _spread([shard.samples for shard in index.shards], count)
    chosen = {number: [row for _, row in rows] for number, rows in groupby(places, itemgetter(0))}
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(lambda number: _read_samples(url, index, number, chosen[number]), chosen)
        return [sample for samples in found for sample in samples]


def draw_sheet(samples: Sequence[SheetSample]) -> bytes:
    """A PNG of samples in rows of eight, each with its caption and split below."""
    rows = -(-len(samples) // _COLUMNS)
    width, height = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, sample in enumerate(samples):
        left, top = _GAP + number % _COLUMNS * width, _GAP + number // _COLUMNS * height
        pen.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill="#eeeeee")
        if sample.image is None:
            pen.text((left + 8, top + _SIDE // 2), "cannot be decoded", fill="#cc0000", font=font)
        else:
            tile = _fitted(sample.image)
            sheet.paste(tile, (left + (_SIDE - tile.width) // 2, top + (_SIDE - tile.height) // 2))
        pen.text((left, top + _SIDE), _shorten(sample.caption, font), fill="black", font=font)
        pen.text((left, top + _SIDE + _LINE), _shorten(sample.split, font), fill="#777777", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _spread(sizes: Sequence[int], count: int) -> Iterator[tuple[int, int]]:
    """(shard number, row) of `count` samples evenly spaced over shards of these sizes; of all where there are fewer."""
    ends = list(accumulate(sizes, initial=0))
    count = min(count, ends[-1])
    for place in (number * ends[-1] // count for number in range(count)):
        shard = bisect_right(ends, place) - 1
        yield shard, place - ends[shard]


def _read_samples(url: str, index: ShardIndex, number: int, rows: Sequence[int]) -> list[SheetSample]:
    shard, classes = index.shards[number], index.classes
    table, where = read_table(url, shard), shard_url(url, shard)
    samples = []
    for row in rows:
        offset, size, label = int(table.offsets[row]), int(table.sizes[row]), int(table.labels[row])
        data = bytes(fetch_range(where, offset, offset + size, FetchCounts()))
        if google_crc32c.value(data) != table.crcs[row]:
            raise ShardError(f"{where}: sample {table.keys[row]} at byte {offset} is damaged or was replaced")
        caption = classes[label] if 0 <= label < len(classes) else table.keys[row]
        samples.append(SheetSample(_decoded(data), caption, shard.split))
    return samples


def _decoded(data: bytes) -> Image.Image | None:
    try:
        with _decoding:
            return Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())  # (H, W, 3)
    except UndecodableImage:
        return None


def _fitted(image: Image.Image) -> Image.Image:
    """The image as large as a tile allows; pixels of small ones stay visible."""
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of a text that is too long for a tile, for keys differ there; on one line."""
    text = text.encode("utf-8", "replace").decode().replace("\n", " ")
    while font.getlength(text) > _SIDE:
        text = "…" + text[2:]
    return text
