"""From a path, URL, data URI, bytes or Pillow image to an upright RGB image."""

import base64
import binascii
import io
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..errors import InputError
from ..geometry import Pair

ImageSource = str | Path | bytes | Image.Image

MAX_PIXELS = 64_000_000
MAX_DOWNLOAD_BYTES = 256 << 20
URL_TIMEOUT = 20.0  # seconds, for the whole download


def read_image(source: ImageSource, max_pixels: int = MAX_PIXELS, timeout: float = URL_TIMEOUT) -> Image.Image:
    """Read an image, turn it upright (EXIF), put transparent parts on white, and reduce it to 8-bit RGB.

    source: a path, an http(s) URL, a data URI, an encoded image's bytes, or a Pillow image. timeout: seconds that a
    download may take. Raises InputError if there is no image, or if it is damaged or larger than `max_pixels`.
    """
    with _opened(source, max_pixels, timeout) as image:
        image.load()
        return _to_rgb(_upright(image))


def read_image_size(source: ImageSource, max_pixels: int = MAX_PIXELS, timeout: float = URL_TIMEOUT) -> Pair:
    """Return the (height, width) that `read_image` gives, without decoding the pixels."""
    with _opened(source, max_pixels, timeout) as image:
        size = image.height, image.width
        with suppress(Exception):  # as in _upright
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            if turned and image.format != "TIFF":  # whose size Pillow gives upright
                return size[::-1]
        return size


@contextmanager
def _opened(source: ImageSource, max_pixels: int, timeout: float) -> Iterator[Image.Image]:
    """Open an image that is not too large; whatever goes wrong with it becomes an InputError."""
    name, data = ("the image", b"") if isinstance(source, Image.Image) else _fetch(source, timeout)
    try:
        with _pillow_limit(max_pixels):
            image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(data))
            _check_size(image, name, max_pixels)
            yield image
    except UnidentifiedImageError:
        raise InputError(f"{name} is not an image that Pillow can read; give a PNG, JPEG, WebP, …") from None
    except InputError:
        raise
    except Image.DecompressionBombError as error:
        found = str(error).partition(" exceeds")[0]  # "Image size (… pixels)"
        raise InputError(_too_large(name, found, max_pixels)) from None
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError and more
        raise InputError(f"{name} is damaged and cannot be decoded ({error}); save it again") from error


@contextmanager
def _pillow_limit(max_pixels: int) -> Iterator[None]:
    """Set Pillow's global limit to ours for a while: it also guards images inside a file, such as icons and tiles."""
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata: the pixels are what matters
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_size(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width}×{height} = {width * height / 1e6:.1f} megapixels", max_pixels))
    if not width or not height:
        raise InputError(f"{name} has no pixels ({width}×{height}); give another")


def _too_large(name: str, found: str, max_pixels: int) -> str:
    return (
        f"{name} is too large: {found}, above the limit of {max_pixels / 1e6:g} megapixels; "
        "make it smaller or raise the limit with --max-pixels"
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
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_deep_grey(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float greys, which Pillow would clip at 255 instead of scaling."""
    grey = np.nan_to_num(np.asarray(image, dtype=np.float64))
    if image.mode == "F":
        top = 255.0 if grey.max() > 1 else 1.0
    else:
        top = 65535.0 if grey.max() > 255 or image.mode.startswith("I;16") else 255.0
    scaled = np.clip(grey / top, 0, 1) * 255
    scaled[grey == image.info.get("transparency")] = 255
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _fetch(source: str | Path | bytes, timeout: float) -> tuple[str, bytes]:
    """Return what to call the image in a message, and its encoded bytes."""
    if isinstance(source, bytes):
        name, data = "the image", source
    else:
        text = str(source)
        name = text if len(text) < 300 else f"{text[:300]}…"
        scheme = text.split(":", 1)[0].lower()
        if scheme == "data":
            name, data = "the data URI", _decode_data_uri(text)
        elif scheme in ("http", "https"):
            data = _download(text, timeout)
        else:
            data = _read_file(text, name)
    if not data:
        raise InputError(f"{name} is empty; give an image file")
    return name, data


def _read_file(path: str, name: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError:
        raise InputError(f"no image at {name}; give a path, an http(s) URL, a data URI or -") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the path, a ~ without a home
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name} ({reason}); give an image file") from None


def _decode_data_uri(uri: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise InputError("the data URI has no comma; expected data:image/png;base64,…")
    payload_bytes = urllib.parse.unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return payload_bytes
    try:
        return base64.b64decode(b"".join(payload_bytes.split()), validate=True)  # base64 tools wrap their lines
    except binascii.Error as error:
        raise InputError(f"the data URI is not valid base64 ({error}); encode the image again") from None


def _download(url: str, timeout: float) -> bytes:
    """Return the body; InputError if it has not arrived after `timeout` seconds."""
    body: Future[bytes] = Future()

    def work() -> None:
        try:
            body.set_result(_get(url, timeout))
        except Exception as error:
            body.set_exception(error)

    # In a thread, since name lookup, redirects, headers and body would each take `timeout` anew.
    threading.Thread(target=work, daemon=True).start()
    try:
        return body.result(timeout)
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        raise InputError(f"{url} answered {error.code} {error.reason}; check the address") from None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise InputError(f"{url} did not arrive within {timeout:g} s; try again, or download it yourself") from None
        raise InputError(f"{url} cannot be read ({reason}); check the address and the network") from None


def _get(url: str, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    quoted = urllib.parse.quote(url, safe=string.punctuation)  # addresses are pasted with spaces and accents
    request = urllib.request.Request(quoted, headers={"User-Agent": "avg-mlx"})
    chunks, size = [], 0
    with urllib.request.urlopen(request, timeout=timeout) as response:
        while chunk := response.read1():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_DOWNLOAD_BYTES:
                raise InputError(f"{url} is larger than {MAX_DOWNLOAD_BYTES >> 20} MB; download and shrink it")
            if time.monotonic() > deadline:
                raise TimeoutError
    return b"".join(chunks)
