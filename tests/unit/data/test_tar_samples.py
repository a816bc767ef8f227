"""Parsing of any webdataset's tar, against webdataset's own reader and tarfile.

Most tests are of tars of which these two lose data without an error.
"""

import io
import json
import pickle
import random
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from hemoco.data.shards.table import SampleTable, decode_table, encode_table
from hemoco.data.shards.tar import TarContent, parse_tar
from hemoco.errors import ShardError

PHOTOS = [
    (f"{i}.{suffix}", f"{suffix} {i}".encode() * 90) for i in range(5) for suffix in ("jpg", "txt")
]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def tar_of(members: list[tuple[str, bytes]], **changes: Any) -> bytes:
    """A tar of regular files; `changes` set fields of every header, or `format` the archive's."""
    buffer = io.BytesIO()
    form = changes.pop("format", tarfile.PAX_FORMAT)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for attribute, value in changes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parsed(*members: tuple[str, bytes]) -> TarContent:
    return parse_tar(tar_of(list(members)), "x.tar")


def skipped(content: TarContent) -> list[tuple[str, str]]:
    return [tuple(member) for member in content.skipped]


def keys(content: TarContent) -> list[str]:
    return [sample.key for sample in content.samples]


def slow_crc32c(data: bytes) -> int:
    """CRC32C of RFC 3720, appendix B.4, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def spoil(data: bytes, offset: int, content: bytes, *, checksum: bool = False) -> bytes:
    """The data with other bytes at an offset; `checksum` corrects that of their header block."""
    spoilt = bytearray(data)
    spoilt[offset : offset + len(content)] = content
    if checksum:
        start = offset // 512 * 512
        spoilt[start + 148 : start + 156] = b" " * 8
        spoilt[start + 148 : start + 156] = b"%06o\0 " % sum(spoilt[start : start + 512])
    return bytes(spoilt)


WILD = [
    [(f"n01440764_{i}.{s}", b"x") for i in range(3) for s in ("JPEG", "cls")],
    [(f"00000{i:04d}.{s}", b"{}") for i in range(3) for s in ("jpg", "txt", "json")],
    [
        ("a/b/1.jpg", b"1"),
        ("a/b/1.seg.png", b"2"),
        ("a/c/1.jpg", b"3"),
        ("./d.v2.e/5.left.jpg", b"4"),
    ],
    [
        ("../../x.jpg", b"1"),
        ("/etc/passwd.jpg", b"2"),
        ("größe é\n.png", b"3"),
        (250 * "long" + "/k.webp", b"4"),
    ],
    [
        ("dir.with.dots/k.jpg", b"1"),
        ("no_suffix", b"2"),
        ("k.", b"3"),
        ("__meta__", b"4"),
        ("__m__/k.jpg", b"5"),
    ],
]


# webdataset leaves its file to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("members", WILD)
def test_stock_webdataset_finds_the_same_keys_and_images(
    tmp_path: Path, members: list[tuple[str, bytes]]
) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(members))
    stock = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    content = parse_tar((tmp_path / "x.tar").read_bytes(), "x.tar")
    suffixes = ("jpg", "jpeg", "png", "webp", "left.jpg")
    with_image = [sample for sample in stock if set(suffixes) & set(sample)]
    assert keys(content) == [sample["__key__"] for sample in with_image]
    for ours, theirs in zip(content.samples, with_image, strict=True):
        assert [theirs[suffix] for suffix in suffixes if suffix in theirs] == [ours.image]


@pytest.mark.parametrize("name", ["x.jpg", 99 * "long" + ".jpg", "größe.jpg"])
@pytest.mark.parametrize("form", FORMATS[1:])
def test_the_table_says_where_tarfile_finds_each_image(name: str, form: int) -> None:
    data = tar_of(
        [("a.cls", b"7"), (name, b"image bytes"), ("a.jpg", b""), ("b.jpg", bytes(range(256)))],
        format=form,
    )
    table = parse_tar(data, "x.tar").table
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        images = [(m.name, m.offset_data, m.size) for m in tar if m.name.endswith("jpg")]
    names = [f"{key}.jpg" for key in table.keys]
    assert list(zip(names, table.offsets, table.sizes, strict=True)) == images
    contents = [data[start : start + size] for _, start, size in images]
    assert table.crcs.tolist() == [slow_crc32c(content) for content in contents]
    assert table.labels.tolist() == [-1, 7, -1]


def test_the_slow_checksum_is_crc32c() -> None:
    assert slow_crc32c(b"123456789") == 0xE3069283  # the check value of its catalogue entry


@pytest.mark.parametrize(
    "at", ["member", "header", "payload", "padding", "end blocks", "end block", "start"]
)
def test_a_cut_tar_is_refused_with_the_byte(at: str) -> None:
    data = tar_of(PHOTOS, format=tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
    third, end = members[3], members[-1].offset_data + 512
    byte = {
        "member": third.offset,
        "header": third.offset + 100,
        "payload": third.offset_data + 100,
        "padding": third.offset_data + third.size,
        "end blocks": end,
        "end block": end + 511,
        "start": 0,
    }[at]
    with pytest.raises(ShardError, match=rf"^x\.tar: .*at byte {byte}\b"):
        parse_tar(data[:byte], "x.tar")


@pytest.mark.parametrize("form", FORMATS)
def test_no_cut_anywhere_gives_a_shorter_list(form: int) -> None:
    data = tar_of([(99 * "k" + f"/{i}.jpg", b"x" * 600) for i in range(3)], format=form)
    whole = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for byte in range(0, whole + 1, 128):
        with pytest.raises(ShardError, match=r"x\.tar: .* byte \d+"):
            parse_tar(data[:byte], "x.tar")
    assert len(parse_tar(data, "x.tar").samples) == 3


@pytest.mark.parametrize("content", [b"\xff", b"\0" * 512])
def test_a_bad_header_in_the_middle_is_refused_with_its_byte(content: bytes) -> None:
    data = tar_of(PHOTOS)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmembers()[6].offset
    with pytest.raises(
        ShardError, match=rf"x\.tar: damaged at byte {offset}, where a member should begin"
    ):
        parse_tar(spoil(data, offset, content), "x.tar")


@pytest.mark.parametrize("data", [b"<html>404</html>", b"<html>" * 200, b"\x1f\x8b" + bytes(600)])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError, match=r"x\.tar: not a tar file, or damaged at byte 0"):
        parse_tar(data, "x.tar")


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\xff" * 10 + b"\xfc\0"])
def test_a_size_below_0_ends_in_an_error_and_not_in_a_loop(size: bytes) -> None:
    data = tar_of(PHOTOS)
    with pytest.raises(
        ShardError, match=r"x\.tar: damaged at byte \d+ \('2\.jpg' has a size below 0"
    ):
        parse_tar(spoil(data, 4 * 1024 + 124, size, checksum=True), "x.tar")


def test_a_chain_of_extended_headers_without_end_is_refused() -> None:
    link = tarfile.TarInfo("k" * 150 + ".jpg").tobuf(tarfile.PAX_FORMAT)[:1024]
    with pytest.raises(ShardError, match=r"x\.tar: not a tar file"):
        parse_tar(link * 2000, "x.tar")


def test_damage_of_any_kind_is_an_error_of_ours_or_none(tmp_path: Path) -> None:
    rng = random.Random(0)
    (tmp_path / "s.jpg").write_bytes(b"")
    with (tmp_path / "s.jpg").open("r+b") as file:
        file.truncate(400_000)
    subprocess.run(["tar", "--format=gnu", "-Scf", "s.tar", "s.jpg"], cwd=tmp_path, check=True)
    tars = [
        (tmp_path / "s.tar").read_bytes(),
        *(tar_of([("k" * 90 + ".jpg", b"x" * 600)], format=f) for f in FORMATS),
    ]
    for _ in range(3000):
        data = rng.choice(tars)
        for _ in range(rng.randrange(1, 4)):
            offset = rng.randrange(min(len(data), 2048))
            byte = bytes([rng.choice((0, 10, 48, 57, 120, 255))])
            data = spoil(data, offset, byte, checksum=rng.random() < 0.7)
        try:
            parse_tar(data, "x.tar")
        except ShardError:
            continue


def test_a_tar_without_members_has_no_samples() -> None:
    content = parse_tar(tar_of([]), "x.tar")
    assert (content.samples, content.skipped, len(content.table.offsets)) == ([], [], 0)
    assert decode_table(encode_table(content.table)).keys == []


def test_members_of_a_key_are_united_wherever_they_are() -> None:
    content = parsed(
        ("a.cls", b"1"), ("b.jpg", b"B"), ("a.jpg", b"A"), ("b.cls", b"2"), ("c.jpg", b"C")
    )
    assert [(s.key, s.image, s.label) for s in content.samples] == [
        ("b", b"B", 2),
        ("a", b"A", 1),
        ("c", b"C", None),
    ]


def test_photos_told_apart_after_the_first_dot_only_are_never_one_sample() -> None:
    content = parsed(("photo.1.jpg", b"1"), ("photo.2.jpg", b"2"), ("other.1.jpg", b"3"))
    assert skipped(content) == [("photo (.1.jpg, .2.jpg)", "several images under one key")]
    assert [(s.key, s.suffix, s.image) for s in content.samples] == [("other", "jpg", b"3")]


def test_the_plain_suffix_is_the_image_and_others_are_named() -> None:
    content = parsed(("a.jpg", b"1"), ("a.mask.png", b"2"), ("b.jpg", b"3"), ("b.png", b"4"))
    assert [(s.key, s.image) for s in content.samples] == [("a", b"1")]
    assert skipped(content) == [
        ("a.mask.png", "a further image under a key"),
        ("b (.jpg, .png)", "several images under one key"),
    ]


def test_of_members_of_one_name_the_first_counts_and_the_others_are_named() -> None:
    content = parsed(("a.jpg", b"1"), ("a.jpg", b"2"), ("a.JPG", b"3"))
    assert [sample.image for sample in content.samples] == [b"1"]
    assert skipped(content) == [
        (name, "a second member of that name") for name in ("a.jpg", "a.JPG")
    ]


def test_suffixes_are_read_in_any_case_and_keys_are_not() -> None:
    content = parsed(("a.JPG", b"1"), ("a.Cls", b"2"), ("A.PnG", b"3"), ("a.v1.JPEG", b"4"))
    assert [(s.key, s.suffix, s.label) for s in content.samples] == [
        ("a", "jpg", 2),
        ("A", "png", None),
    ]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"Z"]
)
def test_links_and_devices_are_named_and_not_read(kind: bytes) -> None:
    data = tar_of([("a.jpg", b"")], type=kind, linkname="/etc/passwd")
    assert skipped(parse_tar(data, "x.tar")) == [("a.jpg", "not a regular file")]


def test_folders_are_passed_over() -> None:
    content = parse_tar(
        tar_of([("a.jpg", b""), ("a.jpg/b.jpg", b"")], type=tarfile.DIRTYPE), "x.tar"
    )
    assert (content.samples, content.skipped) == ([], [])


@pytest.mark.parametrize("form", [["--format=gnu"], ["--format=pax", "--sparse-version=1.0"]])
def test_sparse_members_are_named_and_those_after_them_found(
    tmp_path: Path, form: list[str]
) -> None:
    with (tmp_path / "s.jpg").open("wb") as file:
        file.truncate(10**9)  # larger than the tar, in which only its holes are described
    (tmp_path / "t.jpg").write_bytes(b"image")
    subprocess.run(["tar", *form, "-Scf", "x.tar", "s.jpg", "t.jpg"], cwd=tmp_path, check=True)
    content = parse_tar((tmp_path / "x.tar").read_bytes(), "x.tar")
    assert skipped(content) == [("s.jpg", "not a regular file")]
    assert [(sample.key, sample.image) for sample in content.samples] == [("t", b"image")]


@pytest.mark.parametrize(
    "name", ["._a.jpg", ".jpg", "d/._a.jpg", "d/.hidden.jpg", "nodot", "d.e/nodot", "a\0b.jpg"]
)
def test_names_without_a_key_are_named(name: str) -> None:
    data = tar_of([("placeholder.jpg", b"")], pax_headers={"path": name})
    assert skipped(parse_tar(data, "x.tar")) == [(name, "a name without key and suffix")]


CLASSES = [(b"7", 7), (b" 12\n", 12), (b"00000012", 12), (b"999999", 999999), (b"0", 0)]


@pytest.mark.parametrize(("content", "label"), CLASSES)
def test_a_number_is_a_label(content: bytes, label: int) -> None:
    tar = parsed(("a.jpg", b""), ("a.cls", content))
    assert tar.samples[0].label == label
    assert tar.table.labels.tolist() == [label]
    assert tar.skipped == []


@pytest.mark.parametrize(
    "content", [b"cat", b"", b"-1", b"1.0", b"1_0", b"\x80\x04K\x01.", b"15075141", b"9" * 5000]
)
def test_a_class_that_is_no_number_is_named_and_its_image_unlabelled(content: bytes) -> None:
    tar = parsed(("a.jpg", b""), ("a.cls", content))
    assert (tar.samples[0].label, tar.table.labels.tolist()) == (None, [-1])
    assert skipped(tar) == [("a.cls", "a class that is no number from 0 to 999999")]


def test_laion_metadata_are_no_annotations() -> None:
    metadata = {
        "url": "https://x",
        "caption": "a cat",
        "image_id": 3,
        "annotations": ["tag"],
        "width": 512,
    }
    content = parsed(
        ("000.jpg", b""), ("000.txt", b"a cat"), ("000.json", json.dumps(metadata).encode())
    )
    (sample,) = content.samples
    assert (sample.annotations, sample.image_id, content.skipped) == (None, None, [])


def test_coco_annotations_are_read() -> None:
    described = {"image_id": 7, "annotations": [{"id": 1, "bbox": [0, 0, 1, 1]}]}
    (sample,) = parsed(("a.jpg", b""), ("a.json", json.dumps(described).encode())).samples
    assert {"image_id": sample.image_id, "annotations": sample.annotations} == described


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000])
def test_json_that_is_none_is_named(content: bytes) -> None:
    tar = parsed(("a.jpg", b""), ("a.json", content))
    assert (keys(tar), skipped(tar)) == (["a"], [("a.json", "not JSON")])


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    canary = pickle.dumps(_Canary(tmp_path / "loaded"))
    members = [
        (f"a.{suffix}", canary)
        for suffix in ("jpg", "pkl", "pickle", "pyd", "pth", "cls", "json", "npy")
    ]
    assert keys(parsed(*members)) == ["a"]
    with pytest.raises(ValueError):
        decode_table(canary)
    assert not (tmp_path / "loaded").exists()
    pickle.loads(canary)
    assert (tmp_path / "loaded").exists()


def test_a_table_comes_back_as_it_was() -> None:
    names = [f"k{'k' * i}/größe\udcff{i}" for i in range(50)]
    members = [(f"{name}.png", name.encode("utf-8", "surrogateescape")) for name in names]
    table = parse_tar(tar_of(members), "x.tar").table
    again = decode_table(encode_table(table))
    assert again.keys == table.keys == names
    for one, other in zip(again[1:], table[1:], strict=True):
        assert isinstance(one, np.ndarray) and isinstance(other, np.ndarray)
        assert one.dtype == other.dtype and one.tolist() == other.tolist()


def test_a_damaged_table_is_a_value_error_or_has_columns_of_one_length() -> None:
    table = parse_tar(tar_of(PHOTOS), "x.tar").table
    data, rng = encode_table(table), random.Random(0)
    for _ in range(3000):
        damaged = spoil(data, rng.randrange(600), bytes([rng.randrange(256)]))
        damaged = damaged[: rng.choice((None, 500))]
        try:
            decoded = decode_table(damaged)
        except ValueError:
            continue
        assert {len(column) for column in decoded} == {len(decoded.keys)}


def test_columns_of_different_length_are_refused() -> None:
    table = parse_tar(tar_of(PHOTOS), "x.tar").table
    for name in SampleTable._fields[1:]:
        shorter = table._replace(**{name: getattr(table, name)[1:]})
        with pytest.raises(ValueError, match="differ in length"):
            decode_table(encode_table(shorter))
