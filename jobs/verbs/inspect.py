"""`python -m jobs inspect SHARDS`: what is in a shard folder, whether it is sound, and what it looks like."""

from typing import Annotated, NamedTuple

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cluster.local.ray import local_ray
from hemoco.data.shards.index import INDEX_VERSION, ShardIndex, read_index
from hemoco.data.shards.sampling import count_labels
from hemoco.errors import ShardError
from hemoco.storage.objects import absolute_url, write_bytes
from jobs.progress import follow, printable
from pipeline.shards.verify import Verified, verify_steps

_SHEET_SAMPLES = 64
_MOST_CLASSES = 20
_FEW_CLASSES = 5


def main(argv: list[str]) -> None:
    """Inspects."""
    tyro.cli(
        inspect,
        args=argv,
        prog="python -m jobs inspect",
        config=(tyro.conf.FlagCreatePairsOff,),
        use_underscores=True,
    )


def inspect(
    shards: Annotated[str, tyro.conf.Positional], /, *, verify: bool = False, sheet: str = ""
) -> None:
    """What is in a shard folder: splits, samples, bytes, sizes, labels, the digest.

    Args:
        shards: folder or s3:// URL that holds index.json.
        verify: read every shard again, in parallel, and compare sizes, checksums and tables; decode every image. Any
            damage: exit status 1.
        sheet: PNG file or URL for a contact sheet of 64 evenly spaced samples.
    """
    url = absolute_url(shards)
    index = read_index(url)
    verified = None
    if verify:
        with local_ray():
            verified = follow(verify_steps(url, index))
    origin = "" if index.packed else "tars of others, "
    print(f"{url}: {origin}format version {INDEX_VERSION}, digest {index.digest}")
    _print_listing(_splits(index))
    if verified is not None:
        _print_verified(verified, len(index.shards))
    _print_meaning(url, index, verified)
    if sheet:
        _write_sheet(url, index, sheet)


class _Listing(NamedTuple):
    """Facts as a table for a terminal and as lines for a file or another program."""

    head: list[str]
    rows: list[list[str]]
    lines: list[str]


def _splits(index: ShardIndex) -> _Listing:
    rows, lines = [], []
    for name in index.splits:
        shards = index.split(name)
        samples, sizes = sum(shard.samples for shard in shards), [shard.bytes for shard in shards]
        total, smallest, largest = (
            _readable(size) for size in (sum(sizes), min(sizes), max(sizes))
        )
        rows.append([name, str(samples), str(len(shards)), total, smallest, largest])
        lines.append(
            f"split {name}: {samples} samples in {len(shards)} shards of {smallest} to {largest}, {total}"
        )
    return _Listing(
        ["split", "samples", "shards", "size", "smallest shard", "largest shard"], rows, lines
    )


def _readable(size: float) -> str:
    """Bytes in the unit that leaves up to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _classes(index: ShardIndex, counts: dict[str, NDArray[np.int64]]) -> _Listing:
    """Images per class and split; of many classes those with the most and the fewest images."""
    order = list(range(len(index.classes)))
    if len(order) > _MOST_CLASSES:
        totals = np.sum([count[:-1] for count in counts.values()], axis=0)
        order = np.argsort(-totals, kind="stable").tolist()
        order[_FEW_CLASSES:-_FEW_CLASSES] = []
    rows, lines = [], []
    for place, label in enumerate(order):
        if place == _FEW_CLASSES and len(order) < len(index.classes):
            rest = f"({len(index.classes) - len(order)} classes between)"
            rows.append([rest])
            lines.append(rest)
        found = [str(count[label]) for count in counts.values()]
        rows.append([index.classes[label], *found])
        lines.append(
            f"class {index.classes[label]}: {', '.join(map(' '.join, zip(counts, found, strict=True)))}"
        )
    return _Listing([f"class (of {len(index.classes)})", *counts], rows, lines)


def _print_listing(listing: _Listing) -> None:
    console = Console()
    if not console.is_terminal:
        print("\n".join(map(printable, listing.lines)))
        return
    first, *others = (escape(printable(name)) for name in listing.head)
    table = Table(first, *(Column(name, justify="right") for name in others))
    for row in listing.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)


def _print_verified(verified: Verified, shards: int) -> None:
    """Prints all that is wrong; ShardError where it is damage."""
    for damage in verified.damages:
        print(f"damaged: {printable(damage)}")
    for flaw in verified.undecodable:
        print(
            f"warning: {printable(flaw)}; they stay in: training replaces them, an evaluation of their split refuses"
        )
    if verified.damages:
        raise ShardError(
            f"{verified.damaged} of {shards} shards are damaged, as listed; restore them, or pack the data again"
        )
    print(f"verified: sizes, checksums, tables and images of {shards} shards")


def _print_meaning(url: str, index: ShardIndex, verified: Verified | None) -> None:
    """Prints the labels and annotations; the tables of samples do not tell how many annotations there are."""
    counts = count_labels(url, index)
    if index.classes:
        _print_listing(_classes(index, counts))
        unlabelled = ", ".join(
            f"{split} {count[-1]}" for split, count in counts.items() if count[-1]
        )
        if unlabelled:
            print(f"without label: {unlabelled}")
    annotations = {} if verified is None else verified.annotations
    if index.categories or annotations:
        found = ", ".join(f"{split} {count}" for split, count in annotations.items())
        unknown = "counted by --verify" if verified is None else "none"
        print(f"{len(index.categories)} categories, annotations: {found or unknown}")


def _write_sheet(url: str, index: ShardIndex, sheet: str) -> None:
    from hemoco.data.shards.contact_sheet import (
        draw_sheet,
        sheet_samples,
    )  # torch takes seconds to import

    write_bytes(absolute_url(sheet), draw_sheet(sheet_samples(url, index, _SHEET_SAMPLES)))
    print(f"contact sheet: {sheet}")
