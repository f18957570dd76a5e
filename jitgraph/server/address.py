"""Where the server listens: who may be let in there, and the socket, bound before anything slow begins."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from jitgraph.errors import ConfigError


def check_address(host: str, api_keys: Sequence[str], allow_public: bool) -> None:
    """An address that only this machine reaches, or one that a key protects, or that the user insists on.

    Raises:
        ConfigError: none of these.
    """
    if not is_loopback(host) and not api_keys and not allow_public:
        raise ConfigError(
            f"{host} can be reached from other machines and no key is wanted: set JITGRAPH_API_KEY or give --api-key, "
            "or --allow-public if anybody there may use the model"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it. A name other than ``localhost`` may lead anywhere."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket bound to the address, not listening yet.

    Raises:
        ConfigError: it cannot be used.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port must be between 0 and 65535, not {port}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        if host == "localhost":  # where it means both, the older one: what clients try first, or at once after
            found.sort(key=lambda entry: entry[0] != socket.AF_INET)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host} is no address to listen at: {_why(error)}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot listen at {host} port {port}: {_why(error)}; name another --port") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address as clients write it; for all addresses of this machine, its loopback one."""
    host, port = bound.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if bound.family == socket.AF_INET6 else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
