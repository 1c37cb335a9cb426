"""Which internet addresses are public: a server that fetches what strangers name must reach no others."""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all given out; NAT64, IPv4-mapped and local ones lie outside
NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "2001::/23",  # protocols, Teredo among them, which carries an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which carries an IPv4 address
            "3fff::/20",  # documentation
            "192.0.0.0/24",  # protocols
            "168.63.129.16/32",  # a public address under which a cloud answers its own machines
            "192.88.99.0/24",  # relays of 6to4
        ),
    )
)


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, and does not stand for another address.

    Loopback, private, link-local, shared (CGNAT), multicast, reserved and unspecified addresses do not, and neither do
    IPv6 addresses that a gateway turns into IPv4 ones.
    """
    if not address.is_global or address.is_multicast or address.is_reserved:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address not in GLOBAL_UNICAST:
        return False
    return not any(address in network for network in NOT_PUBLIC if network.version == address.version)
