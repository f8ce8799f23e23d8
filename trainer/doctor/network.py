"""The port where ranks meet, and the loopback interface. Imports no torch."""

from __future__ import annotations

import socket
import threading

from .context import Context
from .findings import Finding, fail, ok, skipped

__all__ = ["check_loopback", "check_master_port"]


def check_master_port(context: Context) -> Finding:
    place = context.place
    if place.port is None:
        return skipped("master port", "one process")
    if place.is_held_by_agent:
        return ok("master port", f"{place.address}:{place.port}, held by torchrun")
    if place.rank != 0:
        return skipped("master port", "rank 0 listens")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", place.port))
    except OSError as error:
        return fail(
            "master port",
            f"{place.port} on {place.host}: {error.strerror}",
            f"end what listens there (ss -ltnp 'sport = :{place.port}'), or export another MASTER_PORT",
            "configuration",
        )
    return ok("master port", f"{place.address}:{place.port} is free")


def check_loopback(context: Context) -> Finding:
    """A byte to ourselves and back, which gloo and the launcher's store do as well."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def answer() -> None:
            with server.accept()[0] as peer:
                peer.sendall(peer.recv(1))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with socket.create_connection(server.getsockname(), timeout=5) as client:
            client.sendall(b"w")
            if client.recv(1) != b"w":
                return fail(
                    "loopback",
                    "127.0.0.1 gave back something else",
                    "look at the node's firewall rules",
                )
    return ok("loopback", "127.0.0.1 answers")
