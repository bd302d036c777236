"""Tests without a network: a pytest fixture. Import `no_network` into a conftest.py."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class NetworkBlocked(RuntimeError):
    """A test tried to leave this machine. Not an OSError: clients take those for an offline mode and go on."""


def _is_loopback(host: str) -> bool:
    local = {"::1", "::ffff:127.0.0.1", "", "localhost", "localhost.localdomain", "ip6-localhost", socket.gethostname()}
    return host.startswith("127.") or host in local


@pytest.fixture(autouse=True)
def no_network() -> Iterator[list[str]]:
    """Fails a test that tried to leave this machine, also where the code under test swallowed the refusal."""
    blocked: list[str] = []

    def refuse(host: str) -> None:
        blocked.append(host)
        raise NetworkBlocked(
            f"This test tries to reach {host!r}. Tests use no network: serve what is needed from a "
            "`zoo.testing.LoopbackHub`, or build it from a small config with random weights."
        )

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def guard(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(str(address[0])):
                refuse(str(address[0]))
            return connect(self, address)

        return guard

    def guarded_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
        def guard(host: Any, *args: Any, **kwargs: Any) -> Any:
            name = host.decode() if isinstance(host, bytes) else host
            numeric = name is None or ":" in name or name.replace(".", "").isdigit()  # an address: `connect` decides
            if not numeric and not _is_loopback(name):
                refuse(name)
            return lookup(host, *args, **kwargs)

        return guard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        patch.setattr(socket, "getaddrinfo", guarded_lookup(socket.getaddrinfo))
        yield blocked
    if blocked:
        pytest.fail(f"This test tried to reach {', '.join(sorted(set(blocked)))}; tests use no network.")
