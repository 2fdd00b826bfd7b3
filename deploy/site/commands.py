"""The two processes of a hospital's node: their command lines, their environment, and the secret between them."""

from __future__ import annotations

import os
import secrets
import socket
import sys
from pathlib import Path

from clients.guard.site_file import SiteFile
from common.errors import fail
from deploy.environment import programs_first


def supernode_command(policy: SiteFile, site_file: Path, port: int, secret: Path) -> list[str]:
    """Return the command line of this hospital's SuperNode: TLS and key always, its own processes on loopback only."""
    command = [
        *(
            str(Path(sys.executable).with_name("flower-supernode")),
            "--root-certificates",
            policy.ca,
        ),
        *("--superlink", policy.server, "--auth-supernode-private-key", policy.key),
        *(
            "--node-config",
            f"site={quoted(policy.site)} site-file={quoted(str(site_file.resolve()))}",
        ),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    return [*command, *(("--max-retries", str(policy.max_retries)) if policy.max_retries else ())]


def resident_command(site_file: Path, port: int, secret: Path, cold: bool) -> list[str]:
    """Return the command line of the resident beside it."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "deploy.site.resident",
        str(site_file.resolve()),
        f"127.0.0.1:{port}",
    ]
    return [*command, str(secret), *(["cold"] if cold else [])]


def environment(policy: SiteFile) -> dict[str, str]:
    """Return the environment of both processes: own Flower folder, one card, nothing that calls home."""
    environ = dict(os.environ)
    device = policy.device.partition(":")
    if policy.device == "cpu" or device[2]:
        environ["CUDA_VISIBLE_DEVICES"] = device[2]
    loopback = ",".join(filter(None, [environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]))
    return (
        environ
        | {
            "FLWR_HOME": str(Path(policy.home) / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PATH": programs_first(environ.get("PATH", "")),
            "PYTHONUNBUFFERED": "1",
            "NO_PROXY": loopback,  # the hospital's proxy must not see what its own processes say to each other
            "no_proxy": loopback,
        }
    )


def new_secret(path: Path) -> Path:
    """Write the secret with which the resident proves itself to the SuperNode, new at each start, for the owner."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(32).encode())
    return path


def quoted(text: str) -> str:
    """Return a value of Flower's node config.

    Raises:
        FedsgcgError: DEP-601 for text that Flower's grammar cannot carry.
    """
    if any(char in text for char in "'\"\n\\"):
        raise fail(
            "DEP-601", found=repr(text), expected="a name or path without quotes and backslashes"
        )
    return f"'{text}'"


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
