"""A path, URL, data URI, bytes or Pillow image → an upright RGB image."""

import base64
import binascii
import io
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import InputError

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64_000_000
MAX_DOWNLOAD_BYTES = 256 << 20
URL_TIMEOUT = 20.0  # seconds, for the whole download


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS, timeout: float = URL_TIMEOUT) -> Image.Image:
    """Read, turn upright (EXIF), put on white where transparent, reduce to 8-bit RGB.

    source: a path, an http(s) URL, a data URI, an encoded image's bytes, or a Pillow image.
    Raises InputError for what is missing, not an image, damaged, or above `max_pixels`.
    """
    if isinstance(source, Image.Image):
        _check_size(source, "the image", max_pixels)
        return _to_rgb(ImageOps.exif_transpose(source))
    name, data = _fetch(source, timeout)
    if not data:
        raise InputError(f"{name} is empty; give an image file")
    try:
        with _own_pixel_limit(), Image.open(io.BytesIO(data)) as image:
            _check_size(image, name, max_pixels)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow can read; give a PNG, JPEG, WebP, …") from None
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError and more
        raise InputError(f"{name} is damaged and cannot be decoded ({error}); save it again") from error


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Pillow's global pixel limit gives way to ours, which is checked before anything is decoded."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata: the pixels are what matters
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(
            f"{name} has {width}×{height} = {width * height / 1e6:.1f} megapixels, above the limit of "
            f"{max_pixels / 1e6:g}; make it smaller or raise the limit with --max-pixels"
        )
    if not width or not height:
        raise InputError(f"{name} has no pixels ({width}×{height})")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _from_deep_grey(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys, which Pillow would clip at 255 instead of scaling."""
    grey = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        top = 255.0 if grey.max() > 1 else 1.0
    else:
        top = 65535.0 if grey.max() > 255 or image.mode.startswith("I;16") else 255.0
    scaled = np.clip(np.nan_to_num(grey) / top, 0, 1) * 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _fetch(source: str | Path | bytes, timeout: float) -> tuple[str, bytes]:
    """The encoded image and what to call it in a message."""
    if isinstance(source, bytes):
        return "the image", source
    text = str(source)
    scheme = text.split(":", 1)[0].lower()
    if scheme == "data":
        return "the data URI", _decode_data_uri(text)
    if scheme in ("http", "https"):
        return text, _download(text, timeout)
    try:
        return text, Path(text).expanduser().read_bytes()
    except FileNotFoundError:
        raise InputError(f"no image at {text}; give a path, an http(s) URL, a data URI or -") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {text}: {getattr(error, 'strerror', None) or error}") from None


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError("the data URI has no comma; expected data:image/png;base64,…")
    if not header.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(payload)
    try:
        return base64.b64decode(urllib.parse.unquote(payload), validate=True)
    except binascii.Error as error:
        raise InputError(f"the data URI is not valid base64 ({error})") from None


def _download(url: str, timeout: float) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "avg-mlx"})
    deadline = time.monotonic() + timeout
    chunks, size = [], 0
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            while chunk := response.read(1 << 16):
                chunks.append(chunk)
                size += len(chunk)
                if size > MAX_DOWNLOAD_BYTES:
                    raise InputError(f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MB; download and shrink it")
                if time.monotonic() > deadline:
                    raise TimeoutError
    except TimeoutError:
        raise InputError(f"{url} did not arrive within {timeout:g} s; try again, or download it yourself") from None
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answered {error.code} {error.reason}; check the address") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise InputError(f"{url} did not answer within {timeout:g} s; check the address") from None
        raise InputError(f"{url} cannot be reached ({reason}); check the address and the network") from None
    return b"".join(chunks)
