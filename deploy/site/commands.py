"""Command lines, environment and shared secret of a site's two processes."""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path
from typing import Final

from fedsgcg.clients.guard.site_file import SiteFile
from fedsgcg.common.errors import fail
from fedsgcg.deploy.environment import programs_first
from fedsgcg.deploy.isolated import isolated

UNSAFE = ("PYTHON", "LD_PRELOAD", "LD_AUDIT")
"""Beginnings of the variables that the site's processes do not inherit. `LD_LIBRARY_PATH` stays:
some machines need it for the GPU's driver."""

ALIVE: Final = "resident.alive"
"""File of the site's folder whose time is the moment until which the resident may be silent, on the
clock of `time.monotonic`, which all processes of a machine share. No write: a full disk stops no
pulse."""


def supernode_command(policy: SiteFile, site_file: Path, port: int, secret: Path) -> list[str]:
    """Return the command line of the site's SuperNode.

    It always uses TLS and the site's key, and serves its runtime API on loopback only.
    """
    command = [
        *isolated("flwr.supernode.cli.flower_supernode:flower_supernode"),
        *("--root-certificates", policy.ca),
        *("--superlink", policy.server),
        *("--auth-supernode-private-key", policy.key),
        "--node-config",
        f"site={quoted(policy.site)} site-file={quoted(str(site_file.resolve()))}",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    if policy.max_retries:
        command += ["--max-retries", str(policy.max_retries)]
    return command


def resident_command(site_file: Path, port: int, secret: Path, cold: bool) -> list[str]:
    """Return the command line of the resident process."""
    command = isolated(
        "fedsgcg.deploy.site.resident",
        str(site_file.resolve()),
        f"127.0.0.1:{port}",
        str(secret),
    )
    return [*command, "cold"] if cold else command


def environment(policy: SiteFile) -> dict[str, str]:
    """Return the environment of both processes: own Flower folder, one GPU, no telemetry.

    Variables that make a program load code from elsewhere are left out (`UNSAFE`).
    """
    environ = {name: text for name, text in os.environ.items() if not name.startswith(UNSAFE)}
    device = policy.device.partition(":")
    if policy.device == "cpu" or device[2]:
        environ["CUDA_VISIBLE_DEVICES"] = device[2]
    # Messages between the site's own processes must not pass the hospital's proxy.
    loopback = ",".join(filter(None, [environ.get("NO_PROXY", ""), "127.0.0.1", "localhost"]))
    return environ | {
        "FLWR_HOME": str(Path(policy.home) / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": programs_first(environ.get("PATH", "")),
        "PYTHONUNBUFFERED": "1",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


def new_secret(path: Path) -> Path:
    """Write a new secret, which authenticates the resident to the SuperNode (mode 0600)."""
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(32).encode())
    return path


def quoted(text: str) -> str:
    """Quote a value for Flower's node config.

    Raises:
        FedsgcgError: DEP-601 for text that Flower's syntax cannot represent.
    """
    if any(char in text for char in "'\"\n\\"):
        raise fail(
            "DEP-601", found=repr(text), expected="a name or path without quotes and backslashes"
        )
    return f"'{text}'"


def free_port() -> int:
    """Return a port of 127.0.0.1 that is currently free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
