"""`inspect`: its report on a shard folder, every kind of damage, and the contact sheet."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hemoco.data.shards.contact_sheet import SheetSample, draw_sheet, sheet_samples
from hemoco.data.shards.index import ShardIndex, read_index, read_table, write_index, write_table
from hemoco.data.shards.sampling import count_labels
from hemoco.errors import ShardError
from jobs.cli import main
from pipeline.shards.verify import verify_steps
from tests.helpers.shard_folders import write_shards
from tests.helpers.voc_xml import count_objects
from tests.helpers.whole_stages import finish, pack

ROOT = Path(__file__).parents[2]
DAMAGES = {
    "flipped": r"checksum differs from the index.* "
    r"\(1 of 3 samples differ: training leaves them out\)",
    "cut": r"2048 bytes, the index says \d+",
    "replaced": r"checksum differs from the index.* "
    r"\(3 of 3 samples differ: training stops at it\)",
    "missing": r"not found",
    "table missing": r"the sample table of train-\d+\.tar is missing",
    "table cut": r"the sample table of train-\d+\.tar is damaged",
    "table of another": r"the sample table of train-\d+\.tar does not match its content",
}


def damage(folder: Path, number: int, kind: str) -> None:
    """Damages one shard of a folder, whose shards all have the same size."""
    shards = read_index(str(folder)).shards
    shard, other = shards[number], shards[0]
    path, (table,) = folder / shard.name, (folder / "samples").glob(f"{shard.sha256}.*")
    data = path.read_bytes()
    if kind == "flipped":
        place = int(read_table(str(folder), shard).offsets[0]) + 50
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    elif kind == "cut":
        path.write_bytes(data[:2048])
    elif kind == "replaced":
        path.write_bytes((folder / other.name).read_bytes())
        assert path.stat().st_size == len(data)
    elif kind == "missing":
        path.unlink()
    elif kind == "table missing":
        table.unlink()
    elif kind == "table cut":
        table.write_bytes(table.read_bytes()[:-1])
    else:
        write_table(str(folder), shard, read_table(str(folder), other))


def rewrite_index(folder: Path, **changes: object) -> ShardIndex:
    index = dataclasses.replace(read_index(str(folder)), **changes)
    write_index(str(folder), index)
    return index


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """Runs `jobs inspect`; returns its exit status, output lines and error."""
    status = main(["inspect", *words])
    out, err = capsys.readouterr()
    return status, out.splitlines(), err


def test_splits_sizes_and_labels_are_told_in_plain_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(str(tmp_path), [9, 0, 3])
    index = rewrite_index(tmp_path, classes=("cat", "dog", "\x1b[2J"))
    status, lines, _ = told(capsys, str(tmp_path))
    total = sum(shard.bytes for shard in index.shards) / 1000
    assert (status, lines) == (0, [
        f"{tmp_path.as_uri()}: format version 2, digest {index.digest}",
        f"split train: 12 samples in 3 shards of 10.2 kB to 20.5 kB, {total:.3g} kB",
        "class cat: train 4", "class dog: train 4", "class ?[2J: train 4",
    ])  # fmt: skip


def test_of_many_classes_those_with_most_and_fewest_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(str(tmp_path), [7])
    rewrite_index(tmp_path, classes=tuple(f"c{i}" for i in range(100)))
    lines = told(capsys, str(tmp_path))[1]
    assert lines[2:] == [
        *(f"class c{i}: train {count}" for i, count in enumerate((3, 2, 2, 0, 0))),
        "(90 classes between)",
        *(f"class c{i}: train 0" for i in range(95, 100)),
    ]


def test_counts_are_those_of_the_labels_and_of_images_without(tmp_path: Path) -> None:
    write_shards(str(tmp_path / "labelled"), [4, 0, 3])
    write_shards(str(tmp_path / "unlabelled"), [4], labelled=False)
    counts = {
        name: count_labels(str(tmp_path / name), read_index(str(tmp_path / name)))
        for name in ("labelled", "unlabelled")
    }
    assert {name: count["train"].tolist() for name, count in counts.items()} == {
        "labelled": [3, 2, 2, 0], "unlabelled": [0, 0, 0, 4]
    }  # fmt: skip


def test_labels_beyond_the_classes_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(str(tmp_path), [4])
    rewrite_index(tmp_path, classes=("a", "b"))
    assert told(capsys, str(tmp_path))[::2] == (
        1, "error: train-000000.tar: label 2, the index has 2 classes; pack the data again\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "no index.json, so no shards here; make some with `python -m jobs pack SOURCE DEST`",
        ),
        (
            {"format": "hemoco-shards", "version": 1},
            "index version 1, this hemoco reads 2; pack the data again",
        ),
        ({"format": "other"}, "is this a shard folder of hemoco?"),
    ],
)
def test_what_is_no_shard_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, message: str
) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(json.dumps(content))
    status, lines, error = told(capsys, str(tmp_path), "--verify")
    assert (status, lines, error.count("\n")) == (1, [], 1)
    assert error.endswith(f"{message}\n")


def test_the_facts_are_told_without_ray_and_torch(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [4, 3])
    script = (
        f"import sys; from jobs.cli import main; status = main(['inspect', {str(tmp_path)!r}]); "
        + ("print([name for name in ('ray', 'torch') if name in sys.modules]); sys.exit(status)")
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.usefixtures("ray_cluster")
def test_every_damage_is_found_and_named(tmp_path: Path, kind: str) -> None:
    write_shards(str(tmp_path), [3, 3, 3])
    damage(tmp_path, 1, kind)
    found = finish(verify_steps(str(tmp_path), read_index(str(tmp_path))))
    (message,) = found.damages
    assert found.damaged == 1
    assert re.search(DAMAGES[kind], message)
    assert "train-000001.tar" in message


@pytest.mark.usefixtures("ray_cluster")
def test_an_image_that_cannot_be_decoded_is_damage_of_our_shards_only(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3, 3], bad={1, 2})
    ours = read_index(str(tmp_path))
    where = (
        f"{tmp_path}/train-000000.tar: 2 images cannot be decoded, "
        "first 1: its 12 bytes are not an image"
    )
    assert finish(verify_steps(str(tmp_path), ours))[:3] == ((where,), 1, ())
    assert finish(verify_steps(str(tmp_path), dataclasses.replace(ours, packed=False)))[:3] == (
        (),
        0,
        (where,),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_annotations_are_counted_by_split(test_data: Path, tmp_path: Path) -> None:
    index = pack(
        [str(test_data / "bccd")], str(tmp_path), split="x", samples_per_shard=20, seed=0
    ).index
    found = finish(verify_steps(str(tmp_path), index))
    assert sum(found.annotations.values()) == count_objects(test_data / "bccd").total()
    assert found._replace(annotations={}) == ((), 0, (), {})


def test_verify_names_all_damaged_shards_and_exits_with_1(ray_cluster: str, tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3] * (len(DAMAGES) + 1))
    for number, kind in enumerate(DAMAGES, 1):
        damage(tmp_path, number, kind)
    words = [sys.executable, "-m", "jobs", "inspect", str(tmp_path), "--verify"]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        capture_output=True,
        text=True,
        check=False,
    )
    damaged = [line for line in done.stdout.splitlines() if line.startswith("damaged: ")]
    assert done.returncode == 1
    for number, (line, message) in enumerate(zip(damaged, DAMAGES.values(), strict=True), 1):
        assert f"train-{number:06d}.tar" in line
        assert re.search(message, line)
    assert (
        done.stderr
        == "error: 7 of 8 shards are damaged, as listed; restore them, or pack the data again\n"
    )


def test_a_sheet_shows_evenly_spaced_samples_of_all_shards(bucket: str) -> None:
    write_shards(bucket, [5, 0, 1, 10, 4], bad={10})
    samples = sheet_samples(bucket, read_index(bucket), 10)
    shown = [None if sample.image is None else sample.image.getpixel((0, 0)) for sample in samples]
    assert shown == [None if i == 10 else (i, i, i) for i in range(0, 20, 2)]
    assert [sample.caption for sample in samples] == [
        ("a", "b", "c")[i % 3] for i in range(0, 20, 2)
    ]


@pytest.mark.parametrize("sizes", [[0], [1], [2, 3]])
def test_a_sheet_of_few_samples_shows_each_once(tmp_path: Path, sizes: list[int]) -> None:
    write_shards(str(tmp_path), sizes, labelled=False)
    samples = sheet_samples(str(tmp_path), read_index(str(tmp_path)), 64)
    assert [sample.caption for sample in samples] == [str(i) for i in range(sum(sizes))]


def test_a_damaged_sample_is_not_shown(tmp_path: Path) -> None:
    write_shards(str(tmp_path), [3, 3])
    damage(tmp_path, 1, "flipped")
    with pytest.raises(
        ShardError, match=r"train-000001\.tar: sample 3 at byte \d+ is damaged or was replaced"
    ):
        sheet_samples(str(tmp_path), read_index(str(tmp_path)), 6)


def test_tiles_are_in_their_places_and_of_any_shape() -> None:
    images = [
        Image.new("RGB", size, colour)
        for size, colour in (((300, 100), "red"), ((1, 900), "lime"), ((2, 2), "blue"))
    ]
    samples = [
        SheetSample(image, caption, "train")
        for image, caption in zip(images, ("a", 99 * "long", "\n"), strict=True)
    ]
    pixels = np.asarray(
        Image.open(io.BytesIO(draw_sheet([*samples, SheetSample(None, "gone", "val")])))
    )
    assert pixels.shape == (6 + 160 + 32 + 6, 8 * 166 + 6, 3)
    assert [pixels[86, 85 + 166 * i].tolist() for i in range(3)] == [
        [255, 0, 0],
        [0, 255, 0],
        [0, 0, 255],
    ]
    assert pixels[10, 10].tolist() == [0xEE] * 3


def test_a_sheet_is_written_where_it_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(str(tmp_path), [3])
    status, lines, _ = told(capsys, str(tmp_path), "--sheet", str(tmp_path / "new" / "sheet.png"))
    assert (status, lines[-1]) == (0, f"contact sheet: {tmp_path / 'new' / 'sheet.png'}")
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.size == (8 * 166 + 6, 204)
