"""Embedding on Ray: resuming, too many bad samples, and the command from S3 to S3."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hemoco.backbones.file import export_backbone, random_backbone
from hemoco.config import EncoderConfig
from hemoco.data.shards.index import read_index
from hemoco.errors import ShardError
from hemoco.features.neighbours import Neighbours
from hemoco.features.plan import EmbedConfig, EmbedPlan, fixed_url, plan_embedding
from hemoco.storage.objects import read_bytes, write_bytes
from pipeline.embed import embed_steps
from tests.helpers.shard_folders import write_shards
from tests.helpers.whole_stages import finish

ROOT = Path(__file__).parents[2]
CONFIG = EmbedConfig(size=10, resize=10, batch_size=4)


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    """Path of a backbone with random weights."""
    url = str(tmp_path / "backbone.safetensors")
    tiny = EncoderConfig(architecture="resnet10t", stem="small")
    export_backbone(
        random_backbone(tiny, 0, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), url, {"data_digest": "d"}
    )
    return url


def planned(shards: str, backbone: str, dest: Path) -> EmbedPlan:
    return plan_embedding(shards, read_index(shards), fixed_url(backbone), str(dest), CONFIG)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Returns bytes and modification time of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_call_again_goes_on_with_what_is_missing(
    bucket: str, tmp_path: Path, backbone: str
) -> None:
    shards = write_shards(f"{bucket}/shards", [5, 4, 3], bad={6})
    plan = planned(shards, backbone, tmp_path / "out")
    chosen = read_index(shards).shards
    first = finish(embed_steps(plan, chosen, cpus=1, gpus=0, max_bad_share=0))
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "train-000002.parquet").unlink()
    again = finish(embed_steps(plan, chosen, cpus=1, gpus=0, max_bad_share=0))
    after = contents(tmp_path / "out")
    assert (first.images, first.computed, again.images, again.computed) == (11, 11, 11, 3)
    assert again.bad == first.bad == (("not an image", 1, f"6 in {shards}/train-000001.tar"),)
    assert {name: data for name, (data, _) in after.items()} == {
        name: data for name, (data, _) in before.items()
    }
    assert [name for name in after if after[name] != before[name]] == ["train-000002.parquet"]


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_bad_samples_stop_it_unless_allowed(tmp_path: Path, backbone: str) -> None:
    shards = write_shards(str(tmp_path / "shards"), [12], bad=range(11))
    plan, chosen = planned(shards, backbone, tmp_path / "out"), read_index(shards).shards
    for _ in range(2):  # also when the file is there
        with pytest.raises(
            ShardError,
            match=r"11 of 12 samples are bad, the last is 10 in .*: not an image; repack",
        ):
            finish(embed_steps(plan, chosen, cpus=1, gpus=0, max_bad_share=0.1))
    assert finish(embed_steps(plan, chosen, cpus=1, gpus=0, max_bad_share=0.95)).images == 1


def test_the_command_embeds_from_s3_to_s3_and_says_what_came_of_it(
    ray_cluster: str, bucket: str, backbone: str
) -> None:
    shards = write_shards(f"{bucket}/shards", [4, 3], bad={5})
    write_bytes(f"{bucket}/backbone", Path(backbone).read_bytes())
    words = ["embed", shards, f"{bucket}/backbone", f"{bucket}/features"]
    done = subprocess.run(
        [sys.executable, "-m", "jobs", *words],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": ray_cluster},
        capture_output=True,
        text=True,
        check=False,
    )
    warning, where, result, again = done.stdout.splitlines()
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (
        warning
        == f"warning: 1 images left out: not an image (first: 5 in {shards}/train-000001.tar)"
    )
    assert result.startswith(f"{bucket}/features: 6 images in 2 files, ")
    assert again == f"neighbours  python -m jobs neighbours {bucket}/features KEY"
    assert json.loads(read_bytes(where.removeprefix("all of them: "))) == {
        "shard": f"{shards}/train-000001.tar", "key": "5", "reason": "not an image"
    }  # fmt: skip
    assert len(Neighbours.open(f"{bucket}/features").of("0", 3)) == 3
