"""`python -m jobs neighbours DEST KEY`: the images nearest to one of those that `embed` has written features of."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import tyro

from hemoco.data.shards.index import Shard, read_index, read_table, shard_url
from hemoco.data.shards.table import crc32c
from hemoco.errors import ShardError, UsageError
from hemoco.storage.fetch import FetchCounts, fetch_range
from hemoco.storage.objects import absolute_url, write_bytes
from jobs.progress import printable

if TYPE_CHECKING:
    from hemoco.features.neighbours import Neighbour


def main(argv: list[str]) -> None:
    """Looks up."""
    tyro.cli(neighbours, args=argv, prog="python -m jobs neighbours", use_underscores=True)


def neighbours(
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    key: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KEY")],
    /,
    *,
    k: int = 8,
    sheet: str = "",
) -> None:
    """The images nearest to one of a data set, by the cosine of their features.

    Args:
        dest: folder or s3:// URL that `python -m jobs embed` has written features to.
        key: of the image.
        k: images to find.
        sheet: PNG file or URL for a contact sheet of the image and its neighbours.
    """
    from hemoco.features.neighbours import (
        Neighbours,
    )  # pyarrow takes a while to import, errors should not

    known = Neighbours.open(dest)
    found = known.of(key, k)
    for one in found:
        name = "" if one.class_name is None else one.class_name
        print(
            f"{one.similarity:.4f}  {printable(one.key)}  {one.split}  {printable(name)}".rstrip()
        )
    if sheet:
        _write_sheet(known.about, [known.itself(key), *found], sheet)


def _write_sheet(about: dict[str, str], images: "Iterable[Neighbour]", sheet: str) -> None:
    """Reads the images from their shards and draws them."""
    from PIL import Image

    from hemoco.data.decode import decode_image
    from hemoco.data.shards.contact_sheet import (
        SheetSample,
        draw_sheet,
    )  # torch takes seconds to import

    url = about["data_url"]
    index = read_index(url)
    if index.digest != about["data_digest"]:
        raise UsageError(
            f"{url}: holds other data now than these features are of; embed it again, or leave out --sheet"
        )
    shards = {shard.name: shard for shard in index.shards}
    samples = []
    for one in images:
        pixels = decode_image(_encoded(url, shards[one.shard], one.key)).permute(
            1, 2, 0
        )  # (H, W, 3)
        caption = f"{one.similarity:.3f} {one.class_name or one.key}"
        samples.append(SheetSample(Image.fromarray(pixels.numpy()), caption, one.key))
    write_bytes(absolute_url(sheet), draw_sheet(samples))
    print(f"contact sheet: {sheet}")


def _encoded(url: str, shard: Shard, key: str) -> bytes:
    from hemoco.features.parquet import key_text

    table, where = read_table(url, shard), shard_url(url, shard)
    row = [key_text(known) for known in table.keys].index(key)
    offset = int(table.offsets[row])
    data = bytes(fetch_range(where, offset, offset + int(table.sizes[row]), FetchCounts()))
    if crc32c(data) != table.crcs[row]:
        raise ShardError(
            f"{where}: sample {key} is damaged or was replaced since its feature was computed"
        )
    return data
