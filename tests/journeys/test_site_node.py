"""A site's node on loopback with TLS and keys: it joins, works warm, reports errors, and leaves."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsgcg.clients.guard import ledger
from fedsgcg.deploy.cli import site as site_cli
from tests.conftest import REPOSITORY
from tests.support import small
from tests.support.loopback import Loopback, certificate, loopback

CONNECTED = "connected to"
STARTED = "North has started"

pytestmark = pytest.mark.slow
SETTINGS = (*small.SMALL, "federation.join_deadline_s=60", "federation.round_deadline_s=60")


def site_tool(federation: Loopback, *arguments: str) -> tuple[int, str]:
    """Run `fedsgcg-site` in this process, except `join`, which installs signal handlers."""
    if arguments[0] != "join":
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return site_cli.main(arguments), said.getvalue()
    done = subprocess.run(
        [sys.executable, "-m", "fedsgcg.deploy.cli.site", *arguments],
        cwd=federation.folder,
        env=federation.environment(),
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout.decode() + done.stderr.decode()


def outcome(federation: Loopback, run: str) -> dict[str, object]:
    (path,) = (federation.folder / "coordinator/runs" / run).rglob("outcome.json")
    return dict(json.loads(path.read_text()))


def processes(kit: Path) -> dict[str, int]:
    return {
        name: json.loads((kit / "home/join.json").read_text())[name]
        for name in ("pid", "supernode", "resident")
    }


def test_a_federation_of_warm_sites_gives_the_models_of_a_simulation(
    hospitals: Path, tmp_path: Path
) -> None:
    three = "data.sites=[East,North,South]"
    simulated = small.run(
        "simulate",
        *small.overrides(hospitals, tmp_path / "run", "heldout=South", "device=cpu", three),
    )
    assert simulated.returncode == 0, simulated.stdout + simulated.stderr
    with loopback(tmp_path) as federation:
        data = small.stated_splits(hospitals, tmp_path / "data", "South")
        kits = [federation.kit(site, data) for site in ("East", "North", "South")]
        for kit in kits:
            federation.register(kit)
            federation.join(kit, *(["--cold"] if kit.name == "East" else []))
        for kit in kits:
            federation.await_line(kit.name, "connected to")
        run = federation.submit(REPOSITORY, [*SETTINGS, "heldout=South", three])
        assert federation.wait(run) == "finished:completed", federation.said("superlink")[-3000:]
        assert outcome(federation, run)["digest"] == small.digest(tmp_path / "run"), (
            "warm, cold and simulated differ"
        )
        code, said = site_tool(federation, "status", str(kits[1]))
        assert code == 0, said
        assert "joined" in said
        before = processes(kits[1])
        assert site_tool(federation, "leave", str(kits[1]))[0] == 0
        assert federation.children["North"].wait(20) == 0
        for pid in before.values():
            assert not Path(f"/proc/{pid}").exists(), "leave left a process behind"
        assert site_tool(federation, "status", str(kits[1]))[0] == 1
        lines = ledger.entries(kits[1] / "home/ledger.jsonl")
        rounds = ["train", "query.statistics"] * 3
        assert [line["kind"] for line in lines] == [
            "query.enrol",
            *rounds,
            "evaluate",
            "query.statistics",
        ]
        code, said = site_tool(federation, "ledger", str(kits[1]))
        assert code == 0
        assert "the chain of hashes is intact" in said


def test_a_node_whose_parts_are_killed_comes_back(hospitals: Path, tmp_path: Path) -> None:
    with loopback(tmp_path) as federation:
        kit = federation.kit("North", hospitals)
        federation.register(kit)
        federation.join(kit)
        federation.await_line("North", STARTED)
        federation.await_line("North", CONNECTED)
        for victim in ("resident", "supernode"):
            before = processes(kit)
            os.kill(before[victim], signal.SIGKILL)
            federation.await_line(
                "North", f"the {'SuperNode' if victim == 'supernode' else 'resident'} ended with -9"
            )
            wanted = 2 if victim == "resident" else 3
            # Flower takes a minute to notice that a killed node is gone. The next kill must find a
            # node whose parts have all started.
            end = time.monotonic() + 150
            while min(map(federation.said("North").count, (CONNECTED, STARTED))) < wanted:
                assert time.monotonic() < end, federation.said("North")
                time.sleep(0.3)
            after = processes(kit)
            assert after["pid"] == before["pid"]
            assert after["supernode"] != before["supernode"]
            assert not Path(f"/proc/{before['supernode']}").exists()
        join = federation.children["North"]
        join.send_signal(signal.SIGKILL)  # the kernel must end what it had started
        join.wait(10)
        end = time.monotonic() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in processes(kit).values()):
            assert time.monotonic() < end, "a killed join left processes behind"
            time.sleep(0.3)


def test_what_is_wrong_is_refused_with_a_clear_error(hospitals: Path, tmp_path: Path) -> None:
    with loopback(tmp_path) as federation:
        stranger = federation.kit("North", hospitals)
        federation.join(stranger)
        federation.await_line("North", "[SITE-509]")
        federation.await_line("North", "registered or revoked")

        other = tmp_path / "other"
        other.mkdir()
        certificate(other, "authority")
        wrong = federation.kit("South", hospitals)
        (wrong / "ca.crt").write_bytes((other / "authority.crt").read_bytes())
        code, said = site_tool(federation, "join", str(wrong))
        assert code == 2
        assert "SITE-506" in said
        assert "does not belong to the kit's coordinator" in said
        code, said = site_tool(federation, "check", str(wrong), "--settings", "data.image_size=32")
        assert code == 1
        assert "SITE-506" in said

        os.chmod(wrong / "site.key", 0o644)
        assert "SITE-518" in site_tool(federation, "check", str(wrong), "--no-link")[1]
        (wrong / "site.key").unlink()
        code, said = site_tool(federation, "join", str(wrong))
        assert code == 2
        assert "DEP-603" in said


@pytest.mark.row(56)
def test_an_expired_certificate_is_named(hospitals: Path, tmp_path: Path) -> None:
    issuer = certificate(tmp_path, "authority")
    certificate(tmp_path, "server", issuer, days=-1)
    federation = Loopback(tmp_path)
    try:
        kit = federation.kit("North", hospitals)
        key = (
            "--ssl-ca-certfile",
            "authority.crt",
            "--ssl-certfile",
            "server.crt",
            "--ssl-keyfile",
            "server.key",
        )
        federation.start(
            "superlink",
            "flower-superlink",
            *key,
            "--host",
            "127.0.0.1",
            "--port",
            str(federation.port),
        )
        federation.await_line("superlink", "Uvicorn running")
        code, said = site_tool(federation, "join", str(kit))
        assert code == 2
        assert "certificate has expired" in said
        assert "--renew" in said
    finally:
        federation.close()


@pytest.mark.row(57)
def test_an_altered_bundle_does_not_run(hospitals: Path, tmp_path: Path) -> None:
    import shutil

    altered = tmp_path / "altered"
    altered.mkdir()
    without = shutil.ignore_patterns("__pycache__")
    for name in ("fedsgcg", "clients", "common", "configs", "server"):
        shutil.copytree(REPOSITORY / name, altered / name, symlinks=True, ignore=without)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, altered / name)
    proof = tmp_path / "proof"
    app = altered / "clients/app.py"
    app.write_text(app.read_text() + f"\nopen({str(proof)!r}, 'w').close()\n")
    with loopback(tmp_path) as federation:
        kit = federation.kit("North", hospitals)
        federation.register(kit)
        federation.join(kit)
        federation.await_line("North", "connected to")
        settings = [*small.SMALL, "federation.join_deadline_s=20", "federation.quorum=1"]
        run = federation.submit(altered, settings)
        assert federation.wait(run) == "finished:failed"
        assert "POL-705" in str(outcome(federation, run))
        assert not proof.exists()
        code, said = site_tool(federation, "approve", str(kit), "--diff")
        assert code == 1
        assert "clients/app.py  (+2 -0 lines)" in said
        assert str(proof) in said
        assert site_tool(federation, "approve", str(kit), "--yes")[0] == 0
        approved = [*small.SMALL, "federation.quorum=1", "federation.rounds=1"]
        run = federation.submit(altered, approved)
        assert federation.wait(run) == "finished:completed"
        assert proof.exists()
