"""Bytes of an encoded image to pixels, of files that may be broken or hostile."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from megatron.errors import UserError
from megatron.text import shortened

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Those that Pillow decodes by itself; none of them starts another program."""
MODES = {1: "L", 3: "RGB"}
"""What an image becomes, by its number of channels."""

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What puts an image upright, by its EXIF orientation."""


class BrokenImageError(UserError):
    """An image cannot be decoded; the message is the reason."""


def decode(content: bytes, channels: int = 3) -> Image.Image:
    """The image upright (by its EXIF orientation), in mode L or RGB; of an animation the first picture.

    Raises: BrokenImageError for bytes that are no image, are cut off, have 16 bits a channel, or would become more
        pixels than Pillow takes for an attack (`Image.MAX_IMAGE_PIXELS`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.load()
            return converted(image, MODES[channels])
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        raise BrokenImageError(f"is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenImageError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        raise BrokenImageError(f"cannot be decoded ({shortened(error, 120) or type(error).__name__})") from None


def converted(image: Image.Image, mode: str) -> Image.Image:
    """An opened image upright, in this mode. Raises BrokenImageError for one of more than 8 bits a channel."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise BrokenImageError("has more than 8 bits a channel; convert it to 8")
    image = _upright(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    """Damaged metadata says nothing against the pixels, and counts as none."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 0))
    except Exception:  # whatever the bytes lead Pillow to
        return image
    return image if turn is None else image.transpose(turn)
