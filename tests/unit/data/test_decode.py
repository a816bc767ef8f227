import csv
import io
import json
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from hemoco.data import decode
from hemoco.data.decode import UndecodableImage, decode_image

ODD = Path(__file__).parents[2] / "data" / "odd"
ROWS = list(csv.DictReader((ODD / "manifest.csv").read_text().splitlines()))
REFUSED = {
    "made/65536x65536_header.png": "too large",
    "made/empty.jpg": "not an image",
    "made/giant_header.jpg": "too large",
    "made/half.jpg": "damaged",
    "made/solid_20000x20000.png": "too large",
    "made/text.jpg": "not an image",
    "pillow/broken.png": "damaged",
    "pillow/broken_data_stream.png": "damaged",
    "pillow/crash-2020-10-test.tif": "damaged",
    "pillow/crash-86214e58da443d2b80820cff9677a38a33dcbbca.tif": "damaged",
    "pillow/decompression_bomb.gif": "too large",
    "pillow/decompression_bomb.ico": "too large",
    "pillow/libtiff_segfault.tif": "damaged",
    "pillow/negative_size.ppm": "not an image",
    "pillow/oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "damaged",
    "pillow/reallybig.bmp": "too large",
    "pillow/shortfile.bmp": "damaged",
    "pillow/truncated_end_chunk.png": "damaged",
    "pillow/truncated_jpeg.jpg": "damaged",
    "pillow/zero_height.j2k": "not an image",
    "pillow/zero_width.gif": "damaged",
    "sharp/corrupt-header.jpg": "damaged",
    "sharp/truncated.jpg": "damaged",
    "sharp/truncated.png": "damaged",
}
FUZZED = [
    row["file"]
    for row in ROWS
    if Path(row["file"]).name.startswith(("crash-", "oom-", "libtiff_segfault"))
]
BOMBS = [name for name, reason in REFUSED.items() if reason == "too large"]
LIMITED = """
import json, resource, sys
from pathlib import Path
from hemoco.data.decode import UndecodableImage, decode_image
def reason(name):
    try:
        decode_image(Path(folder, name).read_bytes())
    except UndecodableImage as error:
        return error.reason
def reasons(names, megabytes):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    return {name: reason(name) for name in names}
folder, fuzzed, bombs = json.loads(sys.argv[1])
reason("made/text.jpg"), reason("pillow/hopper.jpg")  # all decoders are loaded now
print(json.dumps(reasons(bombs, 50) | reasons(fuzzed, 256)))
"""


def read(name: str) -> bytes:
    return (ODD / name).read_bytes()


def picture(width: int = 48, height: int = 40) -> Image.Image:
    """A part of a photo."""
    with Image.open(io.BytesIO(read("pillow/hopper.bmp"))) as photo:
        return photo.resize((width, height), box=(20, 20, 100, 100))


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_seen(data: bytes) -> NDArray[np.uint8]:
    """The image as a viewer shows it (H, W, 3), decoded with Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        return np.stack([(np.asarray(image) // 256).astype(np.uint8)] * 3, axis=2)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        image = white
    return np.array(image.convert("RGB"))


def pixels(image: Tensor) -> NDArray[np.uint8]:
    return image.permute(1, 2, 0).numpy()


def refusal(data: bytes) -> str:
    with pytest.raises(UndecodableImage) as caught:
        decode_image(data)
    return caught.value.reason


def segment(marker: int, *content: int) -> bytes:
    return bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + bytes(content)


def grey_jpeg(
    frame: int, *, bits: int = 8, tables: bytes = b"", scan: bytes = b"", selection: int = 0
) -> bytes:
    """A grey JPEG of 8 x 8 pixels in a coding process that Pillow does not write."""
    quantisation = segment(0xDB, 0, *[1] * 64)
    header = segment(frame, bits, 0, 8, 0, 8, 1, 1, 0x11, 0)
    start = segment(0xDA, 1, 1, 0, selection, 0 if selection else 63, 0)
    return b"\xff\xd8" + quantisation + header + tables + start + scan + b"\xff\xd9"


def test_every_refused_file_has_its_reason_in_the_table() -> None:
    assert {row["file"] for row in ROWS if row["pillow_13_decode"] != "decodes"} <= set(REFUSED)


@pytest.mark.filterwarnings("ignore")  # Pillow's, in the oracle
@pytest.mark.parametrize("name", [row["file"] for row in ROWS if row["file"] not in FUZZED])
def test_odd_files_look_as_pillow_shows_them_or_are_refused(name: str) -> None:
    if name in REFUSED:
        assert refusal(read(name)) == REFUSED[name]
    else:
        image = decode_image(read(name))
        assert image.dtype == torch.uint8 and image.shape[0] == 3
        assert image.permute(1, 2, 0).is_contiguous()
        assert np.array_equal(pixels(image), as_seen(read(name)))


def test_bombs_and_fuzzed_files_are_refused_within_little_memory() -> None:
    arguments = json.dumps([str(ODD), FUZZED, BOMBS])
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, arguments], capture_output=True, check=True, text=True
    )
    assert json.loads(done.stdout) == {name: REFUSED[name] for name in BOMBS + FUZZED}


@pytest.mark.parametrize("number", range(2, 9))
def test_exif_orientation_is_applied(number: int) -> None:
    upright, image = (
        decode_image(read(f"pillow/hopper{name}.jpg")) for name in ("", f"_orientation_{number}")
    )
    assert image.shape == (3, 128, 128)
    assert (upright.float() - image.float()).abs().mean() < 12  # other JPEG encodings


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("where", ["exif", "xmp"])
def test_jpegs_are_turned_as_pillow_turns_them(number: int, where: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = number
    xmp = f'<rdf:Description tiff:Orientation="{number}"/>'.encode()
    data = encoded(picture(), "jpeg", **({"exif": exif} if where == "exif" else {"xmp": xmp}))
    assert np.array_equal(pixels(decode_image(data)), as_seen(data))
    filled = data[:2] + b"\xff" + data[2:]  # markers may be preceded by fill bytes
    assert np.array_equal(pixels(decode_image(filled)), as_seen(data))


@pytest.mark.parametrize("size", [(48, 40), (17, 31), (1, 1)])
@pytest.mark.parametrize(
    "options", [{"subsampling": number} for number in range(3)] + [{"progressive": True}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_common_jpegs_take_the_fast_way_and_lose_nothing(
    size: tuple[int, int], options: Any, mode: str
) -> None:
    data = encoded(picture(*size).convert(mode), "jpeg", **options)
    fast = decode._jpeg_pixels(data)
    assert fast is not None
    assert np.array_equal(fast.numpy(), as_seen(data))


def test_arithmetic_and_lossless_jpegs_are_decoded() -> None:
    arithmetic = grey_jpeg(0xC9)
    lossless = grey_jpeg(0xC3, tables=segment(0xC4, 0, 1, *[0] * 15, 0), scan=bytes(8), selection=1)
    for data in (arithmetic, lossless):
        assert decode_image(data).shape == (3, 8, 8)
        assert np.array_equal(pixels(decode_image(data)), as_seen(data))


def test_what_no_decoder_here_knows_is_unsupported() -> None:
    twelve_bits = grey_jpeg(0xC1, bits=12)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    for data in (twelve_bits, postscript):
        assert refusal(data) == "unsupported"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("jpeg", {}),
        ("jpeg", {"progressive": True}),
        ("png", {}),
        ("webp", {}),
        ("bmp", {}),
        ("tiff", {}),
        ("ppm", {}),
    ],
)
def test_a_file_cut_off_anywhere_is_refused(kind: str, options: Any) -> None:
    data = encoded(picture(20, 20), kind, **options)
    for length in range(len(data)):
        assert refusal(data[:length]) in ("damaged", "not an image")


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_whose_end_became_zeros_is_refused(mode: str) -> None:
    data = encoded(picture().convert(mode), "jpeg", exif=Image.Exif())
    for length in range(2, len(data)):
        assert refusal(data[:length].ljust(len(data), b"\0")) in ("damaged", "not an image")


def test_a_jpeg_that_lacks_its_middle_is_refused_where_the_decoder_misses_it() -> None:
    data = encoded(picture(), "jpeg", progressive=True)
    assert refusal(data[:-200] + data[-2:]) == "damaged"
    with Image.open(io.BytesIO(data[:-200] + data[-2:])) as image:
        image.load()  # Pillow makes up the rest: there we differ


@pytest.mark.filterwarnings("ignore")  # Pillow's, in the oracle
def test_damaged_jpegs_are_refused_or_look_as_pillow_shows_them() -> None:
    rng = np.random.default_rng(0)
    whole = encoded(picture(), "jpeg", restart_marker_rows=1)
    decoded = 0
    for _ in range(400):
        data, offset = bytearray(whole), rng.integers(len(whole))
        data[offset : offset + rng.integers(1, 4)] = rng.bytes(rng.integers(0, 4))
        try:
            image = decode_image(bytes(data))
        except UndecodableImage:
            continue
        assert np.array_equal(pixels(image), as_seen(bytes(data)))
        decoded += 1
    assert 0 < decoded < 400


def test_a_size_hidden_in_an_icon_counts() -> None:
    icon_header = struct.pack("<HHHBBBBHHII", 0, 1, 1, 64, 64, 0, 0, 1, 32, 57, 22)
    png_header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 9_000, 1, 0, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(png_header))
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + png_header + checksum
    end = struct.pack(">I", 0) + b"IDAT" + bytes(4) + b"IEND\xaeB`\x82"
    assert refusal(icon_header + png + end) == "too large"


def test_a_refusal_says_the_size_given_and_the_size_allowed() -> None:
    with pytest.raises(UndecodableImage, match="20000 x 14000 pixels are more than 89478485"):
        decode_image(read("made/giant_header.jpg"))


def test_a_refusal_survives_the_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(UndecodableImage("too large", "10 x 10 pixels")))
    assert (error.reason, str(error)) == ("too large", "10 x 10 pixels")


def test_a_missing_decoder_is_not_taken_for_a_bad_image(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "jpeg")
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(ImportError, match="simplejpeg"):
        decode_image(data)


def test_cmyk_looks_like_its_rgb_partner() -> None:
    cmyk, rgb = (decode_image(read(f"pillow/pil_sample_{name}.jpg")) for name in ("cmyk", "rgb"))
    assert (cmyk.float() - rgb.float()).abs().mean() < 12  # no colour profile is used


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = decode_image(encoded(Image.fromarray(values)))
    assert np.array_equal(image.numpy(), np.stack([(values // 256).astype(np.uint8)] * 3))


def test_transparency_is_laid_over_white() -> None:
    image = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    for mode in ("RGBA", "P"):
        decoded = decode_image(encoded(image.quantize(4) if mode == "P" else image))
        assert decoded[:, 0, 0].tolist() == [200, 0, 0]
        assert decoded[:, 3, 3].tolist() == [255, 255, 255]


def test_grey_and_single_pixel_images_have_three_channels() -> None:
    assert decode_image(read("made/one_pixel.png")).shape == (3, 1, 1)
    grey = decode_image(read("pillow/hopper_gray.jpg"))
    assert torch.equal(grey[0], grey[2])
