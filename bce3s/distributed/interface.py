"""The network interface that leads to rank 0, for gloo, which otherwise takes the one that this machine's own name stands for."""

from __future__ import annotations

import fcntl
import os
import socket
import struct

_VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def choose_interface(host: str) -> None:
    """Has gloo listen where the other machines can reach it, unless the user or the machine's name says where.

    Debian and its relatives give a machine's own name the address 127.0.1.1 in /etc/hosts. gloo then listens there: ranks of one machine
    meet, ranks of two cannot.

    Args:
        host: of rank 0; a loopback address means that all ranks are on this machine.
    """
    if os.environ.get(_VARIABLE) or _is_loopback(host) or not _is_loopback(socket.gethostname()):
        return
    name = _interface_to(host)
    if name is not None:
        os.environ[_VARIABLE] = name


def _is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone; a name that nobody knows does, too: gloo falls back to loopback."""
    try:
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return all(address == "::1" or address.startswith("127.") for address in addresses)


def _interface_to(host: str) -> str | None:
    """The interface whose address packets to `host` carry; None where that cannot be told (IPv6 alone, or not Linux)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing, but chooses the way
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:
                    continue  # an interface without an IPv4 address
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
        except OSError:
            return None
    return None
