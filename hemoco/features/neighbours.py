"""Nearest-neighbour search in the features that `python -m jobs embed` has written.

The search is exact: every query is compared with all images, by cosine similarity in float32.
Memory holds the features as they are stored (2 GB for a million images with 512 float32 features),
their norms and the keys.

Shapes: M images, P images in a block, F features.
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

# metadata that must be equal in all files, or their features are not comparable
_SAME = ("backbone_sha256", "layer", "resize", "size")
_IMAGES_AT_ONCE = 16384  # images of a block that is converted to float32


class Neighbour(NamedTuple):
    """An image and its similarity to the query."""

    key: str
    similarity: float
    """Cosine similarity, 1 for the same direction."""
    split: str
    label: int | None
    class_name: str | None
    shard: str
    """Name of its shard in the index."""


class _Rows(NamedTuple):
    """The content of one file."""

    url: str
    file: FeatureFile
    table: pa.Table
    features: NDArray[np.floating[Any]]
    """(M, F)."""


class Neighbours:
    """A searchable index of the features of a data set; create it with `open`."""

    def __init__(self, parts: list[_Rows]) -> None:
        """Builds the index from the contents of the files of a folder."""
        self._parts = [part.features for part in parts]
        self._norms = [_norms(features) for features in self._parts]
        self._columns = pa.concat_tables([part.table for part in parts]).combine_chunks()
        self._firsts = np.cumsum([0, *map(len, self._parts)])  # first row of each part
        self._shards = [part.file.about["shard"] for part in parts]
        self.keys: list[str] = self._columns["key"].to_pylist()
        """Keys of all images, in the order of shards and rows."""
        self.about: dict[str, str] = parts[0].file.about
        """Origin of the features: backbone, data, transform."""

    @classmethod
    def open(cls, url: str) -> Self:
        """Reads the features of a folder.

        Args:
            url: URL or path, the DEST of `python -m jobs embed`.

        Raises:
            UsageError: the folder has no features, its files were not written by hemoco, or they
                are of different backbones or transforms.
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
        """The k images nearest to the image with this key, without the image itself, nearest first.

        Raises:
            UsageError: no image or several images have the key, or there are fewer than k others.
        """
        row = self._row(key)
        self._check_k(k, len(self) - 1)
        similarities = self._similarities(self._feature(row))
        similarities[row] = -np.inf
        return self._nearest(similarities, k)

    def of_feature(self, vector: ArrayLike, k: int = 8) -> list[Neighbour]:
        """The k images nearest to a feature vector (F,) of any norm, nearest first.

        Raises:
            UsageError: the vector is not F finite numbers, or there are fewer than k images.
        """
        query = np.asarray(vector, np.float32)
        features = self._parts[0].shape[1]  # F
        if query.shape != (features,) or not np.isfinite(query).all():
            raise UsageError(
                f"a vector of shape {query.shape}: it must be {features} finite numbers, like the "
                "features"
            )
        self._check_k(k, len(self))
        return self._nearest(self._similarities(query), k)

    def itself(self, key: str) -> Neighbour:
        """The image with this key as a neighbour of itself, with similarity 1.

        Raises:
            UsageError: no image or several images have the key.
        """
        return self._neighbour(self._row(key), 1.0)

    def feature(self, key: str) -> NDArray[np.float32]:
        """The features (F,) of the image with this key.

        Raises:
            UsageError: no image or several images have the key.
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
        stored = self._parts[part][row - self._firsts[part]]
        feature: NDArray[np.float32] = stored.astype(np.float32)
        return feature

    def _part(self, row: int) -> int:
        """The index of the part (the file) that a row is in."""
        return int(np.searchsorted(self._firsts, row, side="right")) - 1

    def _shard(self, row: int) -> str:
        return self._shards[self._part(row)]

    def _check_k(self, k: int, most: int) -> None:
        if not 1 <= k <= most:
            raise UsageError(
                f"k is {k}: it must be between 1 and {most}, the number of images to search"
            )

    def _similarities(self, query: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarities (M,) to a query (F,); 0 for a feature vector that is zero."""
        norm = np.linalg.norm(query)
        unit = query / norm if norm else query
        products = [block @ unit for part in self._parts for block in _blocks(part)]
        norms = np.concatenate(self._norms)
        similarities: NDArray[np.float32] = np.concatenate(products)
        similarities /= np.where(norms > 0, norms, 1)
        return similarities

    def _nearest(self, similarities: NDArray[np.float32], k: int) -> list[Neighbour]:
        """The k rows with the highest similarities; among equals, the first rows."""
        # A partition first, since sorting all similarities is slower. All rows equal to the k-th
        # highest stay candidates, so that the stable sort can take the first of them.
        kth_highest = np.partition(similarities, -k)[-k]
        rows = np.flatnonzero(similarities >= kth_highest)
        order = rows[np.argsort(-similarities[rows], kind="stable")][:k]
        return [self._neighbour(row, float(similarities[row])) for row in order.tolist()]

    def _neighbour(self, row: int, similarity: float) -> Neighbour:
        return Neighbour(
            key=self.keys[row],
            similarity=similarity,
            split=self._columns["split"][row].as_py(),
            label=self._columns["label"][row].as_py(),
            class_name=self._columns["class_name"][row].as_py(),
            shard=self._shard(row),
        )


def _read_rows(url: str) -> _Rows:
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(url)))
    except pa.ArrowException as error:
        raise not_parquet(url, error) from error
    file = parse_file(url, table.schema.metadata)
    column = table["feature"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    features = flat.reshape(len(column), column.type.list_size)  # (M, F)
    return _Rows(url, file, table.drop_columns(["feature"]), features)


def _check_same(first: _Rows, part: _Rows) -> None:
    for name in _SAME:
        one, other = first.file.about.get(name), part.file.about.get(name)
        if one != other:
            raise UsageError(
                f"{part.url}: its {name} is {other}, that of {first.url} is {one}: such features "
                "are not comparable; keep them in folders of their own"
            )


def _blocks(features: NDArray[np.floating[Any]]) -> Iterator[NDArray[np.float32]]:
    """Yields the features in blocks (P, F) of float32, in order."""
    for first in range(0, len(features), _IMAGES_AT_ONCE):
        yield features[first : first + _IMAGES_AT_ONCE].astype(np.float32, copy=False)


def _norms(features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Euclidean norms (M,)."""
    norms = [np.linalg.norm(block, axis=1) for block in _blocks(features)]
    # the empty array: concatenate refuses an empty list, as for a file without images
    return np.concatenate([np.zeros(0, np.float32), *norms])
