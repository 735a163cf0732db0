"""Where a server listens and who may ask it: checked before anything heavy is imported."""

from __future__ import annotations

import errno
import ipaddress
import socket
import sys
from dataclasses import dataclass

from sbrush.console import SbrushError, printable

SHORTEST_KEY = 8
BACKLOG = 1024  # connections that the system keeps until they are accepted


@dataclass(frozen=True)
class Access:
    """Who may ask a server.

    `api_key` None: everyone who reaches it. `hosts`: names by which it may be called besides addresses and "localhost".
    `origins`: other sites whose pages may ask it, such as "https://front.example".
    """

    api_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address of this machine, and does not listen yet.

    SbrushError if the port is in use or may not be had, or the address is not this machine's.
    """
    shown = printable(host)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise SbrushError(
            f"no such host: {shown}", "--host 127.0.0.1 is this machine alone, 0.0.0.0 every network", code=2
        ) from None
    sock = socket.socket(family, kind, protocol)
    try:
        if sys.platform != "win32":  # where it lets two programs listen on one port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(1)  # Linux tells only now that another program listens there with the same option
        return sock
    except OSError as problem:
        sock.close()
        raise _explain(problem, shown, port) from problem


def _explain(problem: OSError, host: str, port: int) -> SbrushError:
    if problem.errno == errno.EADDRINUSE:
        return SbrushError(
            f"port {port} is in use", f"--port {port + 1 if port < 65535 else 7860}, or --port 0 for any"
        )
    if problem.errno == errno.EADDRNOTAVAIL:
        return SbrushError(
            f"{host} is not an address of this machine",
            "--host 127.0.0.1 is this machine alone, 0.0.0.0 every network",
            code=2,
        )
    if problem.errno in (errno.EACCES, errno.EPERM):
        return SbrushError(f"port {port} is for the system's own programs", "take one from 1024 on, such as 7860")
    return SbrushError(f"cannot listen on {host}, port {port}: {problem.strerror}", "try another --host or --port")


def url(sock: socket.socket) -> str:
    """The address of a bound socket, as a browser takes it."""
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1" if sock.family == socket.AF_INET else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def check_access(sock: socket.socket, host: str, access: Access, *, no_auth: bool) -> None:
    """SbrushError if other machines reach the socket and neither a key nor `no_auth` says who may ask."""
    key = access.api_key
    if key is not None and no_auth:
        raise SbrushError("--api-key and --no-auth contradict each other", "leave out one of them", code=2)
    if key is not None and (len(key) < SHORTEST_KEY or not key.isascii() or any(not "!" <= c <= "~" for c in key)):
        raise SbrushError(
            f"an API key has at least {SHORTEST_KEY} letters, digits and signs of ASCII, and no spaces",
            'make one: python -c "import secrets; print(secrets.token_urlsafe())"',
            code=2,
        )
    for origin in access.origins:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise SbrushError(
                f"not an origin: {printable(origin)}", "such as --allow-origin https://front.example, no path", code=2
            )
    if not ipaddress.ip_address(sock.getsockname()[0]).is_loopback and key is None and not no_auth:
        raise SbrushError(
            f"--host {printable(host)} lets other machines in, and nothing says who may ask",
            "set SBRUSH_API_KEY or --api-key KEY, or add --no-auth if everyone may",
            code=2,
        )
