"""A contact sheet: one image that shows some samples of a shard folder side by side."""

import io
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from hemoco.data.decode import UndecodableImage, decode_image
from hemoco.data.shards.index import ShardIndex
from hemoco.data.shards.sampling import spread_samples

_COLUMNS = 8
_SIDE = 160  # pixels of a tile
_LINE = 16  # pixels of a line of text
_GAP = 6  # pixels


class SheetSample(NamedTuple):
    """One tile of the sheet."""

    image: Image.Image | None
    """None where it could not be decoded."""
    caption: str
    detail: str
    """Second line, below the caption."""


def sheet_samples(url: str, index: ShardIndex, count: int) -> list[SheetSample]:
    """Evenly spaced samples over all splits; only their own bytes are read.

    Raises:
        ShardError: a table is missing or damaged, or a sample's bytes are not the packed ones.
        StorageError: the storage refuses or does not answer.
    """
    samples = []
    for sample in spread_samples(url, index.shards, count):
        caption, detail = sample.key, sample.split
        if 0 <= sample.label < len(index.classes):
            caption, detail = index.classes[sample.label], f"{sample.split} {sample.key}"
        samples.append(SheetSample(_decoded(sample.image), caption, detail))
    return samples


def draw_sheet(samples: Sequence[SheetSample]) -> bytes:
    """Draws a PNG of samples in rows of eight, each with its caption and detail below."""
    rows = -(-len(samples) // _COLUMNS)
    width, height = _SIDE + _GAP, _SIDE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * width + _GAP, rows * height + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, sample in enumerate(samples):
        row, column = divmod(number, _COLUMNS)
        left, top = _GAP + column * width, _GAP + row * height
        pen.rectangle((left, top, left + _SIDE - 1, top + _SIDE - 1), fill="#eeeeee")
        if sample.image is None:
            pen.text((left + 8, top + _SIDE // 2), "cannot be decoded", fill="#cc0000", font=font)
        else:
            tile = _fitted(sample.image)
            centred = left + (_SIDE - tile.width) // 2, top + (_SIDE - tile.height) // 2
            sheet.paste(tile, centred)
        caption, detail = _shorten(sample.caption, font), _shorten(sample.detail, font)
        pen.text((left, top + _SIDE), caption, fill="black", font=font)
        pen.text((left, top + _SIDE + _LINE), detail, fill="#777777", font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def _decoded(data: bytes) -> Image.Image | None:
    try:
        return Image.fromarray(decode_image(data).permute(1, 2, 0).numpy())  # (H, W, 3)
    except UndecodableImage:
        return None


def _fitted(image: Image.Image) -> Image.Image:
    """The image scaled to the size of a tile; small images are enlarged without smoothing."""
    scale = _SIDE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC
    return image.resize((width, height), method)


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text on one line; one that is too long keeps its end, in which keys differ."""
    # keys may hold bytes that are not UTF-8, as surrogates, which the font cannot draw
    text = text.encode("utf-8", "replace").decode().replace("\n", " ")
    while font.getlength(text) > _SIDE:
        text = "…" + text[2:]
    return text
