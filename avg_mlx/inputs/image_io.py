"""From a path, URL, data URI, bytes or Pillow image to an upright RGB image."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from ..errors import InputError, printable
from ..geometry import Pair
from .fetching import URL_TIMEOUT, fetch

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # pixels, JPEG's own limit
MAX_SCANNED = 12 * MAX_PIXELS  # pixels of a JPEG times its scans, each of which is decoded by itself
BAND = 1 << 22  # pixels of deep grey that are scaled at a time

# Raster formats that Pillow decodes by itself and quickly. It has forty more: some start other programs (EPS), some
# take minutes for a few bytes (DDS, XPM).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "ICO")
TOLD_FORMATS = "PNG, JPEG, WebP, GIF, TIFF, BMP, AVIF, JPEG 2000, ICO or binary PPM"
TEXT_PPM = (b"P1", b"P2", b"P3")  # pixels written as decimal numbers, which take seconds
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
START_OF_SCAN = b"\xff\xda"


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS, timeout: float = URL_TIMEOUT) -> Image.Image:
    """Read an image, turn it upright (EXIF), put transparent parts on white, and reduce it to 8-bit RGB.

    source: a path, an http(s) URL, a data URI, an encoded image's bytes, or a Pillow image. timeout: seconds that a
    download may take. Raises InputError if there is no image, or if it is damaged or larger than `max_pixels`.
    """
    with _opened(source, max_pixels, timeout) as (name, image):
        image.load()
        _check_size(image, name, max_pixels)  # an icon's size is known only now
        return _to_rgb(_upright(image))


def read_image_size(source: ImageSource, max_pixels: int = MAX_PIXELS, timeout: float = URL_TIMEOUT) -> Pair:
    """Return the (height, width) that `read_image` gives, without decoding the pixels."""
    with _opened(source, max_pixels, timeout) as (_, image):
        size = image.height, image.width
        with suppress(Exception):  # as in _upright
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            if turned and image.format != "TIFF":  # Pillow gives the size of a TIFF upright
                return size[::-1]
        return size


@contextmanager
def _opened(source: ImageSource, max_pixels: int, timeout: float) -> Iterator[tuple[str, Image.Image]]:
    """Open an image that is not too large; whatever goes wrong with it becomes an InputError."""
    name, data = ("the image", b"") if isinstance(source, Image.Image) else fetch(source, timeout)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata: the pixels are what matters
            image = source if isinstance(source, Image.Image) else _identify(data, name)
            _check_size(image, name, max_pixels)
            scans = data.count(START_OF_SCAN) if image.format in ("JPEG", "MPO") else 0  # MPO: several JPEGs in one
            if image.width * image.height * scans > MAX_SCANNED:
                raise InputError(f"{name} has {scans} scans, which take too long; save it again")
            yield name, image
    except InputError:
        raise
    except Image.DecompressionBombError as error:  # an image inside the file, such as an icon's
        found = str(error).partition(" exceeds")[0]  # "Image size (… pixels)"
        raise InputError(_too_large(name, found, max_pixels)) from None
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError and more
        raise InputError(f"{name} is damaged and cannot be decoded ({printable(error, 120)}); save it again") from error


def _identify(data: bytes, name: str) -> ImageFile.ImageFile:
    """Open the encoded image with the first plugin that knows it.

    `Image.open` would do the same, but it also compares the size with a limit that the whole process shares, and that
    cannot be raised for one image when several threads read.
    """
    Image.init()
    heic = data[4:8] == b"ftyp" and data[8:12] in HEIC_BRANDS
    for kind in (*FORMATS, *(_register_heif() if heic else ())):
        if kind not in Image.OPEN or (kind == "PPM" and data[:2] in TEXT_PPM):
            continue
        factory, accepts = Image.OPEN[kind]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # as Image.open does
            if accepts is None or accepts(data[:16]) is True:
                return factory(io.BytesIO(data), "")
    if heic:
        raise InputError(f"{name} is a HEIC image; pip install 'avg-mlx[heic]' to read it, or save it as JPEG")
    raise InputError(f"{name} is not an image that can be read here; give a {TOLD_FORMATS}")


def _register_heif() -> tuple[str, ...]:
    """Return the name of Pillow's HEIF plugin, where the heic extra is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return ()
    register_heif_opener()
    return ("HEIF",)


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width}×{height} = {width * height / 1e6:.1f} megapixels", max_pixels))
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{name} is {width}×{height}, but a side may have {MAX_SIDE} pixels at most; cut it")
    if not width or not height:
        raise InputError(f"{name} has no pixels ({width}×{height}); give another image")


def _too_large(name: str, found: str, max_pixels: int) -> str:
    return (
        f"{name} is too large: {found}, above the limit of {max_pixels / 1e6:g} megapixels; "
        "make it smaller or raise the limit with max_pixels"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says; EXIF data that cannot be read is ignored."""
    with suppress(Exception):  # Pillow's reader raises SyntaxError, struct.error and more
        return ImageOps.exif_transpose(image)
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        return white.convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """Scale 16-bit, 32-bit and float greys to 8 bits, where Pillow would clip them at 255."""
    grey = np.asarray(image)
    brightest = float(np.fmax.reduce(grey, axis=None))  # ignores what is not a number
    if image.mode == "F":
        top = 255.0 if brightest > 1 else 1.0
    else:
        top = 65535.0 if brightest > 255 or image.mode.startswith("I;16") else 255.0
    transparent = image.info.get("transparency")
    scaled = np.empty(grey.shape, np.uint8)
    rows = max(1, BAND // image.width)
    for start in range(0, image.height, rows):  # in bands, so that few numbers are 64 bits wide at a time
        band = np.nan_to_num(grey[start : start + rows].astype(np.float64))
        values = np.rint(np.clip(band / top, 0, 1) * 255).astype(np.uint8)
        values[band == transparent] = 255
        scaled[start : start + rows] = values
    return Image.fromarray(scaled).convert("RGB")
