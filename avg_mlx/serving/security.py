"""Who may ask: the names under which the server is asked for, and the key."""

import hmac
import ipaddress
import socket
from collections.abc import Collection, Mapping

from .problems import Problem

LOCAL_NAMES = ("localhost",)
OPEN_PATHS = ("/health", "/")  # load balancers have no key, and the page asks for it


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def own_names() -> frozenset[str]:
    """The names by which this machine may be asked for."""
    name = socket.gethostname().lower()
    return frozenset({*LOCAL_NAMES, name, name.removesuffix(".local"), f"{name.removesuffix('.local')}.local"})


def needs_key(path: str) -> bool:
    """Whether what lies at a path is for those only who have the key, if there is one."""
    return path not in OPEN_PATHS and not path.startswith("/page/")


def check_host(header: str, names: Collection[str]) -> None:
    """Raise Problem for a Host header that names neither an address nor one of `names`.

    A page in a browser can give its own name this machine's address, and so reach what listens here. It cannot keep
    its name out of the header.
    """
    host = header.rpartition(":")[0] if header.rpartition(":")[2].isdecimal() else header
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        if host.lower().rstrip(".") not in names:
            message = f"this server is not called {host[:100]!r}; name it with --allow-hosts if it is"
            raise Problem(400, message, code="unknown_host") from None


def check_key(headers: Mapping[str, str], key: str) -> None:
    """Raise Problem unless the request has the key. How long this takes says nothing about it."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        message = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
        raise Problem(401, message, code="invalid_api_key")
