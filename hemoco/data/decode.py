"""Decodes image files: common JPEGs with simplejpeg, everything else with Pillow.

Both use libjpeg-turbo with its slow, exact transform and smooth upsampling, so their pixels are the
same bit for bit. This was compared on the JPEGs in tests/data/odd and on 20,000 CIFAR and COCO
JPEGs damaged at random: simplejpeg accepted none that Pillow refuses, and no pixel differed. It
takes 0.6 to 0.7 of Pillow's time on photos, a fifth on small images.

simplejpeg runs in strict mode: the first warning of libjpeg is an error. Then Pillow decides, which
ignores warnings, because the picture may be whole (junk in the header, odd metadata). With one
exception: Pillow notices that a file is cut only if its decoder asks for more bytes. Where the lost
end is zeros, or only the middle is missing, it fills the rest with grey. Here a cut file is always
refused: one without an end-of-image marker, and one of which libjpeg had to invent pixels.

No decoder can detect a changed byte that is still a valid code. The checksums of the shards do.

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

_MAX_PIXELS = 89_478_485  # from this size on, Pillow warns of decompression bombs
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (_JPEG, _PNG, b"GIF8", b"RIFF", b"II*\0", b"MM\0*")
# 0xff is escaped inside a JPEG's scan, so neither marker occurs there by chance
_JPEG_SCAN, _JPEG_END = b"\xff\xda", b"\xff\xd9"
# JPEG markers that are followed by the length of their segment
_SEGMENTS = frozenset(range(0xC0, 0xFF)) - frozenset(range(0xD0, 0xDA))
_START_OF_SCAN, _APP1 = 0xDA, 0xE1
_PNG_END = b"IEND\xaeB`\x82"  # with its checksum
# libjpeg's warnings that it invented pixels, as simplejpeg raises them
_PIXELS_INVENTED = (
    "Premature end of JPEG file",
    "premature end of data segment",
    "bad Huffman code",
)


class UndecodableImage(ShardError):
    """An image file that cannot be decoded.

    Args:
        reason: one of a closed set, to count by.
        message: what was given and what is allowed.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["UndecodableImage"], tuple[Reason, str]]:
        # loader processes send these errors: by default, unpickling would pass the message alone
        return type(self), (self.reason, str(self))


def decode_image(data: bytes) -> Tensor:
    """Decodes an image file to uint8 RGB (3, H, W), channels last in memory.

    The first frame is decoded and turned upright by its EXIF orientation. Transparent pixels are
    blended with white; 16-bit grey keeps its high byte.

    Raises:
        UndecodableImage: not an image, damaged, too large, or of a kind that is not supported.
        ImportError: a decoder is not installed.
    """
    try:
        _check_end(data)
        pixels = _jpeg_pixels(data) if data.startswith(_JPEG) else None
        if pixels is None:
            pixels = _pillow_pixels(data)  # (H, W, 3)
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
    except Exception as error:  # damaged files raise nearly any exception in the decoders
        raise UndecodableImage(
            "damaged", f"damaged image ({type(error).__name__}: {error})"
        ) from error
    return pixels.permute(2, 0, 1)  # (3, H, W)


def _check_end(data: bytes) -> None:
    """Raises UndecodableImage for a JPEG or PNG without its end, which decoders may not notice."""
    if data.startswith(_JPEG):  # other data may follow the image
        whole = data.endswith(_JPEG_END) or data.find(_JPEG_END, data.find(_JPEG_SCAN)) >= 0
    else:
        whole = not data.startswith(_PNG) or data.rfind(_PNG_END) >= 0
    if not whole:
        raise UndecodableImage(
            "damaged", f"damaged image (its {len(data)} bytes have no end marker)"
        )


def _jpeg_pixels(data: bytes) -> Tensor | None:
    """Pixels (H, W, 3) of a sound 8-bit JPEG in YCbCr or grey; None leaves the file to Pillow."""
    # imported here, so that backbones can be loaded where it is not installed
    import simplejpeg  # type: ignore[import-untyped]

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height)
        if colours not in ("YCbCr", "Gray"):
            return None  # simplejpeg and Pillow convert CMYK to RGB differently
        pixels = torch.from_numpy(simplejpeg.decode_jpeg(data))
    except ValueError as error:
        if str(error).startswith("Unsupported JPEG data precision"):  # 12 bits
            raise UndecodableImage(
                "unsupported", f"{error}; save it with 8 bits a channel"
            ) from error
        if any(warning in str(error) for warning in _PIXELS_INVENTED):
            raise UndecodableImage("damaged", f"damaged image ({error})") from error
        return None
    if _may_have_exif(data):
        with _pillow_warnings(), Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(ExifTags.Base.Orientation)
        pixels = _upright(pixels, orientation)
    return pixels


def _may_have_exif(jpeg: bytes) -> bool:
    """True if a JPEG has an APP1 segment, which holds EXIF or XMP, or if that is unclear.

    Opening the file with Pillow takes longer than this walk over its segments.
    """
    position = 2
    while jpeg[position] == 0xFF and jpeg[position + 1] in _SEGMENTS:
        marker = jpeg[position + 1]
        if marker in (_START_OF_SCAN, _APP1):
            return marker == _APP1
        position += 2 + int.from_bytes(jpeg[position + 2 : position + 4])
    return True


def _pillow_pixels(data: bytes) -> Tensor:
    """Pixels (H, W, 3) of any format that Pillow reads."""
    with _pillow_warnings(), Image.open(io.BytesIO(data)) as image:
        _check_size(image.width, image.height)
        if image.format == "EPS":
            raise UndecodableImage(
                "unsupported", "EPS is a program for Ghostscript; save it as PNG"
            )
        image.load()  # some formats store their EXIF after the pixels
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        return _upright(torch.from_numpy(np.array(_to_rgb(image))), orientation)


@contextmanager
def _pillow_warnings() -> Iterator[None]:
    """Ignores Pillow's warnings of odd metadata, and raises those of decompression bombs.

    Pillow warns of a bomb while decoding too: an icon may hold a larger image than its header says
    (test_a_size_hidden_in_an_icon_counts).
    """
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
    """Pixels (H, W, 3) turned by an EXIF orientation of 2 to 8; any other value changes nothing."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels.flip(0)
    if orientation in (2, 3, 7, 8):
        pixels = pixels.flip(1)
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(0, 1)  # (W, H, 3)
    return pixels.contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion would clip at 255 and so turn nearly every pixel white
        values = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
