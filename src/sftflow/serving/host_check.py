"""Who may reach the server: what is checked of its key, its origin and its host names when it starts."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Container, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from sftflow.foundation.errors import ServeError

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
_KEY = re.compile(r"[!-~]+")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")
_ROOT = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)*")
_HOST = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class Hosts:
    """Host names that are answered to. literals: every IP address besides: a page elsewhere can point its own name at
    this machine, but no browser then sends an address as its Host.

    >>> hosts = Hosts(frozenset({"box"}), literals=True)
    >>> [name in hosts for name in ("box", "10.0.0.7", "[fe80::1]", "evil.example", "fe80::1")]
    [True, True, True, False, False]
    """

    names: frozenset[str]
    literals: bool = False

    def __contains__(self, name: object) -> bool:
        return name in self.names or (self.literals and isinstance(name, str) and _is_literal(name))


def _is_literal(name: str) -> bool:
    try:
        if name.startswith("["):
            ipaddress.IPv6Address(name[1:-1])
        else:
            ipaddress.IPv4Address(name)
        return True
    except ValueError:
        return False


def host_names(host: str, more: Iterable[str] = ()) -> Container[str]:
    """What a server that listens on `host` answers to: that name and those of the loopback; where it listens on every
    address, any address and this machine's name.   more: from `--allow-host`. Raises ServeError.

    >>> names = host_names("192.168.0.5", ["llm.example"])
    >>> [n in names for n in ("192.168.0.5", "localhost", "llm.example", "192.168.0.6")]
    [True, True, True, False]
    """
    names = set(LOOPBACK)
    for name in more:
        plain = name.lower()
        if not _HOST.fullmatch(plain):
            raise ServeError("--allow-host", f"{name!r} is no host name", "write a name alone, such as llm.example")
        names.add(plain)
    every = host.strip("[]") in ("", "0.0.0.0", "::")
    if every:
        own = socket.gethostname().lower()
        names |= {own, own.partition(".")[0]} - {""}
    else:
        names.add(f"[{host}]".lower() if ":" in host else host.lower())
    return Hosts(frozenset(names), literals=every)


def check_key(api_key: str | None) -> None:
    """Raises ServeError where clients could not send the key: headers carry ASCII for sure, and blanks split them."""
    if api_key == "":
        fact = "it is empty, which would ask for no key at all"
        raise ServeError("--api-key", fact, "give a key, or neither --api-key nor SFTFLOW_API_KEY")
    if api_key is not None and not _KEY.fullmatch(api_key):
        fact = "it has blanks, control characters or letters beyond ASCII"
        raise ServeError("--api-key", fact, "choose one of ASCII letters, digits and signs")


def check_origin(origin: str) -> None:
    """Raises ServeError where no browser sends this as an Origin.

    >>> check_origin("http://localhost:3000/")
    Traceback (most recent call last):
    sftflow.foundation.errors.ServeError: --allow-origin: 'http://localhost:3000/' is no origin; write http://localhost:3000
    """
    if origin == "*" or _ORIGIN.fullmatch(origin):
        return
    try:
        parts = urlsplit(origin if "://" in origin else f"http://{origin}")
        meant = f"{parts.scheme}://{parts.netloc}".lower()
    except ValueError:
        meant = ""
    remedy = meant if _ORIGIN.fullmatch(meant) else "scheme://host[:port], such as http://localhost:3000, or *"
    raise ServeError("--allow-origin", f"{origin!r} is no origin", f"write {remedy}")


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Each of them once. Raises ServeError for one that no browser sends, and for others beside `*`."""
    found = tuple(dict.fromkeys(origins))
    for origin in found:
        check_origin(origin)
    if "*" in found and len(found) > 1:
        raise ServeError(
            "--allow-origin", "* allows all of them, and others stand beside it", "say * alone, or leave it out"
        )
    return found


def check_root_path(root_path: str) -> None:
    """Raises ServeError for what is no path below which a proxy could show the server.

    >>> check_root_path("llm/")
    Traceback (most recent call last):
    sftflow.foundation.errors.ServeError: --root-path: 'llm/' is no path below a host; write /llm
    """
    if not _ROOT.fullmatch(root_path):
        meant = f"/{root_path.strip('/')}"
        remedy = meant if _ROOT.fullmatch(meant) else "one such as /llm"
        raise ServeError("--root-path", f"{root_path!r} is no path below a host", f"write {remedy}")


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can reach the address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("")
    (True, True, False, False)
    """
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return bool(found) and all(ipaddress.ip_address(str(f[4][0]).partition("%")[0]).is_loopback for f in found)
    except (OSError, ValueError, UnicodeError):
        return False
