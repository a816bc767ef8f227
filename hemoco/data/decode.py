"""An image file as pixels: common JPEGs by simplejpeg, everything else by Pillow.

Both use libjpeg-turbo with its slow, exact transform and smooth upsampling, so their pixels are the same bit for bit:
on every JPEG of the odd files, and on 20,000 CIFAR and COCO JPEGs damaged at random, simplejpeg accepted none that
Pillow refuses and painted none differently. It takes 0.6 to 0.7 of Pillow's time on photos, a fifth on small images.

What makes it safe is its strict mode: the first warning of libjpeg is an error. Then Pillow decides, which overlooks
warnings (junk in the header, odd metadata: the picture is whole), with one exception. Pillow notices that a file has
ended only if its decoder asks for more: where the lost end is zeros, or only the middle is missing, it paints grey.
Here a file cut off is always refused: one without an end-of-image marker, and one where libjpeg had to make up pixels.
What no decoder can see is a changed byte that is still a valid code; that is what the checksums of the shards are for.

Shapes: H x W an image.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from hemoco.errors import ShardError

Reason = Literal["not an image", "damaged", "too large", "unsupported"]

_MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_JPEG, _PNG, b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
_JPEG_SCAN, _JPEG_END = (
    b"\xff\xda",
    b"\xff\xd9",
)  # inside a scan 0xff is escaped, so neither occurs by chance
_SEGMENTS = frozenset(range(0xC0, 0xFF)) - frozenset(
    range(0xD0, 0xDA)
)  # JPEG markers that a length follows
_PNG_END = b"IEND\xaeB`\x82"  # with its checksum
_PIXELS_MADE_UP = (
    "Premature end of JPEG file",
    "premature end of data segment",
    "bad Huffman code",
)


class UndecodableImage(ShardError):
    """An image file that has no pixels for us.

    Args:
        reason: short and of a closed set, to count by.
        message: what was given and what is allowed.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["UndecodableImage"], tuple[Reason, str]]:
        return type(self), (self.reason, str(self))  # it comes from other processes


def decode_image(data: bytes) -> Tensor:
    """An image file as uint8 RGB (3, H, W), channels last in memory: first frame, upright as its EXIF says.

    Transparency is laid over white; 16-bit grey keeps its high byte.

    Raises:
        UndecodableImage: not an image, damaged, too large, or of a kind that is not supported.
    """
    try:
        _check_end(data)
        pixels = _jpeg_pixels(data) if data.startswith(_JPEG) else None
        if pixels is None:
            pixels = _pillow_pixels(data)
    except (UndecodableImage, ImportError):  # a missing decoder is not a bad image
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UndecodableImage("too large", f"{error} Scale it down.") from error
    except UnidentifiedImageError as error:
        if data.startswith(_SIGNATURES):
            raise UndecodableImage(
                "damaged", "damaged image (its first bytes are right, its header is not)"
            ) from error
        raise UndecodableImage("not an image", f"its {len(data)} bytes are not an image") from error
    except Exception as error:  # decoders meet damage with nearly any exception
        raise UndecodableImage(
            "damaged", f"damaged image ({type(error).__name__}: {error})"
        ) from error
    return pixels.permute(2, 0, 1)


def _check_end(data: bytes) -> None:
    """Refuses what was cut off where its decoder may not notice."""
    if data.startswith(_JPEG):
        whole = data.endswith(_JPEG_END) or data.find(_JPEG_END, data.find(_JPEG_SCAN)) >= 0
    else:
        whole = not data.startswith(_PNG) or data.rfind(_PNG_END) >= 0
    if not whole:
        raise UndecodableImage(
            "damaged", f"damaged image (its {len(data)} bytes have no end marker)"
        )


def _jpeg_pixels(data: bytes) -> Tensor | None:
    """Pixels (H, W, 3) of a sound 8-bit JPEG in YCbCr or grey; None if that is for Pillow to decide."""
    import simplejpeg  # type: ignore[import-untyped]  # here: encoders are loaded where it is missing

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colours not in ("YCbCr", "Gray"):
            return None  # the ways from CMYK to RGB differ
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data))
    except ValueError as error:
        if str(error).startswith("Unsupported JPEG data precision"):  # 12 bits
            raise UndecodableImage(
                "unsupported", f"{error}; save it with 8 bits a channel"
            ) from error
        if any(warning in str(error) for warning in _PIXELS_MADE_UP):
            raise UndecodableImage("damaged", f"damaged image ({error})") from error
        return None
    return _upright(pixels, _pillow_orientation(data)) if _may_have_exif(data) else pixels


def _may_have_exif(jpeg: bytes) -> bool:
    """Whether a JPEG that was decoded has an APP1 segment, where EXIF and XMP are, or a header too odd to tell."""
    at = 2
    while jpeg[at] == 0xFF and jpeg[at + 1] in _SEGMENTS:
        if jpeg[at + 1] in (0xDA, 0xE1):
            return jpeg[at + 1] == 0xE1
        at += 2 + int.from_bytes(jpeg[at + 2 : at + 4])
    return True


def _pillow_orientation(data: bytes) -> object:
    with _pillow_warnings(), Image.open(io.BytesIO(data)) as image:
        return image.getexif().get(ExifTags.Base.Orientation)


def _pillow_pixels(data: bytes) -> Tensor:
    """Pixels (H, W, 3) of whatever Pillow reads."""
    with _pillow_warnings(), Image.open(io.BytesIO(data)) as image:
        _check_size(image.width, image.height)
        if image.format == "EPS":
            raise UndecodableImage(
                "unsupported", "EPS is a program for Ghostscript; save it as PNG"
            )
        image.load()  # some formats have their EXIF after the pixels
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _upright(torch.from_numpy(np.array(_to_rgb(image))), orientation)


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Odd metadata does not matter here; a size that some layer inside a file only admits to later does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _check_size(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise UndecodableImage(
            "too large", f"{width} x {height} pixels are more than {_MAX_PIXELS}; scale it down"
        )


def _upright(pixels: Tensor, orientation: object) -> Tensor:
    """Pixels (H, W, 3) turned and mirrored as an EXIF orientation of 2 to 8 asks for; others mean nothing."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels.flip(0)
    if orientation in (2, 3, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)  # (W, H, 3)
    return pixels.contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        high_byte = (
            np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        )  # Pillow would clip at 255
        return Image.fromarray(high_byte.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
