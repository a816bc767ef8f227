"""A map of images by their features, and the nearest neighbours among them.

Shapes: M images, F features, T x T pixels of a thumbnail.
"""

import io
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hemoco.features.sample import FeatureSample

CLASS_COLOURS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933",
    "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB",
)  # fmt: skip
"""Colours of up to ten classes: Paul Tol's muted scheme, which is safe for colour-blind readers."""
MIN_IMAGES = 20
"""Fewest images for a map: fewer have no neighbourhoods to see."""
_WIDTH, _HEIGHT = 34, 24  # cells of the map
_CELL = 44  # pixels
_FRAME = 4  # pixels
_PERPLEXITY = 20.0
_SMALLEST_DEVIATION = 1e-3  # the resolution of float16 for vectors of length 1


class NearImage(NamedTuple):
    """A neighbour of an image of the sample."""

    row: int
    similarity: float
    """Cosine similarity."""


def draw_map(sample: FeatureSample) -> bytes:
    """Draws the thumbnails at their t-SNE positions (van der Maaten and Hinton 2008), as a PNG.

    Every thumbnail has a grid cell of its own, the nearest free one, and a frame in the colour of
    its class.

    Args:
        sample: at least MIN_IMAGES images.
    """
    cells = place_in_cells(_positions(sample), _WIDTH, _HEIGHT)
    canvas = Image.new("RGB", (_WIDTH * _CELL, _HEIGHT * _CELL), "white")
    coloured = has_colours(sample)
    side = _CELL - 2 - 2 * _FRAME
    for row, (column, line) in enumerate(cells):
        label = int(sample.labels[row])
        known = coloured and 0 <= label < len(sample.classes)
        colour = CLASS_COLOURS[label] if known else "#DDDDDD"
        frame = Image.new("RGB", (_CELL - 2, _CELL - 2), colour)
        small = thumbnail(sample, row).resize((side, side), Image.Resampling.BICUBIC)
        frame.paste(small, (_FRAME, _FRAME))
        canvas.paste(frame, (column * _CELL + 1, line * _CELL + 1))
    return encode_png(canvas.quantize(256, dither=Image.Dither.NONE))


def all_alike(sample: FeatureSample) -> bool:
    """Returns True if all features are equal: the backbone has collapsed, so there is no map."""
    deviations = sample.features.float().std(dim=0, correction=0)  # (F,)
    return bool((deviations < _SMALLEST_DEVIATION).all())


def has_colours(sample: FeatureSample) -> bool:
    """Returns True if the sample has classes, and few enough for each to have a colour."""
    return 0 < len(sample.classes) <= len(CLASS_COLOURS)


def nearest(sample: FeatureSample, k: int) -> list[list[NearImage]]:
    """The k nearest other images of each image, nearest first."""
    unit = _unit(sample)
    similarities = unit @ unit.T  # (M, M)
    np.fill_diagonal(similarities, -np.inf)  # an image is not its own neighbour
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]  # (M, k)
    neighbours = []
    for row, others in enumerate(order.tolist()):
        neighbours.append([NearImage(other, float(similarities[row, other])) for other in others])
    return neighbours


def chosen_rows(sample: FeatureSample, count: int) -> list[int]:
    """Chooses rows to show, one of each class in turn, or evenly spaced if there is one class."""
    labels: list[int] = sample.labels.tolist()
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    if len(by_class) == 1:
        return sorted({index * len(labels) // count for index in range(min(count, len(labels)))})
    classes = [rows for _, rows in sorted(by_class.items())]
    rounds = itertools.zip_longest(*classes)  # first rows of all classes, then second rows, ...
    in_turn = [row for row in itertools.chain.from_iterable(rounds) if row is not None]
    return in_turn[:count]


def thumbnail(sample: FeatureSample, row: int) -> Image.Image:
    """The thumbnail of a row as a Pillow image."""
    return Image.fromarray(sample.thumbnails[row].permute(1, 2, 0).numpy())  # (T, T, 3)


def encode_png(image: Image.Image) -> bytes:
    """Encodes an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def place_in_cells(
    positions: NDArray[np.float64], width: int, height: int
) -> list[tuple[int, int]]:
    """Assigns each position the nearest free cell of a grid.

    Positions near the centre choose first, so the others are displaced outwards, where cells are
    free.

    Args:
        positions: (M, 2), with M <= width * height.
        width: columns of the grid.
        height: lines of the grid.

    Returns:
        The cell (column, line) of each position.
    """
    low, high = positions.min(axis=0), positions.max(axis=0)
    scaled = (positions - low) / np.maximum(high - low, 1e-12) * (width - 1, height - 1)  # (M, 2)
    columns, lines = np.meshgrid(np.arange(width), np.arange(height))
    free = np.stack([columns.ravel(), lines.ravel()], axis=1).astype(float)  # (cells, 2)
    cells = [(0, 0)] * len(positions)
    from_centre = ((scaled - np.median(scaled, axis=0)) ** 2).sum(axis=1)  # (M,)
    for row in np.argsort(from_centre, kind="stable"):
        cell = int(((free - scaled[row]) ** 2).sum(axis=1).argmin())
        cells[row] = (int(free[cell, 0]), int(free[cell, 1]))
        free[cell] = np.inf  # taken
    return cells


def same_label_share(sample: FeatureSample, near: Sequence[Sequence[NearImage]]) -> float | None:
    """The fraction of labelled images whose nearest image has the same label.

    None if no image has a label.
    """
    labels: list[int] = sample.labels.tolist()
    known = [row for row, label in enumerate(labels) if label >= 0]
    if not known:
        return None
    return sum(labels[near[row][0].row] == labels[row] for row in known) / len(known)


def _positions(sample: FeatureSample) -> NDArray[np.float64]:
    """t-SNE positions (M, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(sample.keys) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0)
    return np.asarray(tsne.fit_transform(_unit(sample)), dtype=np.float64)


def _unit(sample: FeatureSample) -> NDArray[np.float32]:
    """The features in float32, normalised again since float16 has rounded their length (M, F)."""
    features = sample.features.float().numpy()
    lengths = np.linalg.norm(features, axis=1, keepdims=True)  # (M, 1)
    return np.asarray(features / np.maximum(lengths, 1e-12), dtype=np.float32)
