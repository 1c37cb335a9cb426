"""Images by their address: fetched from the public internet, and no connection goes anywhere else."""

import asyncio
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avg_mlx.errors import InputError
from avg_mlx.serving.addresses import is_public
from avg_mlx.serving.url_images import Unfetchable, UrlImages, parse_target

PUBLIC = "93.184.216.34"
IMAGE = b"the image"


def answer(status: str = "200 OK", body: bytes = IMAGE, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return answer("302 Found", b"", f"Location: {location}")


class Network:
    """A resolver's answers, and a server behind every address: what it is asked, and what it says."""

    def __init__(self, *answers: bytes, names: dict[str, list[str]] | None = None):
        self.answers, self.names = list(answers) or [answer()], names or {}
        self.connections: list[tuple[str, int]] = []
        self.requests: list[bytes] = []

    async def resolve(self, host: str, port: int) -> list[str]:
        """Names of the test have their addresses, which may change with each call; the system reads others."""
        if host in self.names:
            addresses = self.names[host]
            return [addresses.pop(0)] if len(addresses) > 1 else addresses
        found = await asyncio.get_running_loop().getaddrinfo(host, port)
        return [place[0] for *_, place in found]

    async def connect(self, address: str, port: int, **_) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Reach the sentinel, whatever address is asked for."""
        self.connections.append((address, port))
        return await asyncio.open_connection("127.0.0.1", self.port)

    def fetch(self, url: str, *, hosts=(), max_bytes=1000, seconds=20.0) -> bytes:
        """Fetch a URL in this network."""

        async def run() -> bytes:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            async with server:
                return await UrlImages(hosts, max_bytes, seconds, self.resolve, self.connect).fetch(url)

        return asyncio.run(run())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        await writer.drain()
        writer.close()


@pytest.fixture
def example() -> Network:
    return Network(names={"example.org": [PUBLIC]})


def test_a_public_image_is_fetched_from_the_address_that_was_checked(example):
    """The positive control of all that follows: the sentinel is reached, and its answer comes back."""
    assert example.fetch("http://Example.org/a%20b.png?size=2#part") == IMAGE
    assert example.connections == [(PUBLIC, 80)]
    assert example.requests[0].startswith(b"GET /a%20b.png?size=2 HTTP/1.1\r\n")
    assert b"host: example.org\r\n" in example.requests[0].lower()


SPELLINGS = """
127.0.0.1 127.1 127.000.0.1 0x7f.0.0.1 0177.0.0.1 2130706433 0x7f000001 localhost LOCALHOST localhost.
127.255.255.254 0.0.0.0 0 [::1] [0:0:0:0:0:0:0:1] [::] [::127.0.0.1] [::ffff:127.0.0.1] [::ffff:7f00:1]
①②⑦.⓪.⓪.① ⓛocalhost 127。0。0。1
169.254.169.254 2852039166 [::ffff:169.254.169.254] [fe80::1] [fd00:ec2::254] 168.63.129.16
10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1 192.0.0.1 198.18.0.1 100.64.0.1 100.127.255.255
[fc00::1] [fd12:3456::1] [fec0::1] [64:ff9b::7f00:1] [64:ff9b::808:808] [64:ff9b:1::a00:1] [2002:7f00:1::]
[2002:808:808::1] [2001:0:7f00:1::] 224.0.0.1 239.255.255.250 [ff02::1] 240.0.0.1 255.255.255.255
192.0.2.1 198.51.100.1 203.0.113.1 [2001:db8::1]
"""


@pytest.mark.parametrize("host", SPELLINGS.split())
def test_what_is_not_public_is_not_reached(example, host):
    """In every spelling that the system's resolver reads. Some it does not read; those are not reached either."""
    with pytest.raises(InputError):
        example.fetch(f"http://{host}/image.png")
    assert example.connections == []


@pytest.mark.parametrize(
    "url",
    [
        "http://user@example.org/",
        "http://user:secret@example.org/",
        "http://@example.org/",
        "http://example.org:8080/",
        "http://example.org:22/",
        "https://example.org:80/",
        "http://example.org:99999/",
        "http://example.org:x/",
        "ftp://example.org/",
        "file:///etc/passwd",
        "gopher://example.org/",
        "//example.org/",
        "http:///image.png",
        "http://[::1",
        "http://example.org\\@127.0.0.1/",
        "http://example.org/ HTTP/1.1\r\nHost: localhost",
        "http://example.org/\n",
        "http://" + "a" * 70 + ".org/",
        "http://example.org/" + "a" * 9000,
    ],
)
def test_odd_addresses_are_refused(example, url):
    with pytest.raises(InputError) as refused:
        example.fetch(url)
    assert example.connections == []
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("location", ["http://127.0.0.1/", "//localhost/", "http://inside.org/", "file:///etc/passwd"])
def test_a_redirect_is_checked_again(location):
    network = Network(redirect(location), names={"example.org": [PUBLIC], "inside.org": ["10.0.0.7"]})
    with pytest.raises(InputError):
        network.fetch("http://example.org/")
    assert network.connections == [(PUBLIC, 80)]


def test_three_redirects_are_followed_and_a_fourth_is_not():
    steps = [redirect("/1"), redirect("2"), redirect("http://other.org/3")]
    names = {"example.org": [PUBLIC], "other.org": ["1.1.1.1"]}
    network = Network(*steps, answer(), names=names)
    assert network.fetch("http://example.org/") == IMAGE
    assert [address for address, _ in network.connections] == [PUBLIC] * 3 + ["1.1.1.1"]
    with pytest.raises(Unfetchable, match="redirects more than 3 times"):
        Network(*steps, redirect("/4"), answer(), names=names).fetch("http://example.org/")


def test_a_resolver_that_changes_its_answer_gains_nothing():
    """The name is resolved once, and the connection goes to what was checked."""
    network = Network(names={"rebinding.org": [PUBLIC, "127.0.0.1"]})
    assert network.fetch("http://rebinding.org/") == IMAGE
    assert network.connections == [(PUBLIC, 80)]
    with pytest.raises(InputError, match="public"):
        network.fetch("http://rebinding.org/")
    assert len(network.connections) == 1


def test_one_private_address_among_public_ones_is_enough_to_refuse():
    network = Network()

    async def both(host: str, port: int) -> list[str]:
        return [PUBLIC, "192.168.1.1"]

    network.resolve = both
    with pytest.raises(InputError, match="public"):
        network.fetch("http://example.org/")
    assert network.connections == []


def test_only_the_hosts_that_are_named_are_asked(example):
    assert example.fetch("http://example.org/", hosts=["Example.ORG"]) == IMAGE
    example.names |= {"example.org.evil.net": [PUBLIC], "www.example.org": [PUBLIC]}
    for host in ("example.org.evil.net", "www.example.org", PUBLIC):
        with pytest.raises(InputError, match=host):
            example.fetch(f"http://{host}/", hosts=["example.org"])
    assert len(example.connections) == 1


def test_a_connection_goes_on_to_the_next_address():
    network = Network()
    connect = network.connect

    async def two(host: str, port: int) -> list[str]:
        return ["2606:4700::1111", PUBLIC]

    async def first_fails(address: str, port: int, **how):
        if ":" in address:
            raise OSError("unreachable")
        return await connect(address, port, **how)

    network.resolve, network.connect = two, first_fails
    assert network.fetch("http://example.org/") == IMAGE
    assert network.connections == [(PUBLIC, 80)]


def test_over_https_the_certificate_must_be_the_hosts(example):
    """The connection goes to an address, but the name is what is sent and verified."""
    asked = {}

    async def connect(address: str, port: int, **how):
        asked.update(how, place=(address, port))
        raise OSError("no further")

    example.connect = connect
    with pytest.raises(Unfetchable):
        example.fetch("https://example.org/")
    assert asked["place"] == (PUBLIC, 443)
    assert asked["server_hostname"] == "example.org"
    assert asked["ssl"].check_hostname


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (answer(body=bytes(1001)), "above the limit"),
        (answer("404 Not Found"), "404"),
        (answer("500 Oops"), "500"),
        (answer()[:-4], "cannot be read"),
        (b"", "cannot be read"),
        (b"nonsense\r\n\r\n", "cannot be read"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, "cannot be read"),
    ],
)
def test_what_cannot_be_had_says_so(said, told):
    with pytest.raises(Unfetchable, match=told):
        Network(said, names={"example.org": [PUBLIC]}).fetch("http://example.org/")


def test_time_is_bounded(example):
    """A host that says nothing more is given up. What is waited for is ended by the test's end if by nothing else."""
    example.answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"]

    async def silent(reader, writer) -> None:
        writer.write(example.answers[0])
        await asyncio.sleep(60)

    example._serve = silent
    with pytest.raises(Unfetchable, match=r"within 0\.2 s"):
        example.fetch("http://example.org/", seconds=0.2)


@given(st.integers(0, 2**32 - 1))
def test_an_address_inside_another_is_not_public(number):
    """However public an IPv4 address is, the IPv6 ones that stand for it are not asked."""
    for prefix in ("::ffff:0:0", "::", "64:ff9b::"):
        assert not is_public(ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) + number))
    assert not is_public(ipaddress.IPv6Address((0x2002 << 112) + (number << 80)))


@given(st.text())
def test_reading_an_address_gives_a_target_or_says_why_not(text):
    for url in (text, f"http://{text}", f"http://example.org/{text}"):
        try:
            target = parse_target(url)
        except InputError:
            continue
        assert target.path.startswith("/")
        assert target.path.isascii()
        assert target.host.isascii()
        assert not set(target.path + target.host) & set(" \r\n")
