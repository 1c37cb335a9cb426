"""Every source and every kind of image becomes upright 8-bit RGB, or one clear error."""

import base64
import io
import itertools
import re
import socket
import struct
import threading
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import ExifTags, Image

from avg_mlx import InputError
from avg_mlx.inputs import image_io
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
        with pytest.raises(InputError, match=r"8000×8001 = 64\.0 megapixels, above the limit of 64 mega.*--max-pixels"):
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
    assert "2500000000 pixels" in message
    assert "above the limit of 64 megapixels; make it smaller or raise the limit with --max-pixels" in message


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
    message = "is not an image that Pillow can read; give a PNG, JPEG, WebP, …"
    assert error(data) == f"the image {message}"
    (tmp_path / "notes.png").write_bytes(data)
    assert error(tmp_path / "notes.png") == f"{tmp_path}/notes.png {message}"


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
    assert error(tmp_path) == f"cannot read {tmp_path} (Is a directory); give an image file"


def test_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_io.Path, "read_bytes", refuse)
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
        ("data:image/png;base64,aGVsbG8=", "is not an image that Pillow can read"),
        ("data:text/plain,hello", "is not an image that Pillow can read"),
    ],
)
def test_malformed_data_uri(uri, found):
    assert error(uri).startswith(f"the data URI {found}")


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
        ("/page", "is not an image that Pillow can read; give a PNG, JPEG, WebP, …"),
        ("/half", "is damaged and cannot be decoded (image file is truncated"),
        ("/empty", "is empty; give an image file"),
        ("/loop", "answered 302 "),
        ("/to-a-file", "answered 302 "),
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
    monkeypatch.setattr(image_io, "MAX_DOWNLOAD_BYTES", len(PNG))
    assert np.array_equal(pixels(f"{server.url}/image.png"), COLOURS)
    monkeypatch.setattr(image_io, "MAX_DOWNLOAD_BYTES", len(PNG) - 1)
    assert error(f"{server.url}/image.png") == f"{server.url}/image.png is larger than 0 MB; download and shrink it"


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
