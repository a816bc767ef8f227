"""The nearest neighbours of an image among those whose features `python -m jobs embed` has written.

Exact: each look-up compares with all images, by cosine in float32. What is held in memory is the features as they are
stored (a million of 512 numbers: 2 GB in float32), their lengths and their keys.

Shapes: M images, P images at a time, F features.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import ArrayLike, NDArray

from hemoco.errors import UsageError
from hemoco.features.parquet import FILES_AT_ONCE, FeatureFile, list_files, not_parquet, parse_file
from hemoco.storage.objects import absolute_url, join_url, read_bytes

_SAME = ("backbone_sha256", "layer", "resize", "size")
_IMAGES_AT_ONCE = 16384


class Neighbour(NamedTuple):
    """An image that was found."""

    key: str
    similarity: float
    """Cosine, 1 for the same direction."""
    split: str
    label: int | None
    class_name: str | None
    shard: str
    """Its name in the index."""


class _Rows(NamedTuple):
    """The content of one file."""

    url: str
    file: FeatureFile
    table: pa.Table
    features: NDArray[np.floating[Any]]
    """(M, F)."""


class Neighbours:
    """Features of a data set to search, and what is known about its images."""

    def __init__(self, parts: list[_Rows]) -> None:
        """From the files of a folder; see `open`."""
        self._parts = [part.features for part in parts]
        self._lengths = [_lengths(features) for features in self._parts]
        self._columns = pa.concat_tables([part.table for part in parts]).combine_chunks()
        self._firsts = np.cumsum([0, *map(len, self._parts)])
        self._shards = [part.file.about["shard"] for part in parts]
        self.keys: list[str] = self._columns["key"].to_pylist()
        """Of all images, in the order of shards and rows."""
        self.about: dict[str, str] = parts[0].file.about
        """What the features follow from: backbone, data, transform."""

    @classmethod
    def open(cls, url: str) -> Self:
        """Reads the features of a folder.

        Args:
            url: URL or path, the DEST of `python -m jobs embed`.

        Raises:
            UsageError: there are none, they are not hemoco's, or are of several backbones or transforms.
            StorageError: the storage refuses or does not answer.
        """
        url = absolute_url(url)
        names = list_files(url)
        if not names:
            raise UsageError(
                f"{url}: no features here; `python -m jobs embed SHARDS BACKBONE {url}` writes them"
            )
        with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
            parts = list(threads.map(lambda name: _read_rows(join_url(url, name)), names))
        for part in parts:
            _check_same(parts[0], part)
        return cls(parts)

    def __len__(self) -> int:
        return len(self.keys)

    def of(self, key: str, k: int = 8) -> list[Neighbour]:
        """The k images nearest to one of them, itself left out, the nearest first.

        Raises:
            UsageError: there is no such image, or more than one, or fewer than k others.
        """
        row = self._row(key)
        self._check_k(k, len(self) - 1)
        similarities = self._similarities(self._feature(row))
        similarities[row] = -np.inf
        return self._nearest(similarities, k)

    def of_feature(self, vector: ArrayLike, k: int = 8) -> list[Neighbour]:
        """The k images whose features are nearest to a vector (F,) of any length, the nearest first.

        Raises:
            UsageError: the vector is not of F finite numbers, or there are fewer than k images.
        """
        query, width = np.asarray(vector, np.float32), self._parts[0].shape[1]
        if query.shape != (width,) or not np.isfinite(query).all():
            raise UsageError(
                f"a vector of shape {query.shape}: it must be {width} finite numbers, as the features are"
            )
        self._check_k(k, len(self))
        return self._nearest(self._similarities(query), k)

    def itself(self, key: str) -> Neighbour:
        """What is known about an image, as its own neighbour.

        Raises:
            UsageError: there is no such image, or more than one.
        """
        return self._neighbour(self._row(key), 1.0)

    def feature(self, key: str) -> NDArray[np.float32]:
        """The feature (F,) of an image.

        Raises:
            UsageError: there is no such image, or more than one.
        """
        return self._feature(self._row(key))

    def _row(self, key: str) -> int:
        rows = [row for row, known in enumerate(self.keys) if known == key]
        if len(rows) == 1:
            return rows[0]
        if not rows:
            raise UsageError(
                f"no image {key!r} among the {len(self)} here; keys look like {self.keys[:2]}"
            )
        shards = ", ".join(self._shard(row) for row in rows[:3])
        raise UsageError(
            f"{len(rows)} images have the key {key!r} (in {shards}): give a feature to `of_feature`"
        )

    def _feature(self, row: int) -> NDArray[np.float32]:
        part = self._part(row)
        found: NDArray[np.float32] = self._parts[part][row - self._firsts[part]].astype(np.float32)
        return found

    def _part(self, row: int) -> int:
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _shard(self, row: int) -> str:
        return self._shards[self._part(row)]

    def _check_k(self, k: int, most: int) -> None:
        if not 1 <= k <= most:
            raise UsageError(
                f"k is {k}: it must be between 1 and the {most} images there are to find"
            )

    def _similarities(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosines (M,) of a query (F,); a feature that is zero is like none."""
        length = np.linalg.norm(query)
        unit = query / length if length else query
        products = [block @ unit for part in self._parts for block in _blocks(part)]
        lengths = np.concatenate(self._lengths)
        found: NDArray[np.float32] = np.concatenate(products)
        found /= np.where(lengths > 0, lengths, 1)
        return found

    def _nearest(self, similarities: NDArray[np.float32], k: int) -> list[Neighbour]:
        """Of equal ones the first rows."""
        least = np.partition(similarities, -k)[-k]
        rows = np.flatnonzero(similarities >= least)
        order = rows[np.argsort(-similarities[rows], kind="stable")][:k]
        return [self._neighbour(row, float(similarities[row])) for row in order.tolist()]

    def _neighbour(self, row: int, similarity: float) -> Neighbour:
        split, label, name = (
            self._columns[column][row].as_py() for column in ("split", "label", "class_name")
        )
        return Neighbour(self.keys[row], similarity, split, label, name, self._shard(row))


def _read_rows(url: str) -> _Rows:
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(url)))
    except pa.ArrowException as error:
        raise not_parquet(url, error) from error
    file = parse_file(url, table.schema.metadata)
    column = table["feature"].combine_chunks()
    features = (
        column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), column.type.list_size)
    )
    # without metadata: schemas that differ in it could not be put together
    return _Rows(url, file, table.drop_columns(["feature"]).replace_schema_metadata(None), features)


def _check_same(first: _Rows, part: _Rows) -> None:
    for name in _SAME:
        one, other = first.file.about.get(name), part.file.about.get(name)
        if one != other:
            raise UsageError(
                f"{part.url}: its {name} is {other}, that of {first.url} is {one}: features compare only with equal "
                "ones; keep them in folders of their own"
            )


def _blocks(features: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.float32]]:
    """Features (P, F) in float32, in their order."""
    for first in range(0, len(features), _IMAGES_AT_ONCE):
        yield features[first : first + _IMAGES_AT_ONCE].astype(np.float32, copy=False)


def _lengths(features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Euclidean lengths (M,)."""
    found = [np.linalg.norm(block, axis=1) for block in _blocks(features)]
    return np.concatenate([np.zeros(0, np.float32), *found])
