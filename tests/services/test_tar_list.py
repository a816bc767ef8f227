"""Lists of the tars below a URL, with their splits."""

from pathlib import Path

import pytest

from hemoco.data.sources.tars import SourceTar, find_tars, split_of
from hemoco.errors import StorageError, UsageError
from hemoco.storage.objects import join_url, write_bytes


@pytest.mark.parametrize(
    ("url", "split"),
    [
        ("s3://b/imagenet-train-000012.tar", "train"),
        ("s3://b/x/val/00001.tar", "val"),
        ("s3://b/imagenet1k-validation-00.tar", "val"),
        ("s3://b/TEST_0.tar", "test"),
        ("s3://b/train000012.tar", "train"),
        ("s3://b/train/val-0.tar", "val"),
        ("s3://b/train/000.tar", "train"),
        ("s3://b/train/x/000.tar", "given"),
        ("s3://b/latest-0.tar", "given"),
        ("s3://b/trainval-0.tar", "given"),
        ("s3://b/val/train-and-test.tar", "val"),
        ("s3://b/0.tar", "given"),
    ],
)
def test_a_word_in_the_name_or_else_in_its_folder_is_the_split(url: str, split: str) -> None:
    assert split_of(url, "given") == split


def fill(url: str, *names: str) -> str:
    for name in names:
        write_bytes(join_url(url, name), b"")
    return url


def test_tars_of_a_folder_and_of_its_split_folders_are_found(tmp_path: Path) -> None:
    names = [
        "b.tar",
        "a.tar",
        "index.json",
        "val/0.tar",
        "my-train/1.tar",
        "other/2.tar",
        "val/0.json",
        "a.tar.gz",
    ]
    url = fill((tmp_path / "tars").as_uri(), *names)
    found = [
        ("a.tar", "given"),
        ("b.tar", "given"),
        ("my-train/1.tar", "train"),
        ("val/0.tar", "val"),
    ]
    assert find_tars([str(tmp_path / "tars")], "given") == [
        SourceTar(f"{url}/{name}", split) for name, split in found
    ]


def test_an_s3_prefix_a_tar_and_a_pattern_are_sources(bucket: str, tmp_path: Path) -> None:
    fill(bucket, "x/0.tar", "x/1.tar")
    found = find_tars(
        [f"{bucket}/x", f"{tmp_path}/train-{{08..10}}.tar", "s3://b/{val,test}/{0..1}.tar"], "given"
    )
    assert [tar.url.removeprefix(bucket).removeprefix(tmp_path.as_uri()) for tar in found] == [
        "/train-08.tar", "/train-09.tar", "/train-10.tar",
        "s3://b/test/0.tar", "s3://b/test/1.tar", "s3://b/val/0.tar", "s3://b/val/1.tar",
        "/x/0.tar", "/x/1.tar",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nothing"], "nothing: nothing there; --index_only needs a folder of *.tar"),
        (["images"], "images: only 0.jpg, 1.jpg, 2.jpg and more there; --index_only needs"),
        (["tars", "tars/{0..1}.tar"], "2 tars are named twice, first file://"),
        (["tars/{0..1.tar"], "not a pattern (Unbalanced"),
        (["tars/{0..9999999}.tar"], "more than 200000 names"),
    ],
)
def test_sources_that_mean_nothing_are_refused(
    tmp_path: Path, sources: list[str], message: str
) -> None:
    fill(tmp_path.as_uri(), "tars/0.tar", "tars/1.tar", *(f"images/{i}.jpg" for i in range(9)))
    with pytest.raises(UsageError) as caught:
        find_tars([str(tmp_path / source) for source in sources], "given")
    assert message in str(caught.value)


@pytest.mark.parametrize("source", ["pipe:touch x", "pipe:cat x.tar", "s3://b/$(touch x).tar"])
def test_commands_are_no_sources(source: str) -> None:
    with pytest.raises(StorageError, match=r"not supported|not allowed"):
        find_tars([source], "train")


def test_a_split_that_could_be_no_file_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"split '\.\./x': use letters"):
        find_tars([str(tmp_path)], "../x")
