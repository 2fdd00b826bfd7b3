"""A federation on loopback: SuperLink with TLS and node keys, hospitals with our tools, runs."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedsgcg.clients.guard.approval import approve, bundle_of_folder
from fedsgcg.clients.guard.site_file import SiteFile, read_site_file, write_site_file
from fedsgcg.deploy.certificates import key_usage
from fedsgcg.deploy.site.commands import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "160",
    "PYTHONUNBUFFERED": "1",
}


def certificate(
    folder: Path,
    name: str,
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None = None,
    days: float = 9,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Write `<name>.crt` and `<name>.key`: an authority without issuer, else a loopback server."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(
        issuer[0].subject if issuer else subject,
        subject,
        key.public_key(),
        x509.random_serial_number(),
        now - datetime.timedelta(days=20),
        now + datetime.timedelta(days=days),
    ).add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    # Python 3.13 accepts only certificates that follow RFC 5280 strictly, like those of a kit.
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    ).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(
            (issuer[1] if issuer else key).public_key()
        ),
        critical=False,
    )
    usage = key_usage(digital_signature=bool(issuer), key_cert_sign=not issuer)
    builder = builder.add_extension(usage, critical=True)
    if issuer:
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    made = builder.sign(issuer[1] if issuer else key, hashes.SHA384())
    (folder / f"{name}.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.TraditionalOpenSSL
    (folder / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    return made, key


def site_key(folder: Path) -> None:
    """Write `site.key` (OpenSSH) and `site.pub`."""
    key = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    (folder / "site.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    )
    (folder / "site.key").chmod(0o600)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    (folder / "site.pub").write_bytes(public)


@dataclass
class Loopback:
    """A SuperLink and the kits of some hospitals below one folder.

    Attributes:
        folder: Everything lies here.
        port: The SuperLink's.
        database: The SuperLink's; "" = `coordinator/state.db`.
        children: Processes by name.
    """

    folder: Path
    port: int = field(default_factory=free_port)
    database: str = ""
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def kit(self, site: str, data: Path, **changes: object) -> Path:
        """Write a hospital's kit, its installed code approved, and return its folder."""
        folder = self.folder / "kits" / site
        folder.mkdir(parents=True)
        shutil.copy(self.folder / "authority.crt", folder / "ca.crt")
        site_key(folder)
        facts = {
            "site": site,
            "project": "loopback",
            "server": f"127.0.0.1:{self.port}",
            "ca": "ca.crt",
            "key": "site.key",
            "data_root": str(data),
            "home": "home",
            "cache": "cache",
            "approved": "home/approved.json",
            "device": "cpu",
            "patient_floor": 1,
            "min_pixels": 1,
            **changes,
        }
        write_site_file(folder / "site.yaml", SiteFile(**facts))
        approve(bundle_of_folder(REPOSITORY), Path(read_site_file(folder).approved), "test")
        return folder

    def serve(self) -> None:
        """Start the SuperLink and wait for its port."""
        certificate(self.folder, "server", certificate(self.folder, "authority"))
        home = self.folder / "coordinator"
        home.mkdir(exist_ok=True)
        config = {"default": "link"}
        text = (
            f'[superlink]\ndefault = "{config["default"]}"\n'
            f'[superlink.link]\naddress = "127.0.0.1:{self.port}"\n'
        )
        (home / "config.toml").write_text(
            text + f'root-certificates = "{self.folder}/authority.crt"\n'
        )
        self.start(
            "superlink",
            *(
                "flower-superlink",
                "--ssl-ca-certfile",
                "authority.crt",
                "--ssl-certfile",
                "server.crt",
            ),
            *(
                "--ssl-keyfile",
                "server.key",
                "--enable-supernode-auth",
                "--database",
                self.database or str(home / "state.db"),
            ),
            *(
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
                "--disable-runtime-dependency-installation",
            ),
        )
        wait_for_port(self.port)

    def register(self, kit: Path) -> None:
        """Register a hospital's public key."""
        self.flwr("supernode", "register", str(kit / "site.pub"), "link")

    def join(self, kit: Path, *more: str, **variables: str) -> None:
        """Start `fedsgcg-site join` for a kit."""
        self.start(
            kit.name,
            sys.executable,
            "-m",
            "fedsgcg.deploy.cli.site",
            "join",
            str(kit),
            *more,
            **variables,
        )

    def start(self, name: str, program: str, *arguments: str, **variables: str) -> None:
        """Start a program in the background, with its output in `<name>.log`.

        `variables` are added to its environment.
        """
        path = program if program.startswith("/") else str(BIN / program)
        with (self.folder / f"{name}.log").open("ab") as log:
            self.children[name] = subprocess.Popen(
                [path, *arguments],
                cwd=self.folder,
                env=self.environment() | variables,
                stdout=log,
                stderr=log,
            )

    def environment(self) -> dict[str, str]:
        """Environment of the coordinator's processes."""
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        return {
            **os.environ,
            **QUIET,
            "PATH": path,
            "PYTHONPATH": str(REPOSITORY),
            "FLWR_HOME": str(self.folder / "coordinator"),
            "FEDSGCG_HOME": str(self.folder / "coordinator"),
        }

    def flwr(self, *arguments: str) -> str:
        """Run the `flwr` client and return what it said."""
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            timeout=120,
        )
        text = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == 0, text
        return text

    def submit(self, app: Path, overrides: Sequence[str] = ()) -> str:
        """Submit a run of our app with some settings (the last value counts) and return its id."""
        once = {text.partition("=")[0]: text for text in overrides}
        return self.submit_config(app, f"overrides='{' '.join(once.values())}'")

    def submit_config(self, app: Path, config: str) -> str:
        """Submit a run with a run config and return its id."""
        said = self.flwr("run", str(app), "link", "--run-config", config, "--format", "json")
        facts = json.loads(said[said.index("{") :])
        assert "run-id" in facts, said
        return str(facts["run-id"])

    def status(self, run: str) -> str:
        """Status of a run, e.g. `finished:completed`."""
        said = self.flwr("ls", "link", "--format", "json")
        runs = json.loads(said[said.index("{") :])["runs"]
        return str(next(entry["status"] for entry in runs if str(entry["run-id"]) == run))

    def wait(self, run: str, patience_s: float = 400) -> str:
        """Wait until the SuperLink logs the end of a run's ServerApp; return the run's status."""
        end = time.monotonic() + patience_s
        while (
            not re.search(rf"Finished task \d+ of run {run}", self.said("superlink"))
            and time.monotonic() < end
        ):
            time.sleep(0.5)
        return self.status(run)

    def said(self, name: str) -> str:
        """What a process has written."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def await_line(self, name: str, text: str, patience_s: float = 120) -> None:
        """Wait until a process has written a text."""
        end = time.monotonic() + patience_s
        while text not in self.said(name):
            assert time.monotonic() < end, f"{name} did not say {text!r}:\n{self.said(name)}"
            time.sleep(0.2)

    def close(self) -> None:
        """End everything, by process id."""
        for child in reversed(self.children.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        for child in self.children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(25)
            if child.poll() is None:
                child.kill()


def wait_for_port(port: int, patience_s: float = 60) -> None:
    """Wait until something listens on a port of 127.0.0.1."""
    import socket

    end = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on {port}"
            time.sleep(0.2)


@contextlib.contextmanager
def loopback(folder: Path, database: str = "") -> Iterator[Loopback]:
    """A federation that is ended with the block."""
    made = Loopback(folder, database=database)
    try:
        made.serve()
        yield made
    finally:
        made.close()
