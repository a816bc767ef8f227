"""Ways of making views that stream_speed.py compares.

All read the same images, each with its loader set up as its users have it.

Shapes: B images of a batch, S x S a view.
"""

import dataclasses
import functools
import io
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from multiprocessing import forkserver

import simplejpeg
import torch
from PIL import Image
from speed_data import tar_names
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms

from hemoco.config import MoCoConfig, PretrainConfig, StreamConfig, ViewsConfig
from hemoco.data.decode import decode_image
from hemoco.data.shards.index import ShardColumns, read_index
from hemoco.data.stream.batches import pretraining_plan
from hemoco.data.stream.loader import CropSource, start_loader
from hemoco.data.stream.webdataset import SampleSource
from hemoco.data.transforms import crop_into, draw_crops, resize
from hemoco.errors import HemocoError
from hemoco.storage.objects import filesystem

PROCESSES, BATCH, SIZE = 2, 64, 224
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
GLOBAL_BATCH = (
    BATCH * PROCESSES
)  # so that each process of hemoco makes 64 images of a step, as the others' do
STREAM = StreamConfig(workers=PROCESSES, lanes=4, shards_per_block=2)
VIEWS = ViewsConfig(size=SIZE)
PRETRAIN = PretrainConfig(
    global_batch_size=GLOBAL_BATCH,
    views=VIEWS,
    moco=MoCoConfig(queue_length=GLOBAL_BATCH),
    stream=STREAM,
)

View = Callable[[bytes], Tensor]
"""From a JPEG to uint8 (3, S, S) or (2, 3, S, S)."""

pil_transform = transforms.Compose(
    [
        transforms.RandomResizedCrop(SIZE, scale=SCALE),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
    ]
)


def pil_view(data: bytes) -> Tensor:
    """The usual path: Pillow decodes, torchvision crops and resizes Pillow images."""
    return pil_transform(Image.open(io.BytesIO(data)).convert("RGB"))


def pil_views_decoded_twice(data: bytes) -> Tensor:
    """Two views by two calls of the usual path."""
    return torch.stack([pil_view(data), pil_view(data)])


def pil_views_decoded_once(data: bytes) -> Tensor:
    """Two views as MoCo's TwoCropsTransform makes them."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return torch.stack([pil_transform(image), pil_transform(image)])


def fast_view(data: bytes) -> Tensor:
    """The fast decoder and resizer that every loader is given for a comparison like for like."""
    return random_view(torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1))


def random_view(image: Tensor) -> Tensor:
    """A random resized crop, flipped or not, of an image uint8 (3, H, W)."""
    top, left, high, wide = transforms.RandomResizedCrop.get_params(image, list(SCALE), list(RATIO))
    crop = resize(image[:, top : top + high, left : left + wide], (SIZE, SIZE))
    return crop.flip(-1) if torch.rand(()) < 0.5 else crop


class HemocoViews:
    """One view or two as hemoco's stream makes them: random numbers and memory are a whole batch's.

    Args:
        views: 1 or 2.
    """

    def __init__(self, views: int) -> None:
        self._row, self._step = BATCH, 0
        self._crops = torch.zeros((BATCH, views, SIZE, SIZE, 3), dtype=torch.uint8).permute(
            0, 1, 4, 2, 3
        )

    def __call__(self, data: bytes) -> Tensor:
        if self._row == BATCH:
            mirror(self._crops)
            self._draws = draw_crops(VIEWS, seed=0, epoch=0, step=self._step, slots=(0, BATCH))
            self._row, self._step = 0, self._step + 1
        crops = self._crops[self._row]
        crop_into(crops, decode_image(data), self._draws, self._row)
        self._row += 1
        return crops


hemoco_one_view = HemocoViews(1)
hemoco_two_views = HemocoViews(2)


def hemoco_batches(url: str, crops: int) -> Iterator[Tensor]:
    """hemoco's own loader processes, up to what they hand to the trainer.

    They make one view of an image or two.
    """
    _start_fork_server()
    plan = dataclasses.replace(pretraining_plan(PRETRAIN), crops=crops, epochs=1)
    parts = CropSource(
        url, ShardColumns(read_index(url).split("train")), plan, slots=(0, GLOBAL_BATCH), start=None
    )
    for part in start_loader(parts, torch.device("cpu")):
        if isinstance(part, HemocoError):
            raise part
        mirror(part.crops)
        yield part.crops


def mirror(crops: Tensor) -> None:
    """Flips about half of some views (images, views, 3, S, S).

    hemoco leaves this to the device that trains.
    """
    for image, view in (torch.rand(crops.shape[:2]) < VIEWS.flip).nonzero().tolist():
        crops[image, view].copy_(crops[image, view].flip(-1))


def hemoco_stage_batches(url: str, view: View) -> Iterator[Tensor]:
    """hemoco's stream as the first stage of a webdataset pipeline."""
    import webdataset

    source = SampleSource(
        url, "train", config=STREAM, seed=0, global_batch_size=GLOBAL_BATCH, rank=0, world_size=1
    )  # fmt: skip
    pipeline = webdataset.DataPipeline(source, webdataset.map(functools.partial(_jpg_view, view)))
    _start_fork_server()
    # as in hemoco's own stream: forked children would inherit the client that has read the index
    return iter(
        DataLoader(
            pipeline, batch_size=BATCH, num_workers=PROCESSES, multiprocessing_context="forkserver"
        )
    )


def webdataset_batches(url: str, view: View) -> Iterator[Tensor]:
    """webdataset: shuffled shards, a buffer of 1,000 samples, tars opened through s3fs."""
    samples = webdataset_samples(url, shuffle=True).map(functools.partial(_jpg_view, view))
    return iter(DataLoader(samples, batch_size=BATCH, num_workers=PROCESSES))


def webdataset_samples(url: str, *, shuffle: bool) -> "webdataset.WebDataset":  # noqa: F821
    """webdataset's samples over s3fs; it has no opener for s3:// of its own."""
    import webdataset
    from webdataset.gopen import gopen_schemes

    gopen_schemes["s3"] = _open_by_s3fs
    tars = [f"{url}/{name}" for name in tar_names(url.rpartition("/")[2])]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars) if shuffle else False)
    return samples.shuffle(1000) if shuffle else samples


def mosaic_batches(url: str, view: View) -> Iterator[Tensor]:
    """mosaicml-streaming: its own shards, kept in a new local folder."""
    import streaming

    class Views(streaming.StreamingDataset):
        def __getitem__(self, at: int) -> Tensor:
            return view(super().__getitem__(at)["jpg"])

    _clean_shared_memory()
    samples = Views(remote=f"{url}-mds", local=tempfile.mkdtemp(), shuffle=True, batch_size=BATCH)
    for stream in (
        samples.streams
    ):  # else forked workers read from one socket, and each gets some of the other's bytes
        stream._downloader.clean_up()
    return iter(DataLoader(samples, batch_size=BATCH, num_workers=PROCESSES))


def litdata_batches(url: str, view: View) -> Iterator[Tensor]:
    """litdata: its own chunks, kept in a new local folder."""
    import litdata

    class Views(litdata.StreamingDataset):
        def __getitem__(self, at: int) -> Tensor:
            return view(super().__getitem__(at)["jpg"])

    # it refuses plain http, and no setting of it reaches its client
    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    samples = Views(
        f"{url}-litdata", cache_dir=tempfile.mkdtemp(), shuffle=True, storage_options=options
    )
    return iter(litdata.StreamingDataLoader(samples, batch_size=BATCH, num_workers=PROCESSES))


def hemoco_bytes(url: str, passes: int) -> Iterator[int]:
    """Sizes of the images as hemoco's reader gives them, in one process, nothing decoded."""
    slots = (0, GLOBAL_BATCH)
    plan = dataclasses.replace(pretraining_plan(PRETRAIN), epochs=passes)
    source = CropSource(
        url, ShardColumns(read_index(url).split("train")), plan, slots=slots, start=None
    )
    with closing(source._reader(slots)) as reader:
        for position, pieces in source._steps(slots):
            yield from (len(read.image) for read in reader.encoded(*position, pieces))


def webdataset_bytes(url: str, passes: int) -> Iterator[int]:
    """Sizes of the images as webdataset gives them over s3fs, in one process, nothing decoded."""
    for _ in range(passes):
        yield from (len(sample["jpg"]) for sample in webdataset_samples(url, shuffle=False))


def _jpg_view(view: View, sample: dict[str, bytes]) -> Tensor:
    return view(sample["jpg"])


def _start_fork_server() -> None:
    """Starts the fork server unless it already runs.

    It preloads what forked processes of the other loaders have imported, too.
    """
    multiprocessing.set_forkserver_preload([__name__, "s3fs"])
    forkserver.ensure_running()


@functools.cache  # once: later it would take the memory of data sets in use
def _clean_shared_memory() -> None:
    """Removes shared memory left by a run of mosaicml-streaming that died.

    With it, the loader would give another data set's samples.
    """
    import streaming

    streaming.base.util.clean_stale_shared_memory()


def _open_by_s3fs(url: str, mode: str = "rb", bufsize: int = 8192, **_: object) -> object:
    made, path = filesystem(url)
    return made.open(path, "rb")
