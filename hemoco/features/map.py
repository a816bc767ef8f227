"""Features of some images in the plane, and which images are nearest to each other.

Shapes: M images, F features, T x T pixels of a thumbnail.
"""

import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hemoco.features.sample import FeatureSample

CLASS_COLOURS = (
    "#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499", "#BBBBBB",
)  # fmt: skip
"""Of the classes, as long as there are so few: Paul Tol's muted scheme, which colour-blind readers can tell apart."""
MIN_IMAGES = 20
"""For a map: fewer have no neighbourhoods."""
_WIDTH, _HEIGHT = 34, 24  # cells of the map
_CELL = 44  # pixels
_FRAME = 4  # pixels
_PERPLEXITY = 20.0
_ALIKE = 1e-3  # float16 of vectors of length 1 resolves no less


class NearImage(NamedTuple):
    """One neighbour."""

    row: int
    similarity: float
    """Cosine."""


def draw_map(sample: FeatureSample) -> bytes:
    """A PNG of the thumbnails where t-SNE (van der Maaten and Hinton 2008) puts them, framed in their class's colour.

    Each has a cell of its own: the nearest one that is free.

    Args:
        sample: of at least MIN_IMAGES images.
    """
    cells = place_in_cells(_positions(sample), _WIDTH, _HEIGHT)
    canvas = Image.new("RGB", (_WIDTH * _CELL, _HEIGHT * _CELL), "white")
    coloured = has_colours(sample)
    for row, (column, line) in enumerate(cells):
        label = int(sample.labels[row])
        known = coloured and 0 <= label < len(sample.classes)
        frame = Image.new(
            "RGB", (_CELL - 2, _CELL - 2), CLASS_COLOURS[label] if known else "#DDDDDD"
        )
        side = _CELL - 2 - 2 * _FRAME
        frame.paste(
            thumbnail(sample, row).resize((side, side), Image.Resampling.BICUBIC), (_FRAME, _FRAME)
        )
        canvas.paste(frame, (column * _CELL + 1, line * _CELL + 1))
    return encode_png(canvas.quantize(256, dither=Image.Dither.NONE))


def all_alike(sample: FeatureSample) -> bool:
    """Whether all images have the same features: a collapsed backbone, of which there is no map."""
    return bool((sample.features.float().std(dim=0, correction=0) < _ALIKE).all())


def has_colours(sample: FeatureSample) -> bool:
    """Whether there are so few classes that each has a colour."""
    return 0 < len(sample.classes) <= len(CLASS_COLOURS)


def nearest(sample: FeatureSample, k: int) -> list[list[NearImage]]:
    """For each image the k others with the most similar features, the nearest first."""
    similarities = _similarities(sample)
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :k]  # (M, k)
    return [
        [NearImage(int(other), float(similarities[row, other])) for other in others]
        for row, others in enumerate(order)
    ]


def chosen_rows(sample: FeatureSample, count: int) -> list[int]:
    """Rows to show, from as many classes as there are, evenly spaced where there are no labels."""
    labels: list[int] = sample.labels.tolist()
    by_class: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        by_class.setdefault(label, []).append(row)
    if len(by_class) == 1:
        return sorted({place * len(labels) // count for place in range(min(count, len(labels)))})
    rounds = max(len(rows) for rows in by_class.values())
    in_turn = (
        rows[turn]
        for turn in range(rounds)
        for _, rows in sorted(by_class.items())
        if turn < len(rows)
    )
    return list(itertools.islice(in_turn, count))


def thumbnail(sample: FeatureSample, row: int) -> Image.Image:
    """One of the images."""
    return Image.fromarray(sample.thumbnails[row].permute(1, 2, 0).numpy())  # (T, T, 3)


def encode_png(image: Image.Image) -> bytes:
    """The image's file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def place_in_cells(
    positions: NDArray[np.float64], width: int, height: int
) -> list[tuple[int, int]]:
    """A cell (column, line) of a grid for each position (M, 2), the nearest that is free; M <= width x height.

    Those in the middle choose first: what is pushed aside moves outwards, where there is room.
    """
    low, high = positions.min(axis=0), positions.max(axis=0)
    scaled = (positions - low) / np.maximum(high - low, 1e-12) * (width - 1, height - 1)  # (M, 2)
    free = (
        np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
        .reshape(-1, 2)
        .astype(float)
    )
    cells = [(0, 0)] * len(positions)
    for row in np.argsort(((scaled - np.median(scaled, axis=0)) ** 2).sum(axis=1), kind="stable"):
        place = int(((free - scaled[row]) ** 2).sum(axis=1).argmin())
        cells[row] = (int(free[place, 0]), int(free[place, 1]))
        free[place] = np.inf
    return cells


def same_label_share(sample: FeatureSample, near: Sequence[Sequence[NearImage]]) -> float | None:
    """How often the nearest image has the same label; None where there are no labels."""
    labels: list[int] = sample.labels.tolist()
    known = [row for row, label in enumerate(labels) if label >= 0]
    if not known:
        return None
    return sum(labels[near[row][0].row] == labels[row] for row in known) / len(known)


def _positions(sample: FeatureSample) -> NDArray[np.float64]:
    """(M, 2)."""
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(sample.keys) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=0)
    return np.asarray(tsne.fit_transform(_unit(sample)), dtype=np.float64)


def _similarities(sample: FeatureSample) -> NDArray[Any]:
    """Cosines (M, M), the diagonal below all others."""
    unit = _unit(sample)
    similarities = unit @ unit.T
    np.fill_diagonal(similarities, -np.inf)
    return similarities


def _unit(sample: FeatureSample) -> NDArray[np.float32]:
    features = sample.features.float().numpy()
    return np.asarray(
        features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12),
        dtype=np.float32,
    )
