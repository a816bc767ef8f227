"""`python -m jobs inspect SHARDS`: the content of a shard folder, its soundness and its look."""

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
from jobs.arguments import File, read_arguments
from jobs.progress import follow, printable
from pipeline.shards.verify import Verified, verify_steps

_SHEET_SAMPLES = 64
_MOST_CLASSES = 20
_FEW_CLASSES = 5


def main(argv: list[str]) -> None:
    """Prints what the folder holds."""
    read_arguments(inspect, argv, command="inspect", config=(tyro.conf.FlagCreatePairsOff,))


def inspect(
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")],
    /,
    *,
    verify: bool = False,
    sheet: File = "",
) -> None:
    """Prints the splits, samples, sizes, labels and digest of a shard folder.

    Args:
        shards: folder or s3:// URL that holds index.json.
        verify: read every shard again, in parallel; compare sizes, checksums and tables, and decode
            every image. Any damage ends in exit status 1.
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
    _print_labels(url, index, verified)
    if sheet:
        _write_sheet(url, index, sheet)


class _Listing(NamedTuple):
    """Facts as a table for a terminal, and as lines for a file or another program."""

    head: list[str]
    rows: list[list[str]]
    lines: list[str]


def _splits(index: ShardIndex) -> _Listing:
    rows, lines = [], []
    for name in index.splits:
        shards = index.split(name)
        samples = sum(shard.samples for shard in shards)
        sizes = [shard.bytes for shard in shards]
        total = _readable(sum(sizes))
        smallest = _readable(min(sizes))
        largest = _readable(max(sizes))
        rows.append([name, str(samples), str(len(shards)), total, smallest, largest])
        lines.append(
            f"split {name}: {samples} samples in {len(shards)} shards of {smallest} to {largest}, "
            f"{total}"
        )
    head = ["split", "samples", "shards", "size", "smallest shard", "largest shard"]
    return _Listing(head, rows, lines)


def _readable(size: float) -> str:
    """Formats bytes in the unit that leaves up to three digits before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def _classes(index: ShardIndex, counts: dict[str, NDArray[np.int64]]) -> _Listing:
    """Lists images per class and split; if there are many classes, the largest and the smallest."""
    labels = list(range(len(index.classes)))
    if len(labels) > _MOST_CLASSES:
        # the last entry of each count is that of unlabelled images
        totals = np.sum([count[:-1] for count in counts.values()], axis=0)
        labels = np.argsort(-totals, kind="stable").tolist()
        labels[_FEW_CLASSES:-_FEW_CLASSES] = []
    omitted = len(index.classes) - len(labels)
    rows, lines = [], []
    for position, label in enumerate(labels):
        if omitted and position == _FEW_CLASSES:
            gap = f"({omitted} classes between)"
            rows.append([gap])
            lines.append(gap)
        images = [str(count[label]) for count in counts.values()]
        rows.append([index.classes[label], *images])
        per_split = (f"{split} {number}" for split, number in zip(counts, images, strict=True))
        lines.append(f"class {index.classes[label]}: {', '.join(per_split)}")
    return _Listing([f"class (of {len(index.classes)})", *counts], rows, lines)


def _print_listing(listing: _Listing) -> None:
    console = Console()
    if not console.is_terminal:
        print("\n".join(printable(line) for line in listing.lines))
        return
    first, *others = (escape(printable(name)) for name in listing.head)
    table = Table(first, *(Column(name, justify="right") for name in others))
    for row in listing.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    console.print(table)


def _print_verified(verified: Verified, shards: int) -> None:
    """Prints all that is wrong.

    Raises:
        ShardError: a shard is damaged.
    """
    for damage in verified.damages:
        print(f"damaged: {printable(damage)}")
    for flaw in verified.undecodable:
        print(
            f"warning: {printable(flaw)}; they stay in: training replaces them, an evaluation of "
            "their split refuses"
        )
    if verified.damages:
        raise ShardError(
            f"{verified.damaged} of {shards} shards are damaged, as listed; restore them, or pack "
            "the data again"
        )
    print(f"verified: sizes, checksums, tables and images of {shards} shards")


def _print_labels(url: str, index: ShardIndex, verified: Verified | None) -> None:
    """Prints labels and annotations; only `--verify` counts annotations, the tables do not."""
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
        per_split = ", ".join(f"{split} {count}" for split, count in annotations.items())
        unknown = "counted by --verify" if verified is None else "none"
        print(f"{len(index.categories)} categories, annotations: {per_split or unknown}")


def _write_sheet(url: str, index: ShardIndex, sheet: str) -> None:
    # imported late: torch takes seconds
    from hemoco.data.shards.contact_sheet import draw_sheet, sheet_samples

    write_bytes(absolute_url(sheet), draw_sheet(sheet_samples(url, index, _SHEET_SAMPLES)))
    print(f"contact sheet: {sheet}")
