"""Nearest neighbours among written features, compared with brute force."""

from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from hemoco.data.shards.index import read_index
from hemoco.errors import UsageError
from hemoco.features.neighbours import Neighbours
from hemoco.features.parquet import FeatureRows, encode_file
from hemoco.storage.objects import write_bytes
from jobs.cli import main
from tests.helpers.shard_folders import write_shards

ABOUT = {
    "format": "hemoco-embedding-1",
    "backbone_sha256": "b",
    "layer": "pooled",
    "size": "8",
    "resize": "8",
}


def made(count: int, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)


def write(
    url: str, features: np.ndarray, sizes: list[int], first_key: int = 0, **about: str
) -> str:
    """Writes files with `sizes` rows; the keys are numbers."""
    for number, part in enumerate(np.split(features, np.cumsum(sizes)[:-1])):
        start = first_key + sum(sizes[:number])
        keys = [str(key) for key in range(start, start + len(part))]
        rows = FeatureRows(keys, "train", np.arange(start, start + len(part)) % 3, part)
        metadata = ABOUT | {"shard": f"train-{number:06d}.tar"} | about
        data = encode_file(rows, ("a", "b", "c"), metadata, [])
        write_bytes(f"{url}/train-{number:06d}.parquet", data)
    return url


def brute_force(features: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Cosine similarities in float64, one by one."""
    rows, other = features.astype(np.float64), query.astype(np.float64)
    return np.array([row @ other / (np.sqrt(row @ row) * np.sqrt(other @ other)) for row in rows])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_neighbours_of_an_image_are_those_of_brute_force(tmp_path: Path, dtype: type) -> None:
    features = made(50).astype(dtype)
    neighbours = Neighbours.open(write(str(tmp_path), features, [20, 0, 29, 1])).of("37", 5)
    cosines = brute_force(features, features[37])
    cosines[37] = -1
    nearest = np.argsort(-cosines)[:5]
    assert [one.key for one in neighbours] == [str(row) for row in nearest]
    np.testing.assert_allclose([one.similarity for one in neighbours], cosines[nearest], atol=1e-6)


def test_neighbours_of_a_vector_do_not_depend_on_its_length(tmp_path: Path) -> None:
    features, query = made(40), made(41)[-1]
    index = Neighbours.open(write(str(tmp_path), features, [40]))
    cosines = brute_force(features, query)
    descending = np.argsort(-cosines)
    for scale in (1, 1e-3, 100):
        neighbours = index.of_feature(scale * query, 40)
        assert [one.key for one in neighbours] == [str(row) for row in descending]
        similarities = [one.similarity for one in neighbours]
        np.testing.assert_allclose(similarities, cosines[descending], atol=1e-6)


def test_more_images_than_are_taken_at_a_time_are_all_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hemoco.features.neighbours._IMAGES_AT_ONCE", 7)
    features = made(30)
    index = Neighbours.open(write(str(tmp_path), features, [16, 14]))
    neighbours = index.of_feature(features[29], 30)
    descending = np.argsort(-brute_force(features, features[29]))
    assert [one.key for one in neighbours] == [str(row) for row in descending]


def test_a_neighbour_has_its_class_split_and_shard(tmp_path: Path) -> None:
    features = made(6)
    index = Neighbours.open(write(str(tmp_path), features, [3, 3]))
    (nearest,) = index.of_feature(features[4], 1)
    assert (nearest.key, round(nearest.similarity, 6)) == ("4", 1)
    assert (nearest.split, nearest.label, nearest.class_name) == ("train", 1, "b")
    assert nearest.shard == "train-000001.tar"


def test_equal_features_come_in_the_order_of_rows(tmp_path: Path) -> None:
    index = Neighbours.open(write(str(tmp_path), np.ones((9, 4), np.float32), [5, 4]))
    assert [one.key for one in index.of("2", 5)] == ["0", "1", "3", "4", "5"]


def test_a_feature_vector_of_zeros_has_similarity_0_to_all(tmp_path: Path) -> None:
    features = made(3)
    features[1] = 0
    index = Neighbours.open(write(str(tmp_path), features, [3]))
    assert [one.similarity for one in index.of("1", 2)] == [0, 0]


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    index = Neighbours.open(write(str(tmp_path), made(3), [3]))
    with pytest.raises(
        UsageError, match=r"no image '7' among the 3 here; keys look like \['0', '1'\]"
    ):
        index.of("7")


def test_a_key_of_two_images_is_refused(tmp_path: Path) -> None:
    write(str(tmp_path), made(2), [2])
    (tmp_path / "train-000000.parquet").rename(tmp_path / "other.parquet")
    index = Neighbours.open(write(str(tmp_path), made(2), [2]))
    with pytest.raises(UsageError, match="2 images have the key '1'"):
        index.of("1", 1)


@pytest.mark.parametrize("k", [0, 3])
def test_k_beyond_the_images_is_refused(tmp_path: Path, k: int) -> None:
    index = Neighbours.open(write(str(tmp_path), made(3), [3]))
    with pytest.raises(UsageError, match=f"k is {k}: it must be between 1 and 2, the number of"):
        index.of("0", k)


@pytest.mark.parametrize("vector", [np.ones(15), np.full(16, np.nan), np.ones((1, 16))])
def test_a_vector_of_another_kind_is_refused(tmp_path: Path, vector: np.ndarray) -> None:
    index = Neighbours.open(write(str(tmp_path), made(3), [3]))
    with pytest.raises(UsageError, match="it must be 16 finite numbers"):
        index.of_feature(vector, 1)


def test_features_of_two_backbones_do_not_mix(tmp_path: Path) -> None:
    write(str(tmp_path), made(2), [2], backbone_sha256="c")
    (tmp_path / "train-000000.parquet").rename(tmp_path / "other.parquet")
    write(str(tmp_path), made(2), [2])
    with pytest.raises(
        UsageError,
        match=r"train-000000\.parquet: its backbone_sha256 is b, that of .*other\.parquet is c",
    ):
        Neighbours.open(str(tmp_path))


def test_a_folder_without_features_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no features here; `python -m jobs embed SHARDS BACKBONE"):
        Neighbours.open(str(tmp_path))


def test_parquet_of_others_is_refused(tmp_path: Path) -> None:
    pandas.DataFrame({"key": ["a"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="holds no features of hemoco"):
        Neighbours.open(str(tmp_path))


def test_the_command_prints_neighbours_and_draws_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards((tmp_path / "shards").as_uri(), [3, 3])
    features = np.eye(6, dtype=np.float32) + np.arange(6, dtype=np.float32)[:, None]
    digest = read_index(shards).digest
    dest = write(str(tmp_path / "out"), features, [3, 3], data_url=shards, data_digest=digest)
    assert main(["neighbours", dest, "5", "--k", "2", "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines[:2]] == [["4", "train", "b"], ["3", "train", "a"]]
    assert lines[2] == f"contact sheet: {tmp_path / 'sheet.png'}"
    with Image.open(tmp_path / "sheet.png") as sheet:
        colours = [sheet.getpixel((86 + 166 * column, 86)) for column in range(3)]
    assert colours == [(5, 5, 5), (4, 4, 4), (3, 3, 3)]
