"""`python -m jobs neighbours DEST KEY`: nearest images, by the features that `embed` wrote."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import tyro

from hemoco.data.shards.index import Shard, read_index, read_table, shard_url
from hemoco.data.shards.table import crc32c
from hemoco.errors import ShardError, UsageError
from hemoco.storage.fetch import FetchCounts, fetch_range
from hemoco.storage.objects import absolute_url, write_bytes
from jobs.arguments import File, read_arguments
from jobs.progress import printable

if TYPE_CHECKING:
    from hemoco.features.neighbours import Neighbour


def main(argv: list[str]) -> None:
    """Prints the neighbours."""
    read_arguments(neighbours, argv, command="neighbours")


def neighbours(
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")],
    key: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KEY")],
    /,
    *,
    k: int = 8,
    sheet: File = "",
) -> None:
    """Prints the images of a data set nearest to one of them, by cosine of their features.

    Args:
        dest: folder or s3:// URL to which `python -m jobs embed` has written features.
        key: key of the image.
        k: number of images to find.
        sheet: PNG file or URL for a contact sheet of the image and its neighbours.
    """
    # imported late: pyarrow takes a while, and wrong usage is reported at once
    from hemoco.features.neighbours import Neighbours

    features = Neighbours.open(dest)
    nearest = features.of(key, k)
    for one in nearest:
        columns = (
            f"{one.similarity:.4f}",
            printable(one.key),
            one.split,
            printable(one.class_name or ""),
        )
        print("  ".join(columns).rstrip())
    if sheet:
        _write_sheet(features.about, [features.itself(key), *nearest], sheet)


def _write_sheet(about: dict[str, str], images: "Iterable[Neighbour]", sheet: str) -> None:
    """Reads the images from their shards and draws them."""
    from PIL import Image

    # imported late: torch takes seconds
    from hemoco.data.decode import decode_image
    from hemoco.data.shards.contact_sheet import SheetSample, draw_sheet

    url = about["data_url"]
    index = read_index(url)
    if index.digest != about["data_digest"]:
        raise UsageError(
            f"{url}: its data has changed since these features were computed; embed it again, or "
            "leave out --sheet"
        )
    shards = {shard.name: shard for shard in index.shards}
    samples = []
    for one in images:
        encoded = _read_sample(url, shards[one.shard], one.key)
        pixels = decode_image(encoded).permute(1, 2, 0)  # (H, W, 3)
        caption = f"{one.similarity:.3f} {one.class_name or one.key}"
        samples.append(SheetSample(Image.fromarray(pixels.numpy()), caption, one.key))
    write_bytes(absolute_url(sheet), draw_sheet(samples))
    print(f"contact sheet: {sheet}")


def _read_sample(folder: str, shard: Shard, key: str) -> bytes:
    """Reads the encoded image of one sample by its byte range in the shard."""
    from hemoco.features.parquet import key_text

    table = read_table(folder, shard)
    url = shard_url(folder, shard)
    row = [key_text(each) for each in table.keys].index(key)
    begin = int(table.offsets[row])
    data = bytes(fetch_range(url, begin, begin + int(table.sizes[row]), FetchCounts()))
    if crc32c(data) != table.crcs[row]:
        raise ShardError(
            f"{url}: sample {key} is damaged or was replaced since its feature was computed"
        )
    return data
