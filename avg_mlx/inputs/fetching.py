"""The bytes of an image: from a file, an http(s) URL or a data URI, within limits of size and time."""

import base64
import binascii
import re
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
from ..files import read_file, too_large

MAX_BYTES = 256 << 20  # of an encoded image, wherever it comes from
URL_TIMEOUT = 20.0  # seconds, for the whole download
EXPECTED = "give an image file"


def fetch(source: str | Path | bytes, timeout: float) -> tuple[str, bytes]:
    """Return what to call the image in a message, and its encoded bytes.

    Raises InputError if there is nothing, if it is not a regular file, if it is larger than MAX_BYTES, or if a
    download takes longer than `timeout` seconds.
    """
    if isinstance(source, bytes):
        name, data = "the image", source
        if len(data) > MAX_BYTES:
            raise InputError(too_large(name, len(data), MAX_BYTES, EXPECTED))
    else:
        text = str(source)
        scheme = text.split(":", 1)[0].lower()
        if scheme == "data":
            name, data = "the data URI", _decode_data_uri(text)
        elif scheme in ("http", "https"):
            name = shown_url(text)
            if re.match(r"\w+://[^/?#]*@", text):
                raise InputError(f"{name} has a user name or a password, which is never sent; download it yourself")
            data = _download(text, name, timeout)
        else:
            name = printable(text)
            data = _read_file(text, name)
    if not data:
        raise InputError(f"{name} is empty; {EXPECTED}")
    return name, data


def shown_url(url: str) -> str:
    """Return a URL as messages show it: without passwords and query, which may hold secrets."""
    masked = re.sub(r"(//)[^/?#]*@", r"\1…@", url)
    address, question, _ = masked.partition("?")
    return printable(address + (f"{question}…" if question else ""))


def _read_file(path: str, name: str) -> bytes:
    try:
        return read_file(Path(path).expanduser(), EXPECTED, MAX_BYTES)
    except FileNotFoundError:
        raise InputError(f"no image at {name}; give a path, an http(s) URL, a data URI or -") from None
    except RuntimeError as error:  # a ~ without a home
        raise InputError(f"cannot read {name} ({error}); {EXPECTED}") from None


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
            raise InputError(too_large(name, expected, MAX_BYTES, EXPECTED))
        while chunk := response.read1():
            chunks.append(chunk)
            size += len(chunk)
            if size > MAX_BYTES:
                raise InputError(too_large(name, size, MAX_BYTES, EXPECTED))
            if time.monotonic() > deadline:
                raise TimeoutError
    if expected is not None and size < expected:
        raise InputError(f"{name} was cut short ({size} of {expected} bytes arrived); try again")
    return b"".join(chunks)
