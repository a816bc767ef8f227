"""Everything that uses storage, against two S3 servers that share no code: rclone and Ceph.

They differ, and hemoco must work with both:
- Errors: those of Ceph have a code and no message; rclone names each refused signature AccessDenied
  or by its own name, with a message.
- A clock that is off: Ceph answers 403 RequestTimeTooSkewed, rclone 400 AccessDenied.
- Permissions: Ceph has users and bucket policies, rclone one key that may do everything.
- Conditional writes: Ceph refuses the second with 412, rclone accepts it (no lock can be built on
  them).
- A key that is also a folder (`d` beside `d/e`): Ceph has both, rclone refuses.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import http.server
import json
import ssl
import subprocess
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import botocore.auth
import botocore.session
import pytest
import s3fs
import torch

from cluster.local.servers import BUCKET, S3Server, s3_environment, s3_server
from hemoco.backbones.file import export_backbone, load_backbone
from hemoco.config import EncoderConfig, MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.shards.index import ShardIndex, read_index, read_shard, write_index
from hemoco.data.sources.folders import open_source
from hemoco.data.stream import batches as stream
from hemoco.data.stream.bad_samples import BadSampleFile
from hemoco.data.stream.loader import StreamPosition
from hemoco.errors import CheckpointError, ShardError, StorageError
from hemoco.models.resnet import Backbone
from hemoco.storage.fetch import FetchCounts, fetch_range, verified_shard
from hemoco.storage.objects import (
    check_writable,
    direct_url,
    exists,
    list_names,
    read_bytes,
    remove,
    write_bytes,
)
from hemoco.train.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from hemoco.train.pretrain import TrainState, build_state
from jobs.cli import main
from pipeline.shards.pack import _pack_shard, _plan
from tests.helpers.ceph import add_user, ceph_server
from tests.helpers.shard_folders import png, write_shards

CONFIG = PretrainConfig(
    global_batch_size=16,
    encoder=EncoderConfig(architecture="resnet10t", stem="small"),
    views=ViewsConfig(size=8),
    moco=MoCoConfig(embedding_size=8, queue_length=64, bn_group_size=2),
    stream=StreamConfig(workers=0, lanes=4, shards_per_block=2),
)
RECIPE = """
from hemoco.config import *
recipe = Recipe(
    name="tiny",
    data=DataConfig(test_split="train"),
    pretrain=PretrainConfig(
        global_batch_size=16,
        moco=MoCoConfig(queue_length=64, bn_group_size=2),
        stream=StreamConfig(workers=0, lanes=4),
    ),
)
"""


class Running(NamedTuple):
    """A running server, and its folder."""

    kind: str
    server: S3Server
    folder: Path


@contextlib.contextmanager
def environment(server: S3Server, **changed: str) -> Iterator[None]:
    """Sets the server's variables, and drops clients that were made with others."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (s3_environment(server) | changed).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


def client(server: S3Server):
    """A client of AWS's own library, for requests that hemoco never sends."""
    made = botocore.session.Session().create_client(
        "s3",
        region_name="us-east-1",
        endpoint_url=server.endpoint,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )
    return contextlib.closing(made)


@pytest.fixture(scope="module", params=["rclone", "ceph"])
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """One of the two servers, with the bucket `hemoco`."""
    folder = tmp_path_factory.mktemp(request.param)
    with (s3_server if request.param == "rclone" else ceph_server)(folder) as server:
        if request.param == "ceph":
            with client(server) as made:
                made.create_bucket(Bucket=BUCKET)
        yield Running(request.param, server, folder)


@pytest.fixture
def place(running: Running) -> Iterator[str]:
    """A URL on the server that no other test uses; the environment names the server."""
    with environment(running.server):
        yield f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def state() -> TrainState:
    return build_state(CONFIG, torch.device("cpu"), data_digest="d")


def batches(url: str, start: StreamPosition | None = None) -> list[stream.Batch]:
    plan = dataclasses.replace(stream.pretraining_plan(CONFIG), epochs=1)
    listed, cpu = BadSampleFile("memory://unwritten"), torch.device("cpu")
    return list(
        stream.batches(
            url,
            read_index(url),
            "train",
            plan,
            rank=0,
            world_size=1,
            start=start,
            device=cpu,
            bad_samples=listed,
        )
    )


def same(ours: list[stream.Batch], theirs: list[stream.Batch]) -> bool:
    pairs = list(zip(ours, theirs, strict=True))
    return all(
        one.keys == other.keys and torch.equal(one.crops, other.crops) for one, other in pairs
    )


@pytest.mark.parametrize("size", [0, 1, 6 * 1024**2])
def test_bytes_come_back_and_the_last_write_counts(place, size):
    write_bytes(f"{place}/a ö/b.bin", b"before")
    data = b"\x00\xff" * (size // 2) + b"x" * (size % 2)
    write_bytes(f"{place}/a ö/b.bin", data)
    assert read_bytes(f"{place}/a ö/b.bin") == data


def test_names_are_listed_one_level_deep_and_removed_with_all_below(place):
    for name in ("run/a", "run/deep/b", "run2"):
        write_bytes(f"{place}/{name}", b"x")
    assert list_names(place) == ["run", "run2"]
    assert list_names(f"{place}/run") == ["a", "deep"]
    remove(f"{place}/run")
    remove(f"{place}/run")
    assert (exists(f"{place}/run"), exists(f"{place}/run2")) == (False, True)


def test_more_names_than_a_page_are_listed_and_removed(place, running):
    folder = place.rpartition("/")[2]
    with client(running.server) as made, ThreadPoolExecutor(10) as threads:
        list(
            threads.map(
                lambda n: made.put_object(Bucket=BUCKET, Key=f"{folder}/{n:05d}", Body=b""),
                range(1005),
            )
        )
    assert len(list_names(place)) == 1005
    remove(place)
    assert list_names(place) == []


def test_the_check_of_a_storage_leaves_nothing(place):
    check_writable(place)
    assert list_names(place) == []


def test_ranges_are_read_through_signed_urls(place):
    data = bytes(range(256)) * 4096
    write_bytes(f"{place}/k.tar", data)
    assert "X-Amz-Signature=" in direct_url(f"{place}/k.tar")
    assert fetch_range(f"{place}/k.tar", 1000, 300_000, FetchCounts()) == data[1000:300_000]


def test_a_whole_shard_is_proved_and_a_replaced_one_refused(place):
    data = b"shard" * 100_000
    write_bytes(f"{place}/k.tar", data)
    digest = hashlib.sha256(data).hexdigest()
    assert verified_shard(f"{place}/k.tar", len(data), digest, FetchCounts()) == data
    write_bytes(f"{place}/k.tar", data[:-1] + b"!")
    with pytest.raises(ShardError, match="its SHA-256 is"):
        verified_shard(f"{place}/k.tar", len(data), digest, FetchCounts())


def test_the_stream_gives_the_batches_of_the_disk_and_resumes_within_an_epoch(place, tmp_path):
    expected = batches(write_shards(tmp_path.as_uri(), [40, 7, 30, 51]))
    found = batches(write_shards(place, [40, 7, 30, 51]))
    assert same(found, expected)
    assert same(batches(place, start=expected[2].position), expected[3:])


def test_a_pack_writes_shards_that_verify_and_restores_what_is_damaged(place, tmp_path):
    for number in range(12):
        (tmp_path / f"class{number % 2}").mkdir(exist_ok=True)
        (tmp_path / f"class{number % 2}" / f"{number}.png").write_bytes(png(number))
    source = open_source([str(tmp_path)], "train")
    plans = _plan(source.items, 6, 0)
    packed = [_pack_shard(plan, place, True, None) for plan in plans]
    write_index(
        place, ShardIndex(tuple(each.shard for each in packed), source.classes, source.categories)
    )
    index = read_index(place)
    assert sum(len(read_shard(place, shard)) for shard in index.shards) == 12
    write_bytes(f"{place}/{index.shards[0].name}", b"damaged")
    restored = _pack_shard(plans[0], place, False, index.shards[0]).restored
    assert len(restored) == 1
    assert len(read_shard(place, index.shards[0])) == 6


def test_the_newest_sound_checkpoint_is_resumed_and_older_ones_go(place, state):
    for step in (1, 2, 3):
        state.step = step
        save_checkpoint(state, place, attempt=0, keep_last=2)
    assert list_names(place) == ["step_00000002_a0", "step_00000003_a0"]
    write_bytes(f"{place}/step_00000003_a0/state.pt", b"damaged")
    found = newest_checkpoint(place)
    assert found == f"{place}/step_00000002_a0"
    other = build_state(CONFIG, torch.device("cpu"), data_digest="d")
    load_checkpoint(found, other)
    assert other.step == 2
    expected = state.model.state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in other.model.state_dict().items()
    )


def test_a_run_does_not_start_anew_where_all_checkpoints_are_damaged(place, state):
    checkpoint = save_checkpoint(state, place, attempt=0, keep_last=1)
    write_bytes(f"{checkpoint}/state.pt", b"damaged")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints verifies"):
        newest_checkpoint(place)


def test_a_backbone_comes_back_bit_for_bit(place, state):
    backbone = Backbone(
        state.model.query_encoder.encoder, CONFIG.encoder, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    )
    export_backbone(backbone, f"{place}/backbone.safetensors", {"data_digest": "d", "run_id": "r"})
    found = load_backbone(f"{place}/backbone.safetensors").encoder.state_dict()
    assert all(
        torch.equal(tensor, found[name]) for name, tensor in backbone.encoder.state_dict().items()
    )


@pytest.mark.parametrize("touch", [read_bytes, list_names, check_writable, read_index])
def test_a_missing_bucket_is_named(place, touch):
    with pytest.raises(
        StorageError, match="bucket 'nowhere' does not exist; create it or correct the URL"
    ):
        touch("s3://nowhere/folder")


@pytest.mark.parametrize("touch", [read_bytes, exists, list_names, check_writable])
@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        (
            "AWS_SECRET_ACCESS_KEY",
            r"403 SignatureDoesNotMatch\); .* this is not the secret of the key",
        ),
        (
            "AWS_ACCESS_KEY_ID",
            r"403 InvalidAccessKeyId\); check AWS_ACCESS_KEY_ID: the server .* does not know",
        ),
    ],
)
def test_a_wrong_key_and_a_wrong_secret_are_told_apart(running, place, touch, variable, advice):
    with (
        environment(running.server, **{variable: "wrong"}),
        pytest.raises(StorageError, match=advice) as raised,
    ):
        touch(f"{place}/k")
    assert running.server.secret_key not in str(raised.value)


@pytest.mark.parametrize("touch", [read_bytes, exists, list_names, check_writable])
def test_a_clock_that_is_off_is_named(place, touch, monkeypatch):
    now = botocore.auth.get_current_datetime
    late = datetime.timedelta(hours=2)
    monkeypatch.setattr(
        botocore.auth, "get_current_datetime", lambda *words, **more: now(*words, **more) - late
    )
    with pytest.raises(StorageError, match=r"RequestTimeTooSkewed\); set this machine's clock"):
        touch(f"{place}/k")


def test_a_certificate_that_nobody_vouches_for_is_named(place, tmp_path, monkeypatch):
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "key",
        "-out",
        "cert",
    ]
    subprocess.run(
        [*words, "-subj", "/CN=127.0.0.1"], cwd=tmp_path, capture_output=True, check=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{server.server_port}")
        with pytest.raises(
            StorageError, match="is not trusted: name its authority's file in AWS_CA_BUNDLE"
        ):
            list_names(place)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("running", ["ceph"], indirect=True)
class TestRights:
    """Permissions of a second user by a bucket policy, which only Ceph has."""

    @pytest.fixture
    def allowed(self, running, place):
        """Opens the bucket for some actions to a new user, whose keys the environment then has."""
        name = uuid.uuid4().hex
        keys = add_user(running.folder, name)
        write_bytes(f"{place}/k", b"x")

        @contextlib.contextmanager
        def allow(*actions: str) -> Iterator[None]:
            rule = {
                "Effect": "Allow",
                "Principal": {"AWS": [f"arn:aws:iam:::user/{name}"]},
                "Action": list(actions),
                "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
            }
            policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
            with client(running.server) as made:
                made.put_bucket_policy(Bucket=BUCKET, Policy=policy)
            with environment(
                running.server, AWS_ACCESS_KEY_ID=keys[0], AWS_SECRET_ACCESS_KEY=keys[1]
            ):
                yield

        return allow

    def test_who_may_only_read_reads_and_is_told_the_right_to_write(self, place, allowed):
        with allowed("s3:GetObject", "s3:ListBucket"):
            assert (read_bytes(f"{place}/k"), list_names(place)) == (b"x", ["k"])
            with pytest.raises(
                StorageError, match=r"403 AccessDenied\); ask for s3:PutObject: the key is known"
            ):
                check_writable(place)

    def test_a_refused_removal_is_not_taken_for_done(self, place, allowed):
        with (
            allowed("s3:GetObject", "s3:ListBucket", "s3:PutObject"),
            pytest.raises(StorageError, match="ask for s3:DeleteObject"),
        ):
            check_writable(place)

    def test_objects_of_which_some_may_not_be_removed_are_not_taken_for_gone(self, running, place):
        write_bytes(f"{place}/kept/k", b"x")
        rule = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": ["s3:DeleteObject"],
            "Resource": [f"arn:aws:s3:::{place.removeprefix('s3://')}/kept/*"],
        }
        with client(running.server) as made:
            made.put_bucket_policy(
                Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]})
            )
        with pytest.raises(StorageError, match="cannot be removed; ask for s3:DeleteObject"):
            remove(place)

    def test_who_may_nothing_is_told_which_rights(self, place, allowed):
        with allowed("s3:GetBucketLocation"):
            for touch, right in ((read_bytes, "s3:GetObject"), (list_names, "s3:ListBucket")):
                with pytest.raises(StorageError, match=f"ask for {right}"):
                    touch(f"{place}/k")

    def test_preflight_says_what_of_the_storage_is_not_allowed(
        self, place, allowed, tracking, tmp_path, capsys
    ):
        write_shards(f"{place}/shards", [40, 40])
        recipe = tmp_path / "tiny.py"
        recipe.write_text(RECIPE)
        with allowed("s3:GetObject", "s3:ListBucket"):
            status = main(
                ["preflight", str(recipe), "--data.shards", f"{place}/shards", "--storage", place]
            )
        shown = capsys.readouterr()
        failed = [line for line in shown.out.splitlines() if line.startswith("FAIL")]
        assert (status, len(failed)) == (1, 1)
        assert "storage write" in failed[0] and "ask for s3:PutObject" in failed[0]
        assert shown.err.strip().startswith("error: 1 of ")
