"""Every source and every kind of image becomes upright 8-bit RGB, or one clear error."""

import base64
import concurrent.futures
import io
import itertools
import os
import re
import socket
import struct
import sys
import threading
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import ExifTags, Image

from avg_mlx import InputError
from avg_mlx.inputs import fetching, image_io
from avg_mlx.inputs.image_io import read_image, read_image_size

COLOURS = np.array([[[250, 0, 0], [0, 240, 0]], [[0, 0, 230], [220, 210, 0]], [[0, 200, 190], [180, 0, 170]]], np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(source, **options) -> np.ndarray:
    image = read_image(source, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def error(source, **options) -> str:
    with pytest.raises(InputError) as caught:
        read_image(source, **options)
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.fixture(autouse=True)
def pillow_limit():
    """Pillow's global limit belongs to the caller: whatever a test does, it is as before."""
    before = Image.MAX_IMAGE_PIXELS
    yield
    assert before == Image.MAX_IMAGE_PIXELS


# Sources


PNG = encode(COLOURS)


@pytest.mark.parametrize(
    "source",
    [
        PNG,
        Image.fromarray(COLOURS),
        f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
        f"data:image/png;BASE64,{urllib.parse.quote(base64.encodebytes(PNG), safe='')}",
        f"data:image/png;base64,{base64.encodebytes(PNG).decode()}",
        f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}",
        f"DATA:,{urllib.parse.quote_from_bytes(PNG)}",
    ],
    ids=[
        "bytes",
        "Pillow image",
        "base64",
        "base64, percent-encoded",
        "base64, in lines",
        "percent-encoded",
        "no type",
    ],
)
def test_source(source):
    assert np.array_equal(pixels(source), COLOURS)


def test_path_source(tmp_path, monkeypatch):
    (tmp_path / "an image: ü.png").write_bytes(PNG)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path / "an image: ü.png", str(tmp_path / "an image: ü.png"), "~/an image: ü.png"):
        assert np.array_equal(pixels(path), COLOURS)


def test_the_callers_image_is_not_changed():
    image = Image.fromarray(COLOURS)
    image.getexif()[ExifTags.Base.Orientation] = 3
    assert np.array_equal(pixels(image), COLOURS[::-1, ::-1])
    assert np.array_equal(np.asarray(image), COLOURS)
    assert read_image(Image.fromarray(COLOURS)) is not image


# Kinds


# EXIF 2.3: the side of the upright image at which the stored image's first row and first column lie.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", SIDES)
def test_exif_orientation(orientation, kind):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = encode(COLOURS, kind, exif=exif, **{"lossless": True} if kind == "WEBP" else {})
    upright = pixels(stored)

    row_side, column_side = SIDES[orientation]
    rows, columns = COLOURS.shape[:2]
    for row, column in itertools.product(range(rows), range(columns)):
        along_rows = row if row_side in ("top", "left") else rows - 1 - row
        along_columns = column if column_side in ("top", "left") else columns - 1 - column
        y, x = (along_rows, along_columns) if row_side in ("top", "bottom") else (along_columns, along_rows)
        assert upright[y, x].tolist() == COLOURS[row, column].tolist()
    assert read_image_size(stored) == upright.shape[:2]


def test_exif_orientation_of_a_photo():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = np.zeros((16, 48, 3), np.uint8)
    stored[:, :16] = 255  # the left third
    upright = pixels(encode(stored, "JPEG", exif=exif))
    assert upright.shape == (48, 16, 3)
    assert upright[:16].min() > 250
    assert upright[16:].max() < 5


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_is_ignored(exif):
    data = encode(COLOURS, exif=exif)
    assert np.array_equal(pixels(data), COLOURS)
    assert read_image_size(data) == COLOURS.shape[:2]


RGBA = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]], np.uint8)
ON_WHITE = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]  # 255 − 0.2 · (255 − colour)


def palette_image(mode: str = "P") -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([200, 100, 0, 10, 20, 30])
    image.putdata([0, 1, 0])
    if mode == "PA":
        image = image.convert("PA")
        image.putalpha(Image.fromarray(np.array([[255, 0, 51]], np.uint8)))
    return image


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (encode(RGBA), ON_WHITE),
        (Image.fromarray(RGBA), ON_WHITE),
        (Image.fromarray(RGBA).convert("RGBa"), ON_WHITE),
        (encode(RGBA, "WEBP", lossless=True, exact=True), ON_WHITE),
        (encode(RGBA, "TIFF"), ON_WHITE),
        (encode(Image.fromarray(np.array([[[100, 255], [100, 0], [100, 51]]], np.uint8), "LA")), [100, 255, 224]),
        (palette_image("PA"), [[200, 100, 0], [255, 255, 255], [244, 224, 204]]),
        (encode(palette_image(), transparency=b"\xff\x00"), [[200, 100, 0], [255, 255, 255], [200, 100, 0]]),
        (encode(palette_image(), transparency=b"\x33\xff"), [[244, 224, 204], [10, 20, 30], [244, 224, 204]]),
        (encode(palette_image(), "GIF", transparency=1), [[200, 100, 0], [255, 255, 255], [200, 100, 0]]),
        (encode(RGBA[..., :3], transparency=(200, 100, 0)), [255, 255, 255]),
        (encode(np.array([[7, 8, 9]], np.uint8), transparency=8), [7, 255, 9]),
        (encode(np.array([[257, 5140, 0]], np.uint16), transparency=5140), [1, 255, 0]),
    ],
    ids=[
        "RGBA PNG",
        "RGBA Pillow image",
        "RGBa Pillow image",
        "RGBA WebP",
        "RGBA TIFF",
        "LA PNG",
        "PA Pillow image",
        "palette PNG with a transparent colour",
        "palette PNG with a translucent colour",
        "GIF with a transparent colour",
        "RGB PNG with tRNS",
        "grey PNG with tRNS",
        "16-bit grey PNG with tRNS",
    ],
)
def test_transparency_is_put_on_white(source, expected):
    expected = [[value] * 3 if isinstance(value, int) else value for value in expected]
    assert pixels(source).tolist() == [expected]


GREY_16 = np.array([[0, 257 * 7, 257 * 128, 65535]], np.uint16)
GREYS = [0, 7, 128, 255]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (encode(GREY_16), GREYS),
        (encode(GREY_16, "TIFF"), GREYS),
        (Image.fromarray(GREY_16), GREYS),
        (Image.fromarray(GREY_16.astype(np.int32)), GREYS),
        (encode(GREY_16 // 257), [0, 0, 0, 1]),
        (Image.fromarray((GREY_16 // 257).astype(np.int32)), GREYS),
        (Image.fromarray(np.array([[-1, 7, 128, 255]], np.int32)), GREYS),
        (encode(np.array([[0, 7 / 255, 128 / 255, 1]], np.float32), "TIFF"), GREYS),
        (Image.fromarray(np.array([[-3.5, 7, 128, 255]], np.float32)), GREYS),
        (Image.fromarray(np.array([[np.nan, 7, 128, 255]], np.float32)), GREYS),
        (encode(np.array([[0, 7, 128, 255]], np.uint8)), GREYS),
        (encode(Image.fromarray(np.array([[False, True]]))), [0, 255]),
    ],
    ids=[
        "16-bit PNG",
        "16-bit TIFF",
        "16-bit Pillow image",
        "16 bits in a 32-bit Pillow image",
        "dark 16-bit PNG",
        "8 bits in a 32-bit Pillow image",
        "negative",
        "float TIFF up to 1",
        "float up to 255",
        "float with NaN",
        "8-bit PNG",
        "1-bit PNG",
    ],
)
def test_greys_are_scaled_and_not_clipped(source, expected):
    assert pixels(source).tolist() == [[[grey] * 3 for grey in expected]]


@pytest.mark.parametrize("first", ["II", "MM"])
def test_16_bit_tiff_of_either_byte_order(first):
    image = Image.fromarray(GREY_16)
    if first == "MM":
        image = Image.frombytes("I;16B", image.size, GREY_16.astype(">u2").tobytes())
    data = encode(image, "TIFF")
    assert data.startswith(first.encode())
    assert pixels(data).tolist() == [[[grey] * 3 for grey in GREYS]]


def test_palette():
    assert pixels(encode(palette_image())).tolist() == [[[200, 100, 0], [10, 20, 30], [200, 100, 0]]]


@pytest.mark.parametrize(
    ("ink", "expected"),
    [((0, 0, 0, 0), [255, 255, 255]), ((0, 255, 255, 0), [255, 0, 0]), ((0, 0, 0, 255), [0, 0, 0])],
)
def test_cmyk_jpeg(ink, expected):
    data = encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(pixels(data).astype(int) - expected).max() <= 3


def test_webp():
    assert np.array_equal(pixels(encode(COLOURS, "WEBP", lossless=True)), COLOURS)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {}
    )
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (pixels(data) == (255, 0, 0)).all()


# Too large


def claimed_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def bomb_in_an_icon() -> bytes:
    """An icon that claims 16×16 and holds a PNG that claims 50000×50000."""
    png = claimed_png(50_000, 50_000)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(png), 22) + png


def test_pixel_limit():
    assert read_image(Image.new("L", (40, 25)), max_pixels=1000).size == (40, 25)
    for source in (Image.new("L", (40, 26)), encode(Image.new("L", (40, 26)))):
        assert "40×26 = 0.0 megapixels, above the limit of 0.001 megapixels" in error(source, max_pixels=1000)


def test_pixel_limit_is_64_megapixels_by_default():
    for read in (read_image, read_image_size):
        with pytest.raises(InputError, match=r"8000×8001 = 64\.0 megapixels, above the limit of 64 mega.*max_pixels"):
            read(claimed_png(8000, 8001))
    assert read_image_size(claimed_png(8000, 8000)) == (8000, 8000)


def test_pixel_limit_goes_before_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    assert np.array_equal(pixels(PNG), COLOURS)
    assert Image.MAX_IMAGE_PIXELS == 1


@pytest.mark.parametrize(
    "bomb",
    [claimed_png(50_000, 50_000), bomb_in_an_icon()],
    ids=["PNG", "icon"],
)
def test_decompression_bomb(bomb):
    message = error(bomb)
    assert message.startswith("the image is too large: ")
    assert re.search("2500000000 pixels|2500.0 megapixels", message)
    assert "above the limit of 64 megapixels; make it smaller or raise the limit with max_pixels" in message


# Damaged, or not an image


def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_image(kind):
    data = encode(photo(), kind)
    message = error(data[: len(data) // 2])
    assert message.startswith("the image is damaged and cannot be decoded (")
    assert message.endswith("; save it again")


def test_truncated_pillow_image():
    data = encode(photo(), "JPEG")
    message = error(Image.open(io.BytesIO(data[: len(data) // 2])))
    assert message.startswith("the image is damaged and cannot be decoded (")


def test_corrupt_image():
    data = bytearray(encode(photo()))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    assert error(bytes(data)).startswith("the image is damaged and cannot be decoded (")


@pytest.mark.parametrize(
    "data", [b"hello", b"<!doctype html><title>404</title>", b"\x00" * 1000, PNG[:8], bytes(range(256))]
)
def test_not_an_image(data, tmp_path):
    message = "is not an image that can be read here; give a PNG, JPEG, "
    assert error(data).startswith(f"the image {message}")
    (tmp_path / "notes.png").write_bytes(data)
    assert error(tmp_path / "notes.png").startswith(f"{tmp_path}/notes.png {message}")


# Files that cannot be read


def test_missing_file(tmp_path):
    message = error(tmp_path / "none.png")
    assert message == f"no image at {tmp_path}/none.png; give a path, an http(s) URL, a data URI or -"


def test_empty_file(tmp_path):
    (tmp_path / "empty.png").touch()
    assert error(tmp_path / "empty.png") == f"{tmp_path}/empty.png is empty; give an image file"
    assert error(b"") == "the image is empty; give an image file"
    assert error("data:image/png;base64,") == "the data URI is empty; give an image file"


def test_directory(tmp_path):
    assert error(tmp_path) == f"{tmp_path} is a folder; give an image file"


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.open", refuse)
    assert error(tmp_path / "a.png") == f"cannot read {tmp_path}/a.png (Permission denied); give an image file"


@pytest.mark.parametrize("path", ["a\0b.png", "~nobody-of-this-name/a.png", "x" * 5000])
def test_impossible_path(path):
    message = error(path)
    assert message.startswith("cannot read ")
    assert message.endswith("; give an image file")
    assert len(message) < 500


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://127.0.0.1/a.png", "FILE:///etc/hosts"])
def test_other_addresses_are_not_fetched(url):
    assert error(url) == f"no image at {url}; give a path, an http(s) URL, a data URI or -"


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("data:", "has no comma; expected data:image/png;base64,…"),
        ("data:image/png;base64", "has no comma; expected data:image/png;base64,…"),
        ("data:image/png;base64,abc", "is not valid base64 (Incorrect padding)"),
        ("data:image/png;base64,ab!d", "is not valid base64 (Only base64 data is allowed)"),
        ("data:image/png;base64,é", "is not valid base64 (Only base64 data is allowed)"),
        ("data:image/png;base64,aGVsbG8=", "is not an image that can be read here"),
        ("data:text/plain,hello", "is not an image that can be read here"),
    ],
)
def test_malformed_data_uri(uri, found):
    assert error(uri).startswith(f"the data URI {found}")


# What never ends, runs something, or takes minutes


@pytest.fixture
def few_programs(monkeypatch):
    """No program may be started."""
    for name in ("Popen.__init__", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(f"subprocess.{name}", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("a program was started"))


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "/dev/tty", "/proc/self/mem", "pipe"])
def test_devices_and_pipes(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / path  # an absolute one stays as it is
    assert re.fullmatch(rf"({path} is a device or a pipe|cannot read {path} \(.*\)); give an image file", error(path))


def test_a_sparse_file_is_not_read(tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(10 << 30)
    message = f"{tmp_path}/sparse.png has 10240 MB, above the limit of 256 MB; give an image file"
    assert error(tmp_path / "sparse.png") == message


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
XPM = b'/* XPM */\nstatic char *x[] = {"1 1 1 1", "a c #ffffff", "a"};\n'


@pytest.mark.parametrize(
    "data",
    [
        EPS,
        XPM,
        b"P1\n1 1\n1\n",
        b"P2\n1 1\n9\n5\n",
        b"P3\n1 1\n9\n1 2 3\n",
        encode(COLOURS, "DDS"),
        encode(COLOURS, "PCX"),
    ],
    ids=["EPS", "XPM", "P1", "P2", "P3", "DDS", "PCX"],
)
def test_other_formats_are_not_decoded(data, few_programs, tmp_path):
    (tmp_path / "photo.png").write_bytes(data)
    for source in (data, tmp_path / "photo.png"):
        assert "is not an image that can be read here" in error(source)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "JPEG2000", "ICO", "WEBP", "AVIF", "GIF", "JPEG"])
def test_formats_that_are_decoded(kind):
    smooth = np.full((32, 32, 3), (250, 120, 20), np.uint8)
    assert np.abs(pixels(encode(smooth, kind)).astype(int) - smooth).max() <= 5


def test_heic(monkeypatch):
    pillow_heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (32, 32), (250, 120, 20))).save(file, quality=-1)
    assert np.abs(pixels(file.getvalue()).astype(int) - (250, 120, 20)).max() <= 5
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert "pip install 'avg-mlx[heic]'" in error(file.getvalue())


def test_a_jpeg_of_thousands_of_scans():
    jpeg = encode(np.zeros((2000, 2000, 3), np.uint8), "JPEG", progressive=True)
    assert read_image(jpeg).size == (2000, 2000)
    first = jpeg.index(b"\xff\xda")
    scan = jpeg[first : jpeg.index(b"\xff", first + 2)]
    assert re.search(r"has \d+ scans, which take too long", error(jpeg[:-2] + scan * 8000 + jpeg[-2:]))


@pytest.mark.parametrize("size", [(1, 64_000_000), (64_000_000, 1), (65_536, 10)])
def test_a_side_beyond_any_image(size):
    assert "but a side may have 65535 pixels at most" in error(claimed_png(*size))


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_greys_are_scaled_in_bands_as_in_one(mode, monkeypatch):
    random = np.random.default_rng(0)
    array = {
        "I;16": random.integers(0, 65536, (50, 40), np.uint16),
        "I": random.integers(-9, 70000, (50, 40), np.int32),
        "F": random.normal(0.5, 1, (50, 40)).astype(np.float32),
    }[mode]
    if mode == "F":
        array[3, 5], array[49, 0], array[7, 7] = np.inf, -np.inf, np.nan
    whole = pixels(Image.fromarray(array))
    top = 65535 if mode != "F" else 255
    expected = np.rint(np.clip(np.nan_to_num(array.astype(np.float64)) / top, 0, 1) * 255)
    assert np.array_equal(whole[..., 0], expected)
    monkeypatch.setattr(image_io, "BAND", 100)
    assert np.array_equal(pixels(Image.fromarray(array)), whole)


def test_many_threads_leave_pillows_limit_alone():
    def read(n: int) -> None:
        for _ in range(20):
            assert read_image(encode(COLOURS), max_pixels=6 + n).size == (2, 3)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))


# URLs


class Handler(BaseHTTPRequestHandler):
    """Answers well at /image.png and badly elsewhere."""

    def do_GET(self):
        {
            "/image.png": lambda: self.answer(PNG),
            "/a%20b/%C3%BC.png?c=d%26e": lambda: self.answer(PNG),
            "/empty": lambda: self.answer(b""),
            "/page": lambda: self.answer(b"<!doctype html><title>Not here</title>", "text/html"),
            "/half": lambda: self.answer(encode(photo())[:900], length=100_000),
            "/redirect": lambda: self.redirect("/image.png"),
            "/loop": lambda: self.redirect("/loop"),
            "/without-length": lambda: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n" + PNG),
            "/to-ftp": lambda: self.redirect("ftp://127.0.0.1/image.png"),
            "/astronomic": lambda: self.answer(PNG, length=99999999999999999999),
            "/astronomic-chunk": self.astronomic_chunk,
            "/rude": lambda: self.wfile.write(b"HTTP/1.0 404 \x1b[31mred\x07" + b"x" * 9999 + b"\r\n\r\n"),
            "/to-a-file": lambda: self.redirect("file:///etc/hosts"),
            "/chunks": self.broken_chunks,
            "/nonsense": lambda: self.wfile.write(b"what?\r\n\r\n"),
            "/silent": lambda: (self.wait(2), self.answer(PNG)),
            "/slow-headers": self.drip_headers,
            "/slow-body": self.drip_body,
            "/slow-hops": lambda: (self.wait(0.2), self.redirect("/slow-hops")),
        }.get(self.path, lambda: self.send_error(404))()

    def answer(self, body: bytes, kind: str = "image/png", length: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length or len(body)))
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, address: str) -> None:
        self.send_response(302)
        self.send_header("Location", address)
        self.end_headers()

    def broken_chunks(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc")

    def astronomic_chunk(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc")

    def drip_headers(self) -> None:
        self.send_response(200)
        for i in range(200):
            self.send_header(f"X-{i}", "slowly")
            self.flush_headers()
            self.wait(0.05)

    def drip_body(self) -> None:
        self.answer(PNG, length=1 << 20)
        try:
            while not self.wait(0.05):
                self.wfile.write(b".")
        except ConnectionError:
            self.server.client_left.set()

    def wait(self, seconds: float) -> bool:
        return self.server.over.wait(seconds)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    class Server(ThreadingHTTPServer):
        over = threading.Event()
        client_left = threading.Event()

        def handle_error(self, request, client_address):
            """A client that gave up is what the tests are about."""

    with Server(("127.0.0.1", 0), Handler) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "*")
        threading.Thread(target=running.serve_forever, daemon=True).start()
        running.url = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.over.set()
        running.shutdown()


@pytest.mark.parametrize("path", ["/image.png", "/redirect", "/a b/ü.png?c=d%26e"])
def test_url(server, path):
    assert np.array_equal(pixels(server.url + path), COLOURS)


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/none", "answered 404 Not Found; check the address"),
        ("/page", "is not an image that can be read here; give a PNG, JPEG, WebP, "),
        ("/half", "was cut short (900 of 100000 bytes arrived)"),
        ("/empty", "is empty; give an image file"),
        ("/loop", "answered 302 "),
        ("/to-a-file", "answered 302 "),
        ("/to-ftp", "cannot be read (unknown url type: ftp"),
        ("/astronomic", "has 95367431640624 MB, above the limit of 256 MB"),
        ("/astronomic-chunk", "cannot be read ("),
        ("/chunks", "cannot be read (IncompleteRead("),
        ("/nonsense", "cannot be read ("),
    ],
)
def test_bad_answer(server, path, found):
    message = error(server.url + path)
    assert message.startswith(f"{server.url}{path} {found}")
    assert ";" in message


@pytest.mark.parametrize("path", ["/silent", "/slow-headers", "/slow-body", "/slow-hops"])
def test_url_that_takes_too_long(server, path):
    message = error(server.url + path, timeout=0.3)
    assert message == f"{server.url}{path} did not arrive within 0.3 s; try again, or download it yourself"


def test_an_endless_download_is_given_up(server):
    server.client_left.clear()
    error(f"{server.url}/slow-body", timeout=0.3)
    assert server.client_left.wait(30)


def test_oversized_download(server, monkeypatch):
    monkeypatch.setattr(fetching, "MAX_BYTES", len(PNG))
    assert np.array_equal(pixels(f"{server.url}/image.png"), COLOURS)
    monkeypatch.setattr(fetching, "MAX_BYTES", len(PNG) - 1)
    for path in ("/image.png", "/without-length"):
        assert error(server.url + path).startswith(f"{server.url}{path} has 0 MB, above the limit of 0 MB")


def test_a_rude_answer_is_shown_on_one_printable_line(server):
    message = error(f"{server.url}/rude")
    assert message.isprintable()
    assert "\ufffd[31mred\ufffdxxx" in message
    assert len(message) < 300


def test_secrets_of_an_address_are_not_shown(server):
    message = error(f"{server.url}/none?key=my-secret&x=1")
    assert "my-" not in message
    assert message == f"{server.url}/none?… answered 404 Not Found; check the address"


@pytest.mark.parametrize("name", ["me:my-password@", "me:my-pass@word:80@", "me@"])
def test_a_password_in_an_address_is_neither_sent_nor_shown(server, name):
    message = error(f"{server.url.replace('//', f'//{name}')}/image.png")
    assert message.startswith(server.url.replace("//", "//…@") + "/image.png has ")
    assert message.endswith("download it yourself")


def test_names_are_shown_on_one_printable_line(tmp_path):
    message = error(f"{tmp_path}/\x1b[31mred\nand more{'x' * 200}.png")
    assert message.isprintable()
    assert len(message) < 600


def test_refused_connection():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
        message = error(url)
    assert re.fullmatch(rf"{re.escape(url)} cannot be read \(.*refused.*\); check the address and the network", message)


@pytest.mark.parametrize("url", ["http:", "http://", "https://[/a.png", "http://127.0.0.1:port/a.png"])
def test_malformed_url(url):
    message = error(url)
    assert message.startswith(f"{url} cannot be read (")
    assert message.endswith("; check the address and the network")
