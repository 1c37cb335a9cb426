"""The bytes of an image: from a file, an http(s) URL or a data URI, within limits of size and time."""

import base64
import binascii
import os
import re
import stat
import string
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import Future
from http.client import HTTPException
from pathlib import Path

from ..errors import InputError, printable

MAX_BYTES = 256 << 20  # of an encoded image, wherever it comes from
URL_TIMEOUT = 20.0  # seconds, for the whole download


def fetch(source: str | Path | bytes, timeout: float) -> tuple[str, bytes]:
    """Return what to call the image in a message, and its encoded bytes.

    Raises InputError if there is nothing, if it is not a regular file, if it is larger than MAX_BYTES, or if a
    download takes longer than `timeout` seconds.
    """
    if isinstance(source, bytes):
        name, data = "the image", source
        if len(data) > MAX_BYTES:
            raise InputError(_too_large(name, len(data)))
    else:
        text = str(source)
        scheme = text.split(":", 1)[0].lower()
        if scheme == "data":
            name, data = "the data URI", _decode_data_uri(text)
        elif scheme in ("http", "https"):
            name = shown_url(text)
            data = _download(text, name, timeout)
        else:
            name = printable(text)
            data = _read_file(text, name)
    if not data:
        raise InputError(f"{name} is empty; give an image file")
    return name, data


def shown_url(url: str) -> str:
    """Return a URL as messages show it: without passwords and query, which may hold secrets."""
    masked = re.sub(r"(//)[^/?#@]*@", r"\1…@", url)
    address, question, _ = masked.partition("?")
    return printable(address + (f"{question}…" if question else ""))


def _too_large(name: str, size: int) -> str:
    return f"{name} has {size >> 20} MB, above the limit of {MAX_BYTES >> 20} MB for an image file; shrink it"


def _read_file(path: str, name: str) -> bytes:
    """Read a regular file. Devices and pipes, which may never end, are refused without waiting for them."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for somebody to write into it.
        descriptor = os.open(Path(path).expanduser(), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(f"no image at {name}; give a path, an http(s) URL, a data URI or -") from None
    except (OSError, ValueError, RuntimeError) as error:  # the last two: a NUL in the path, a ~ without a home
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {name} ({reason}); give an image file") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise InputError(f"{name} is {kind}; give an image file")
    with open(descriptor, "rb") as file:
        try:
            data = file.read(MAX_BYTES + 1) if status.st_size <= MAX_BYTES else b""
        except OSError as error:
            raise InputError(f"cannot read {name} ({error.strerror}); give an image file") from None
    if max(status.st_size, len(data)) > MAX_BYTES:  # files of /proc say that they have no size
        raise InputError(_too_large(name, max(status.st_size, len(data))))
    return data


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


def _download(url: str, name: str, timeout: float) -> bytes:
    """Return the body; InputError if it has not arrived after `timeout` seconds."""
    body: Future[bytes] = Future()

    def work() -> None:
        try:
            body.set_result(_get(url, name, timeout))
        except Exception as error:
            body.set_exception(error)

    # In a thread, since name lookup, redirects, headers and body would each take `timeout` anew.
    threading.Thread(target=work, daemon=True).start()
    try:
        return body.result(timeout)
    except InputError:
        raise
    except urllib.error.HTTPError as error:
        raise InputError(f"{name} answered {error.code} {printable(error.reason, 80)}; check the address") from None
    except (OSError, ValueError, OverflowError, HTTPException) as error:  # a server may send any header
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise InputError(
                f"{name} did not arrive within {timeout:g} s; try again, or download it yourself"
            ) from None
        told = printable(str(reason), 120)
        raise InputError(f"{name} cannot be read ({told}); check the address and the network") from None


def _http_only() -> urllib.request.OpenerDirector:
    """An opener that follows redirects to http(s) addresses only; urllib's own would also fetch ftp."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _get(url: str, name: str, timeout: float) -> bytes:
    deadline = time.monotonic() + timeout
    quoted = urllib.parse.quote(url, safe=string.punctuation)  # addresses are pasted with spaces and accents
    request = urllib.request.Request(quoted, headers={"User-Agent": "avg-mlx"})
    chunks, size = [], 0
    with _http_only().open(request, timeout=timeout) as response:
        expected = response.length  # None where the server does not say
        if expected is not None and expected > MAX_BYTES:
            raise InputError(_too_large(name, expected))
        while chunk := response.read1():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise InputError(_too_large(name, size))
            if time.monotonic() > deadline:
                raise TimeoutError
    if expected is not None and size < expected:
        raise InputError(f"{name} was cut short ({size} of {expected} bytes arrived); try again")
    return b"".join(chunks)
